"""The ledger: whatever is cut off its files, the job goes on to the same results, no row twice."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_runtime.batch.forms.formats import Format
from llama_runtime.batch.results import in_order as in_order_module
from llama_runtime.batch.results import ledger as ledger_module
from llama_runtime.batch.results.in_order import InOrder
from llama_runtime.batch.results.ledger import Ledger
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.errors import RequestError
from tests.runtime.batch.jobs import OPENAI, PROMPTS, made_up

NUM_ROWS = 12
FAILED = {2, 5, 6, 9}
NAMES = ("out", "errors", "ahead")
SEVERAL_FILES = pytest.mark.parametrize("form", [PROMPTS, OPENAI], ids=["one file", "two files"])


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder for files that are made thousands of times."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as name:
        yield Path(name)


def outcome(form: Format, index: int) -> Outcome:
    return made_up(form, index, fails=index in FAILED)


def ledger_in(folder: Path, form: Format, *, ordered: bool = True) -> Ledger:
    errors = folder / "errors" if form.errors_apart else None
    return Ledger(form, folder / "out", errors, ordered=ordered, journal=folder / "ahead")


def add(ledger: Ledger, form: Format, indices: Seq[int]) -> None:
    for index in indices:
        if index not in ledger.done:
            ledger.add(outcome(form, index))


def contents(folder: Path) -> list[bytes]:
    paths = [folder / name for name in NAMES[:2]]
    return [path.read_bytes() if path.exists() else b"" for path in paths]


def right(form: Format) -> list[bytes]:
    """What the files must hold in the end."""
    apart = FAILED if form.errors_apart else set()
    lines = [(index in apart, outcome(form, index).line) for index in range(NUM_ROWS)]
    return [
        b"".join(line for is_apart, line in lines if is_apart is other) for other in (False, True)
    ]


def go_on(folder: Path, form: Format, synced: dict[str, int], order: Seq[int]) -> list[int]:
    """Finish a job; the rows that were found done."""
    ledger = ledger_in(folder, form)
    found = [outcome.index for outcome in ledger.recover(synced)]
    assert len(found) == len(set(found)), "a row is counted twice"
    add(ledger, form, order)
    ledger.close()
    assert contents(folder) == right(form)
    return found


def last_bytes(data: bytes, num_lines: int) -> Iterator[int]:
    """Every length of a file that ends in one of its last lines."""
    lines = data.splitlines(keepends=True)
    size = sum(map(len, lines))
    yield from range(size - sum(map(len, lines[-num_lines:])), size + 1)


@SEVERAL_FILES
def test_a_job_goes_on_to_the_same_results_whichever_byte_its_files_end_at(
    form: Format, in_memory: Path
) -> None:
    ledger = ledger_in(in_memory, form)
    add(ledger, form, [1, 0, 2, 3, 8, 4, 5, 6, 11, 10, 9])  # 7 is missing: four wait for it
    ledger.close()
    synced = ledger.lengths()
    begun = {path.name: path.read_bytes() for path in in_memory.iterdir()}
    places = [(name, length) for name in begun for length in last_bytes(begun[name], 3)]
    assert len(places) > 300
    for name, length in places:
        for other, data in begun.items():
            (in_memory / other).write_bytes(data[:length] if other == name else data)
        found = go_on(in_memory, form, synced, range(NUM_ROWS))
        assert len(found) >= NUM_ROWS - 1 - 3


@SEVERAL_FILES
@given(
    first=st.permutations(range(NUM_ROWS)),
    then=st.permutations(range(NUM_ROWS)),
    num_first=st.integers(0, NUM_ROWS),
    lost=st.tuples(*[st.integers(0, 900)] * 3),
    junk=st.sampled_from([b"", b"\0" * 50, b"\0\n\0", b'{"index": 1', b"\xff\xfe\n{}\n"]),
    is_synced=st.booleans(),
)
@settings(max_examples=150)
def test_a_job_goes_on_to_the_same_results_from_any_state(
    form: Format,
    first: list[int],
    then: list[int],
    num_first: int,
    lost: tuple[int, int, int],
    junk: bytes,
    is_synced: bool,
) -> None:
    """Rows end in any order; any files lose any ends, or have junk behind what was synced."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ledger = ledger_in(folder, form)
        add(ledger, form, first[:num_first])
        ledger.close()
        synced = ledger.lengths() if is_synced else {}
        for file, num_lost in zip(NAMES, lost, strict=True):
            if (path := folder / file).exists():
                data = path.read_bytes()
                path.write_bytes(
                    data[: max(0, len(data) - num_lost)] if num_lost % 2 else data + junk
                )
        go_on(folder, form, synced, then)


def test_a_row_that_waited_for_its_turn_is_found_again(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path, PROMPTS)
    add(ledger, PROMPTS, [3, 1, 7, 0])
    ledger.close()
    assert go_on(tmp_path, PROMPTS, {}, range(NUM_ROWS)) == [0, 1, 3, 7]


