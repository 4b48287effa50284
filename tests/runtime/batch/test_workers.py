"""Several processes for one job: the same results, and no row lost or done twice when one dies."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llama_runtime.batch.runners import places as places_module
from llama_runtime.batch.runners import worker
from llama_runtime.batch.runners.places import Place, check_memory, places
from llama_runtime.batch.runners.worker_spec import WorkerSpec
from llama_runtime.batch.runners.workers import WorkerPool
from llama_runtime.contract import Geometry
from llama_runtime.errors import CapacityError, RequestError
from llama_runtime.machine import Memory
from llama_runtime.memory_plan import MemoryPlan
from tests.runtime.batch.conftest import Run
from tests.runtime.batch.jobs import OPTIONS, Given, jsonl, mixed_rows, results_in

FAKE_WORKER = Path(__file__).with_name("fake_worker.py")
SPEC = WorkerSpec(bundle="bundle", kind="jsonl", options={}, chat=False)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has jobs start the fake worker with these arguments."""

    def command(*args: object) -> None:
        fake = (sys.executable, str(FAKE_WORKER), *map(str, args))
        monkeypatch.setattr(worker, "COMMAND", fake)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))

    return command


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that jobs start."""
    found: list[subprocess.Popen[bytes]] = []

    def popen(*args: object, **kwargs: object) -> subprocess.Popen[bytes]:
        found.append(start(*args, **kwargs))  # type: ignore[call-overload]
        return found[-1]

    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", popen)
    return found


def test_two_processes_write_what_one_does(
    run: Run,
    rows: Path,
    whole: bytes,
    command: Callable[..., None],
    started: list[subprocess.Popen[bytes]],
    tmp_path: Path,
) -> None:
    command(0)
    output = tmp_path / "two.jsonl"
    result = run(rows, *OPTIONS, "-o", output, "--workers", 2)
    assert (result.exit_code, output.read_bytes()) == (1, whole), result.output
    assert len(started) == 2
    assert all(process.poll() is not None for process in started), "one was left behind"


def test_a_process_that_dies_loses_no_row(
    run: Run,
    rows: Path,
    whole: bytes,
    command: Callable[..., None],
    started: list[subprocess.Popen[bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command(0.005)
    ended: list[int] = []

    def kill_one(pool: WorkerPool, worker: object, outcome: object) -> None:
        take(pool, worker, outcome)  # type: ignore[arg-type]
        ended.append(outcome.index)  # type: ignore[attr-defined]
        if len(ended) in (5, 12):
            started[-1].kill()

    take = WorkerPool._take_outcome
    monkeypatch.setattr(WorkerPool, "_take_outcome", kill_one)
    output = tmp_path / "two.jsonl"
    result = run(rows, *OPTIONS, "-o", output, "--workers", 2)
    assert (result.exit_code, output.read_bytes()) == (1, whole), result.output
    assert sorted(ended) == list(range(34)), "a row ended twice, or never"
    assert len(started) == 4
    assert "processes that died and were started again: 2" in result.stderr


def test_a_row_that_kills_its_process_is_reported_alone(
    run: Run,
    command: Callable[..., None],
    tmp_path: Path,
) -> None:
    good = mixed_rows(24)
    bad: list[Given] = [*good[:9], {"prompt": "POISON"}, *good[10:]]
    (tmp_path / "good.jsonl").write_bytes(jsonl(good))
    (tmp_path / "bad.jsonl").write_bytes(jsonl(bad))
    expected, found = tmp_path / "expected.jsonl", tmp_path / "found.jsonl"
    assert run(tmp_path / "good.jsonl", *OPTIONS, "-o", expected).exit_code == 0
    command(0, "die")
    result = run(tmp_path / "bad.jsonl", *OPTIONS, "-o", found, "--workers", 2)
    assert result.exit_code == 1, result.output
    pairs = list(zip(results_in(expected), results_in(found), strict=True))
    assert "signal 9" in pairs[9][1]["error"]
    assert pairs[9][1]["finish_reason"] == "error"
    for index, (before, after) in enumerate(pairs):
        assert index == 9 or before == after
    again = run(tmp_path / "bad.jsonl", *OPTIONS, "-o", found, "--verify")
    assert again.exit_code == 0, again.output


def test_a_process_that_can_not_start_ends_the_job_with_its_reason(
    run: Run, rows: Path, command: Callable[..., None], tmp_path: Path
) -> None:
    command(0, "unable")
    result = run(rows, *OPTIONS, "-o", tmp_path / "out.jsonl", "--workers", 2)
    assert result.exit_code == 1
    assert "a process of --workers can't start" in result.stderr
    assert "there is no such model" in result.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_processes_that_all_die_end_the_job(
    run: Run, rows: Path, command: Callable[..., None], tmp_path: Path, whole: bytes
) -> None:
    """Each row that is known to kill one counts as found out, so this is no endless loop."""
    command(0, "sick")
    few = tmp_path / "few.jsonl"
    few.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:3]))
    result = run(few, *OPTIONS, "-o", tmp_path / "out.jsonl", "--workers", 1, "--max-batch", 4)
    assert result.exit_code == 0, "one process is this one, which nothing kills"
    result = run(few, *OPTIONS, "-o", tmp_path / "two.jsonl", "--workers", 2)
    assert result.exit_code == 1
    assert all("signal 9" in row["error"] for row in results_in(tmp_path / "two.jsonl"))


def test_workers_end_when_whoever_started_them_is_killed(
    fake_bundle: Path, command: Callable[..., None], tmp_path: Path
) -> None:
    """Also while a row runs that would take them hours."""
    command(3600)
    script = tmp_path / "job.py"
    script.write_text(
        "import sys\n"
        "from itertools import count\n"
        "from llama_runtime.batch.runners import worker, workers\n"
        "from llama_runtime.batch.runners.places import Place\n"
        "from llama_runtime.batch.forms.formats import Record\n"
        "from llama_runtime.batch.rows.lines import Line\n"
        "from llama_runtime.batch.runners.worker_spec import WorkerSpec\n"
        f"worker.COMMAND = {worker.COMMAND!r}\n"
        f"spec = WorkerSpec(bundle={str(fake_bundle)!r}, kind='text', options={{}}, chat=False,\n"
        "    max_batch=2, max_len=300)\n"
        "pool = workers.WorkerPool([Place(spec)] * 2, None)\n"
        "print(*(each._process.pid for each in pool._workers), flush=True)\n"
        "rows = (Record(i, Line(i + 1, 'a')) for i in count())\n"
        "pool.run(rows, lambda: True, print)\n"
    )
    job = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    pids = [int(pid) for pid in job.stdout.readline().split()]
    assert len(pids) == 2
    job.send_signal(signal.SIGKILL)
    job.wait()
    job.stdout.close()
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, "they go on without anybody who reads what they make"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_processors_are_shared_out(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(places_module, "default_threads", lambda: 8)
    found = places(SPEC, count, on_gpu=False)
    cores = [core for place in found for core in place.cores or ()]
    assert sorted(cores) == list(range(8)), "one is shared, or idle"
    assert all(place.spec.threads == 8 // count for place in found)
    assert all(len(place.cores or ()) >= 8 // count for place in found)


def test_more_processes_than_processors_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(places_module, "default_threads", lambda: 2)
    found = places(SPEC, 3, on_gpu=False)
    assert found == [Place(replace(SPEC, threads=1))] * 3


def test_rows_that_run_end_before_a_broken_source_is_told(
    run: Run, command: Callable[..., None], tmp_path: Path
) -> None:
    """As in one process: what is done of a damaged file is done."""
    command(0)
    broken = gzip.compress(jsonl(mixed_rows(400)))[:-1500]
    output = tmp_path / "out.jsonl"
    arguments = ("-", *OPTIONS, "-o", output, "--no-spool", "--workers", 2)
    result = run(*arguments, stdin=broken)
    assert result.exit_code != 0
    assert "can't be read beyond line" in result.stderr
    done = results_in(output)
    assert [row["index"] for row in done] == list(range(len(done)))
    assert len(done) > 20


def test_each_process_has_a_device() -> None:
    assert [place.spec.devices for place in places(SPEC, 3, on_gpu=True)] == [[0], [1], [2]]
    given = places(replace(SPEC, devices=[4, 1]), 2, on_gpu=True)
    assert [place.spec.devices for place in given] == [[4], [1]]
    with pytest.raises(RequestError, match="2 workers need as many devices, not 3"):
        places(replace(SPEC, devices=[0, 1, 2]), 2, on_gpu=True)


def test_memory_must_hold_all_processes() -> None:
    geometry = Geometry(
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        hidden_size=8,
        intermediate_size=8,
        vocab_size=258,
        max_positions=512,
    )
    plan = MemoryPlan(
        geometry=geometry,
        weights=10**9,
        available=Memory(25 * 10**8, "this machine"),
        max_batch=1,
        max_len=64,
        prompt_budget=64,
    )
    check_memory(plan, 2, on_gpu=False)
    with pytest.raises(CapacityError, match="3 workers need"):
        check_memory(plan, 3, on_gpu=False)
    check_memory(plan, 3, on_gpu=True)


def test_a_spec_goes_through_a_pipe() -> None:
    spec = replace(
        SPEC, options={"logit_bias": {5: 1.5}, "stop": ["a"], "seed": 3}, max_batch="auto"
    )
    assert WorkerSpec.from_json(spec.to_json()) == spec


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    left = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    commands = [Path(f"/proc/{pid}/cmdline") for pid in left]
    assert not [c for c in commands if c.exists() and b"fake_worker" in c.read_bytes()]


def test_what_a_library_prints_does_not_stand_among_the_messages(
    run: Run, rows: Path, whole: bytes, tmp_path: Path, command: Callable[..., None]
) -> None:
    command(0.0, "noisy")
    run(rows, *OPTIONS, "--workers", 2, "-o", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == whole
