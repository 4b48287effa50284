"""Sources of rows: told apart by what is in them, and one that is damaged says where."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_runtime.batch.rows.lines import LineReader
from llama_runtime.batch.rows.source import Source
from llama_runtime.errors import DependencyError, RequestError
from llama_runtime.openai_api.parsing import parse_chat
from llama_runtime.params import SamplingParams

OBJECT = b'{"prompt": "a"}\n'
OPENAI = b'{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {}}\n'


def write(path: Path, data: bytes) -> Source:
    path.write_bytes(data)
    return Source.named(str(path))


def read(source: Source) -> tuple[str, list[str]]:
    """The kind, and the text of each line, or what is wrong with it."""
    with source.open() as rows:
        return rows.kind, [line.problem or line.text for line in rows.lines]


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("a.txt", OBJECT, "text"),
        ("a.txt", OPENAI, "text"),
        ("a.jsonl", OBJECT, "jsonl"),
        ("a.JSONL", OBJECT, "jsonl"),
        ("a.jsonl", b"broken\n" + OBJECT, "jsonl"),
        ("a.jsonl", b"broken\n[1]\n\n" + OPENAI, "openai"),
        ("a.jsonl", OBJECT + OPENAI, "jsonl"),
        ("a.jsonl", b"[" * 100_000 + b"\n" + OPENAI, "openai"),
        ("a.jsonl", b"broken\n" * 30 + OPENAI, "jsonl"),
        ("a", b"\n  " + OBJECT, "jsonl"),
        ("a", b"say " + OBJECT, "text"),
        ("a", OPENAI, "openai"),
        ("a", b'{"url": "/v1/x", "body": 1}', "openai"),
        ("a", b'{"url": "/v1/x", "prompt": "a"}', "jsonl"),
        ("a.json", b"\xef\xbb\xbf" + OPENAI, "openai"),
        ("a.parquet", b"not at all\n", "text"),
    ],
)
@pytest.mark.parametrize("compressed", ["", ".gz", "wrong name", "stdin"])
def test_what_rows_are_is_told_by_what_is_there(
    tmp_path: Path,
    name: str,
    data: bytes,
    kind: str,
    compressed: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plain or compressed, under the right name or a wrong one, from a file or a stream."""
    if compressed == "stdin":
        with open(write(tmp_path / "stream", gzip.compress(data)).path or "") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            found, lines = read(Source.named("-"))
        kind = "text" if name.startswith("a.txt") and not data.startswith(b"{") else kind
        if name.lower() not in ("a", "a.json", "a.parquet"):
            return  # the name said it
    elif compressed == ".gz":
        found, lines = read(write(tmp_path / f"{name}.gz", gzip.compress(data)))
    else:
        found, lines = read(write(tmp_path / name, gzip.compress(data) if compressed else data))
    assert found == kind
    assert lines == [line.text for line in LineReader(io.BytesIO(data))]


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r\0\ufeff")), min_size=1),
    st.lists(st.integers(0, 400), max_size=4),
)
def test_several_gzip_members_are_one_stream(texts: list[str], cuts: list[int]) -> None:
    """As ``cat a.gz b.gz`` makes them, cut anywhere, even in the middle of a character."""
    data = ("first\n" + "\n".join(texts)).encode()
    ends = [*sorted(cuts), len(data)]
    starts = [0, *ends[:-1]]
    members = [gzip.compress(data[start:end]) for start, end in zip(starts, ends, strict=True)]
    reader = LineReader(gzip.GzipFile(fileobj=io.BytesIO(b"".join(members))))
    plain = LineReader(io.BytesIO(data))
    assert [(line.number, line.text) for line in reader] == [(x.number, x.text) for x in plain]


