"""Rows on a Ray cluster: what goes there and comes back, without a cluster that runs.

``tests/laws/test_ray.py`` has one.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_runtime import __version__
from llama_runtime.batch import command
from llama_runtime.batch.forms.formats import Record
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.batch.rows.lines import Line
from llama_runtime.batch.rows.source import Source
from llama_runtime.batch.runners import ray_cluster, ray_runner, ray_tables
from llama_runtime.batch.runners.ray_runner import RayRunner
from llama_runtime.batch.runners.ray_tables import Piece, Shards, outcome_table, outcomes_of
from llama_runtime.batch.runners.ray_worker import MOST_TRIES, BatchRunner, manifest_hash
from llama_runtime.batch.runners.runner import LocalRunner
from llama_runtime.batch.runners.worker_spec import WorkerSpec
from llama_runtime.batch.settings import Settings
from llama_runtime.errors import (
    BackendError,
    CapacityError,
    CaravanError,
    RequestError,
)
from llama_runtime.progress import Console


def rows(count: int, text: str = "row {}") -> list[Record]:
    return [Record(i, Line(i + 1, text.format(i))) for i in range(count)]


# What goes there and comes back


def test_shards_hold_all_rows_as_they_were(tmp_path: Path) -> None:
    texts = ["Grüße 🦙", "\t", "", '{"prompt": "x"}', "a\r"]
    records = [Record(3 * i, Line(i + 1, text)) for i, text in enumerate(texts)]
    records.append(Record(99, Line(7, "", "line 7 is not UTF-8 text")))
    shards = Shards(tmp_path / "shards", 2)
    shards.write(iter(records))
    found = [record for piece in shards.pieces(1) for record in piece.read()]
    assert found == records
    assert len(shards.indices) == 6
    assert 99 in shards.indices


@settings(max_examples=25)
@given(st.integers(1, 400), st.integers(1, 5), st.integers(1, 9), st.integers(1, 200))
def test_pieces_shrink_as_the_end_comes(
    tmp_path_factory: pytest.TempPathFactory, count: int, workers: int, slots: int, of_file: int
) -> None:
    """Each row is in one piece, in order; a piece fills the slots, and leaves as much to others."""
    shards = Shards(tmp_path_factory.mktemp("shards"), slots)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_tables, "FILE_ROWS", of_file)
        shards.write(rows(count))
    sizes: list[int] = []
    indices: list[int] = []
    for piece in shards.pieces(workers):
        found = [record.index for record in piece.read()]
        left = count - len(indices)
        left_in_file = min(of_file - len(indices) % of_file, left)
        share = max(slots, min(left // (4 * workers), 8 * slots))
        assert len(found) == min(share // slots * slots, left_in_file)
        sizes.append(len(found))
        indices += found
    assert indices == list(range(count))
    if of_file >= count:
        assert sizes == sorted(sizes, reverse=True)
        assert all(size >= slots for size in sizes[:-1])


def test_files_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_tables, "FILE_BYTES", 10)
    shards = Shards(tmp_path / "shards", 8)
    shards.write(rows(5, "12345678"))
    assert [len(piece.read()) for piece in shards.pieces(1)] == [2, 2, 1]


def test_a_new_start_removes_old_shards(tmp_path: Path) -> None:
    shards = Shards(tmp_path / "shards", 1)
    shards.write(rows(100))
    Shards(tmp_path / "shards", 1).write(rows(1))
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["00000000.parquet"]


def test_outcomes_come_back_as_they_were() -> None:
    outcomes = [
        Outcome(0, b"\0x\xff\0", None, 3, 4, ("stop", "length"), 1.5),
        Outcome(7, b'{"a": 1}\n', "it is wrong", 0, 0, ("error",), 0.0),
        Outcome(2**40, b"", None, 1, 0, (), None),
    ]
    assert list(outcomes_of(outcome_table(outcomes))) == outcomes


# Workers


def worker_spec(bundle: Path) -> WorkerSpec:
    options = {"max_tokens": 8, "temperature": 0.0, "seed": 1}
    return WorkerSpec(
        bundle=str(bundle), kind="jsonl", options=options, chat=False, max_batch=4, max_len=64
    )


def piece_table(piece: Piece) -> Any:
    import pyarrow

    return pyarrow.Table.from_pylist([asdict(piece)])


def made_runner(spec: WorkerSpec) -> BatchRunner:
    return BatchRunner(spec.to_json(), __version__, manifest_hash(Path(spec.bundle)))


def test_a_worker_gives_what_a_local_run_gives(tiny_bundle: Path, tmp_path: Path) -> None:
    """Two pieces at once share the batch; a bad row fails alone; lines are in the rows' order."""
    records = rows(80, '{{"prompt": "row {}"}}')
    records[5] = Record(5, Line(6, "no JSON"))
    records[6] = Record(6, Line(7, "", "line 7 is not UTF-8 text"))
    spec = worker_spec(tiny_bundle)
    shards = Shards(tmp_path / "shards", 30)
    shards.write(records)
    runner = made_runner(spec)
    with ThreadPoolExecutor(2) as pool:
        tables = list(pool.map(runner, map(piece_table, shards.pieces(1))))
    found = [outcome for table in tables for outcome in outcomes_of(table)]
    expected: list[Outcome] = []
    llm, form = spec.load()
    with llm:
        LocalRunner(llm, form).run(iter(records), lambda: True, expected.append)
    expected.sort(key=lambda outcome: outcome.index)
    assert len(tables) == 3
    assert [replace(each, seconds=None) for each in found] == [
        replace(each, seconds=None) for each in expected
    ]
    assert [each.index for each in found if each.error] == [5, 6]