@SEVERAL_FILES
def test_without_an_order_the_lines_are_the_same_set(form: Format, tmp_path: Path) -> None:
    for length in (0, 1, 60, 150, 10**6):
        folder = tmp_path / str(length)
        folder.mkdir()
        ledger = ledger_in(folder, form, ordered=False)
        add(ledger, form, [7, 3, 9, 5, 11])
        ledger.close()
        for path in folder.iterdir():
            path.write_bytes(path.read_bytes()[:length])
        ledger = ledger_in(folder, form, ordered=False)
        found = [each.index for each in ledger.recover({})]
        assert found == [7, 3, 9, 5, 11][: len(found)] or form.errors_apart
        add(ledger, form, [2, 0, *range(NUM_ROWS)])
        ledger.close()
        for written, expected in zip(contents(folder), right(form), strict=True):
            assert sorted(written.splitlines()) == sorted(expected.splitlines())
        assert not (folder / "ahead").exists()


@pytest.mark.parametrize("row", [0, 4, 9])
@pytest.mark.parametrize("change", [b"", b"x", b'{"index": 3}', b"[]", b"\0\0\0"])
def test_a_line_that_was_changed_below_what_was_synced_is_refused(
    tmp_path: Path, row: int, change: bytes
) -> None:
    ledger = ledger_in(tmp_path, PROMPTS)
    add(ledger, PROMPTS, range(NUM_ROWS))
    ledger.close()
    lines = (tmp_path / "out").read_bytes().splitlines(keepends=True)
    synced = {"output": sum(map(len, lines[: row + 1]))}
    lines[row] = change + b"\n"
    changed = b"".join(lines)
    (tmp_path / "out").write_bytes(changed)
    with pytest.raises(RequestError, match=r"out was changed since .* no whole result at byte"):
        list(ledger_in(tmp_path, PROMPTS).recover(synced))
    assert (tmp_path / "out").read_bytes() == changed, "nothing is cut off what somebody changed"


def test_a_row_that_is_there_twice_or_missing_is_refused(tmp_path: Path) -> None:
    lines = [outcome(PROMPTS, index).line for index in range(6)]
    for there, words in (
        ([0, 1, 2, 1, 3], "row 1 is there twice"),
        ([0, 1, 3, 4], "row 2 is missing, and later ones are not"),
        ([1, 2], "row 0 is missing, and later ones are not"),
    ):
        (tmp_path / "out").write_bytes(b"".join(lines[index] for index in there))
        with pytest.raises(RequestError, match=words):
            list(ledger_in(tmp_path, PROMPTS).recover({}))


def test_a_row_missing_among_two_files_is_refused_where_too_much_would_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = ledger_in(tmp_path, OPENAI)
    add(ledger, OPENAI, range(NUM_ROWS))
    ledger.close()
    (tmp_path / "errors").unlink()
    before = contents(tmp_path)
    monkeypatch.setattr(ledger_module, "MOST_TAKEN_BACK", 300)
    ledger = ledger_in(tmp_path, OPENAI)
    with pytest.raises(RequestError, match="row 2 is missing, and later ones are not"):
        list(ledger.recover({}))
    ledger.close()
    assert contents(tmp_path) == before


def test_a_row_that_is_done_can_not_be_added_again(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path, PROMPTS)
    add(ledger, PROMPTS, [0, 4])
    for index in (0, 4):
        with pytest.raises(ValueError, match=f"row {index} is done already"):
            ledger.add(outcome(PROMPTS, index))
    ledger.close()


def test_there_is_room_while_fewer_rows_wait_than_the_window(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path, PROMPTS)
    ledger.window = 2
    for index, has_room in ((1, True), (5, False), (4, False), (0, False), (2, False), (3, True)):
        add(ledger, PROMPTS, [index])
        assert ledger.has_room() is has_room, index
    ledger.close()
    unordered = ledger_in(tmp_path, PROMPTS, ordered=False)
    assert unordered.has_room()


@given(st.permutations(range(12)))
def test_lines_pass_in_order_and_as_soon_as_order_allows(arrivals: list[int]) -> None:
    written: list[int] = []
    in_order = InOrder(lambda outcome: written.append(outcome.index))
    for count, index in enumerate(arrivals, 1):
        in_order.add(outcome(PROMPTS, index))
        seen = set(arrivals[:count])
        expected = next(i for i in range(13) if i not in seen)
        assert written == list(range(expected))
        assert in_order.num_waiting == count - expected


def test_the_journal_is_shortened_and_keeps_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = len(outcome(PROMPTS, 10).line)
    monkeypatch.setattr(in_order_module, "_SMALL", 3 * line)
    monkeypatch.setattr(in_order_module, "_LARGE", 6 * line)
    ledger = ledger_in(tmp_path, PROMPTS)
    lengths = []
    add(ledger, PROMPTS, [50])  # waits all along
    for index in (*range(11, 40, 2), *range(10), 10, *range(12, 40, 2)):
        add(ledger, PROMPTS, [index])
        lengths.append((tmp_path / "ahead").stat().st_size // line)
    ledger.close()
    assert max(lengths) <= 30, "16 wait at most, and it is written anew before it doubles"
    assert lengths[-1] < 20
    found = {each.index for each in ledger_in(tmp_path, PROMPTS).recover({})}
    assert found == {*range(40), 50}


def test_the_journal_is_emptied_when_nothing_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_order_module, "_SMALL", 100)
    ledger = ledger_in(tmp_path, PROMPTS)
    add(ledger, PROMPTS, [1, 2, 3, 0])
    assert (tmp_path / "ahead").read_bytes() == b""
    add(ledger, PROMPTS, [6, 4, 5])
    ledger.close()
    assert go_on(tmp_path, PROMPTS, {}, range(NUM_ROWS)) == list(range(7))