def long_rows(count: int) -> bytes:
    draw = random.Random(0)
    return b"".join(b"row %d %s\n" % (i, draw.randbytes(300).hex().encode()) for i in range(count))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_gzip_file_gives_the_rows_before_it_and_says_where_it_ends(
    tmp_path: Path, share: float
) -> None:
    data = long_rows(600)
    packed = gzip.compress(data)
    source = write(tmp_path / "a.txt.gz", packed[: int(len(packed) * share)])
    found: list[str] = []
    with source.open() as rows, pytest.raises(RequestError) as caught:
        found.extend(line.text for line in rows.lines)
    assert found == data.decode().splitlines()[: len(found)]
    assert len(found) > 600 * share - 120  # the last part that deflate made may be lost
    assert str(caught.value) == (
        f"the prompts can't be read beyond line {len(found)}: "
        "Compressed file ended before the end-of-stream marker was reached"
    )


def test_a_damaged_gzip_file_is_one_sentence(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(long_rows(400)))
    packed[len(packed) // 2] ^= 0xFF
    for data in (bytes(packed), gzip.compress(b"a\n", mtime=0) + b"what is this?", b"\x1f\x8b\x08"):
        source = write(tmp_path / "a.gz", data)
        with pytest.raises(
            RequestError, match=r"^the prompts can't be read beyond line \d+: [^\n]+"
        ):
            read(source)


def test_a_line_that_is_not_utf8_in_the_middle_of_a_gzip_stream_fails_alone(
    tmp_path: Path,
) -> None:
    packed = gzip.compress(b"good\nbad \xff\xfe\ngood\nzero \0\nlast \xc3", mtime=0)
    kind, lines = read(write(tmp_path / "a.gz", packed))
    assert kind == "text"
    assert lines == [
        "good",
        "line 2 is not UTF-8 text: byte 0xFF at position 5",
        "good",
        "line 4 is not text: it holds a zero byte",
        "line 5 is not UTF-8 text: byte 0xC3 at position 6",
    ]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty: it has no prompts"),
        (b"\n  \n\r\n", "is empty: it has no prompts"),
        (gzip.compress(b"\n", mtime=0), "is empty: it has no prompts"),
        (b"\x7fELF\0\0", "can't be used: line 1 is not text"),
        (b"\xff\xfeh\0i\0", "can't be used: line 1 is not UTF-8 text"),
    ],
)
def test_what_does_not_begin_with_text_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    source = write(tmp_path / "prompts", data)
    with pytest.raises(RequestError, match=rf"prompts {words}"):
        read(source)


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    for name, words in (
        (str(tmp_path / "nowhere.txt"), r"nowhere\.txt does not exist"),
        (str(tmp_path), "is a directory"),
        ("x" * 5000, "can't be read"),
        ("", "the name of the prompts file is empty"),
    ):
        with pytest.raises(RequestError, match=words):
            Source.named(name)
    gone = write(tmp_path / "a", b"a\n")
    (tmp_path / "a").unlink()
    for act in (lambda: read(gone), gone.fingerprint):
        with pytest.raises(RequestError, match="a can't be read: No such file"):
            act()


def test_a_fingerprint_is_of_the_bytes_as_they_are(tmp_path: Path) -> None:
    first = write(tmp_path / "a", b"one\ntwo\n").fingerprint()
    assert first["bytes"] == 8
    assert write(tmp_path / "b", b"one\ntwo\n").fingerprint() == first
    assert write(tmp_path / "a", b"one\ntwi\n").fingerprint() != first


def test_a_pipe_is_a_stream_and_a_file_is_none(tmp_path: Path) -> None:
    assert Source.named("-").is_stream
    assert not write(tmp_path / "a", b"a").is_stream
    os.mkfifo(tmp_path / "pipe")
    assert Source.named(str(tmp_path / "pipe")).is_stream


# --- parquet ------------------------------------------------------------------------------------


def parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Source:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return Source.named(str(path))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt", "a"])
def test_a_row_of_parquet_is_the_object_of_its_columns(tmp_path: Path, name: str) -> None:
    given = [{"id": i, "prompt": f"é {i}\n\"'", "top_p": 0.5} for i in range(2500)]
    kind, lines = read(parquet(tmp_path / name, given, row_group_size=400))
    assert kind == "jsonl"
    assert [json.loads(line) for line in lines] == given