def refusal(runner: BatchRunner, piece: Piece = Piece("", 0, 1)) -> str:  # noqa: B008
    with pytest.raises(BackendError) as caught:
        list(outcomes_of(runner(piece_table(piece))))
    return str(caught.value)


def test_a_node_without_the_bundle_says_so(tmp_path: Path) -> None:
    runner = BatchRunner(worker_spec(tmp_path / "none").to_json(), __version__, "0" * 64)
    assert f"there is no bundle at {tmp_path}/none" in refusal(runner)


def test_a_node_with_another_bundle_says_so(tiny_bundle: Path) -> None:
    runner = BatchRunner(worker_spec(tiny_bundle).to_json(), __version__, "0" * 64)
    assert "another one there" in refusal(runner)


def test_a_node_with_another_caravan_says_so(tiny_bundle: Path) -> None:
    manifest = manifest_hash(tiny_bundle)
    runner = BatchRunner(worker_spec(tiny_bundle).to_json(), "0.0.0", manifest)
    assert "and the job runs with 0.0.0: install the same" in refusal(runner)


def test_a_node_that_cannot_see_the_rows_says_so(tiny_bundle: Path, tmp_path: Path) -> None:
    runner = made_runner(worker_spec(tiny_bundle))
    piece = Piece(str(tmp_path / "0.parquet"), 0, 1)
    assert "must be on storage that all nodes see" in refusal(runner, piece)


def test_rows_that_kill_their_workers_end_the_job(tiny_bundle: Path, tmp_path: Path) -> None:
    shards = Shards(tmp_path / "shards", 4)
    shards.write(rows(3, '{{"prompt": "{}"}}'))
    (piece,) = shards.pieces(1)
    for _ in range(MOST_TRIES - 1):  # the worker died each time
        piece.note_try()
    runner = made_runner(worker_spec(tiny_bundle))
    assert len(list(outcomes_of(runner(piece_table(piece))))) == 3
    assert "the rows of lines 1 to 3 were begun 8 times" in refusal(runner, piece)


# The job's side, with a Ray that answers as it is told


@pytest.fixture
def ray_runner_of(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A runner whose cluster gives these outcomes."""
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": False, "Resources": {"CPU": 9}}]

    @contextmanager
    def connected(address: str, *, quiet: bool) -> Iterator[Any]:
        yield SimpleNamespace(nodes=lambda: nodes)

    monkeypatch.setattr(ray_runner, "connected", connected)

    def make(indices: list[int], **changes: Any) -> RayRunner:
        spec = replace(worker_spec(tiny_bundle), **changes)
        runner = RayRunner(spec, address="auto", num_workers=2, shards=tmp_path / "shards")
        outcomes = [Outcome(index, b"{}\n", None, 1, 2, ("stop",), 0.1) for index in indices]
        monkeypatch.setattr(runner, "_outcomes", lambda _: (each for each in outcomes))
        return runner

    return make


def run_rows(runner: RayRunner, count: int) -> list[int]:
    found: list[int] = []
    runner.run(iter(rows(count)), lambda: True, lambda outcome: found.append(outcome.index))
    return found


def test_a_piece_that_ran_twice_counts_once(ray_runner_of: Any, tmp_path: Path) -> None:
    runner = ray_runner_of([0, 1, 2, 1, 2, 3])
    assert run_rows(runner, 4) == [0, 1, 2, 3]
    assert runner.stats().completion_tokens == 8
    assert not (tmp_path / "shards").exists()


def test_a_row_that_never_came_is_an_error(ray_runner_of: Any, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="left out 1 of 4 rows: run the same command again"):
        run_rows(ray_runner_of([0, 1, 3]), 4)
    assert not (tmp_path / "shards").exists()


def test_a_row_that_nobody_asked_for_is_an_error(ray_runner_of: Any) -> None:
    with pytest.raises(BackendError, match="row 9, which wasn't asked for"):
        run_rows(ray_runner_of([0, 9]), 2)


def test_nothing_to_do_needs_no_cluster_work(ray_runner_of: Any) -> None:
    assert run_rows(ray_runner_of([5]), 0) == []


def test_threads_are_shared_out_among_nodes_that_live(ray_runner_of: Any) -> None:
    assert ray_runner_of([]).about["threads"] == 2
    assert ray_runner_of([], threads=1).about["threads"] == 1
    with pytest.raises(CapacityError, match="2 workers of 3 processors don't fit"):
        ray_runner_of([], threads=3)
    with pytest.raises(RequestError, match="Ray gives each worker one"):
        ray_runner_of([], devices=[1])


def test_what_ray_raises_is_one_sentence(ray_runner_of: Any) -> None:
    def tables() -> Iterator[Any]:
        yield from ()
        raise ValueError("first line\nTraceback of twenty lines\nthe reason")

    with pytest.raises(CaravanError, match=r"^Ray could not go on: ValueError: the reason$"):
        ray_runner_of([])._next(tables())


def test_the_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CaravanError, match="can't write to"):
        Shards(tmp_path / "file" / "shards", 1).write(rows(1))
    shutil.rmtree(tmp_path)


def job_on(ray: str, bundle: Path, output: Path | None, prompts: Path) -> None:
    prompts.write_text("one\ntwo\n", encoding="utf-8")
    settings = Settings(bundle=bundle, options={"max_tokens": 4}, ray=ray)
    command.run(Source(prompts), output, settings, Console(sys.stderr, quiet=True))


def test_a_job_without_its_cluster_can_go_on_elsewhere(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "import_ray", lambda: None)
    output, prompts = tmp_path / "out.jsonl", tmp_path / "prompts.txt"
    with pytest.raises(BackendError, match="no Ray cluster answers at 127"):
        job_on("127.0.0.1:1", tiny_bundle, output, prompts)
    settings = Settings(bundle=tiny_bundle, options={"max_tokens": 4})
    assert command.run(Source(prompts), output, settings, Console(sys.stderr, quiet=True))
    assert len(output.read_bytes().splitlines()) == 2


def test_a_job_on_ray_needs_a_file_for_its_results(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="give --output a file that all nodes see"):
        job_on("auto", tiny_bundle, None, tmp_path / "prompts.txt")