def test_messages_of_parquet_are_those_of_json(tmp_path: Path) -> None:
    given: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "a"}], "prompt": None},
        {"messages": [{"role": "system", "content": "b"}] * 2, "prompt": None},
        {"messages": None, "prompt": "c"},
    ]
    kind, lines = read(parquet(tmp_path / "a.parquet", given))
    assert kind == "jsonl"
    assert [json.loads(line) for line in lines] == given


def test_rows_of_the_openai_api_may_come_as_columns(tmp_path: Path) -> None:
    """A column has all keys that any row has, null where the row has none."""
    bodies = [
        {"model": "m", "messages": [{"role": "user", "content": "a", "name": "x"}], "top_p": 0.5},
        {"model": "m", "messages": [{"role": "user", "content": "b"}], "stop": ["x"]},
    ]
    given = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": body}
        for i, body in enumerate(bodies)
    ]
    kind, lines = read(parquet(tmp_path / "a.parquet", given))
    assert kind == "openai"
    found = [json.loads(line) for line in lines]
    assert [row["custom_id"] for row in found] == ["0", "1"]
    for row, body in zip(found, bodies, strict=True):
        assert {"stop", "top_p"} < row["body"].keys()
        read_back, written = (parse_chat(each, SamplingParams()) for each in (row["body"], body))
        assert read_back.params == written.params


def test_what_json_can_not_hold_fails_alone(tmp_path: Path) -> None:
    given = [{"prompt": "a", "top_p": 1.0}, {"prompt": "b", "top_p": float("nan")}]
    _, lines = read(parquet(tmp_path / "a.parquet", given))
    assert json.loads(lines[0])["prompt"] == "a"
    assert lines[1].startswith("row 2 can't be written as JSON")


def test_a_damaged_parquet_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet(path, [{"prompt": "a"}] * 100)
    data = path.read_bytes()
    for broken in (data[:-20], data[:4] + b"\0" * 200 + data[204:], b"PAR1"):
        path.write_bytes(broken)
        with pytest.raises(
            RequestError, match=r"^.*a\.parquet can't be read beyond row 0: [^\n]*$"
        ):
            read(Source(path))


def test_parquet_needs_a_file_and_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = parquet(tmp_path / "a.parquet", [{"prompt": "a"}])
    with open(tmp_path / "a.parquet") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(RequestError, match="standard input is a parquet file, which can't be"):
            read(Source(None))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DependencyError, match=r"pip install 'llama-caravan\[scale\]'"):
        read(source)


def test_bytes_in_parquet_that_are_no_text_fail_their_row_alone(tmp_path: Path) -> None:
    values = pyarrow.array([b"a", b"b \xff", b"c"], pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, values.buffers())
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": texts}), path)
    kind, (first, second, third) = read(Source(path))
    assert (kind, first, third) == ("jsonl", '{"prompt": "a"}', '{"prompt": "c"}')
    assert second.startswith("row 2 can't be read: 'utf-8' codec can't decode byte 0xff")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_thread_that_waits_for_a_stream_does_not_keep_the_job_from_ending(
    tmp_path: Path, compressed: bool
) -> None:
    """As when whoever reads the results has gone, and whoever gives rows hasn't."""
    program = """if True:
        import sys, threading, time
        from pathlib import Path
        from llama_runtime.batch.rows.source import Source
        with Source(Path(sys.argv[1]) if sys.argv[1:] else None).open() as rows:
            print(next(rows.lines).text, flush=True)
            threading.Thread(target=list, args=(rows.lines,), daemon=True).start()
            time.sleep(0.1)
    """
    packer = zlib.compressobj(wbits=31)
    rows = b"".join(b"%d\n" % i**40 for i in range(2, 900))  # over the 8 KB that gzip waits for
    packed = packer.compress(rows) + packer.flush(zlib.Z_SYNC_FLUSH)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for arguments in ([], [str(pipe)]):
        with subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdin is not None
            with pipe.open("wb") if arguments else process.stdin as file:
                file.write(packed if compressed else rows)
                file.flush()
                try:
                    assert process.wait(20) == 0
                finally:
                    process.kill()
