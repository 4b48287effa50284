"""Lines of prompts: each becomes a row, and a bad line harms no other."""

from __future__ import annotations

import errno
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_runtime.batch.forms.prompt_rows import MAX_NESTING, Row, parse_row
from llama_runtime.batch.rows import lines as lines_module
from llama_runtime.batch.rows.lines import LineReader
from llama_runtime.errors import RequestError


def read(data: bytes, *, jsonl: bool = True) -> list[Row]:
    lines = LineReader(io.BytesIO(data))
    return [parse_row(index, line, is_object=jsonl) for index, line in enumerate(lines)]


def error_of(line: bytes | str) -> str:
    (row,) = read(line.encode() if isinstance(line, str) else line)
    assert row.error is not None
    return str(row.error)


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r\0")), max_size=20))
def test_the_rows_of_a_text_file_are_its_lines_that_are_not_blank(texts: list[str]) -> None:
    for end in ("\n", "\r\n"):
        data = end.join(texts).encode()
        expected = [text for text in texts if text.strip()]
        if texts and texts[0].startswith("\ufeff"):
            continue  # a byte order mark; see the test below
        rows = read(data, jsonl=False)
        assert [row.prompt for row in rows] == expected
        assert [row.index for row in rows] == list(range(len(expected)))


def test_lines_are_the_same_however_the_bytes_arrive() -> None:
    data = "first\n\n  \r\nsecond é\r\n\n{third}".encode()

    class Dripping(io.BytesIO):
        def read1(self, _size: int | None = -1, /) -> bytes:
            return super().read1(1)

    dripped = [(line.number, line.text) for line in LineReader(Dripping(data))]
    assert dripped == [(1, "first"), (4, "second é"), (6, "{third}")]
    assert dripped == [(line.number, line.text) for line in LineReader(io.BytesIO(data))]


def test_a_byte_order_mark_is_not_part_of_the_first_prompt() -> None:
    assert [row.prompt for row in read(b"\xef\xbb\xbfhello\n", jsonl=False)] == ["hello"]


def test_an_endless_line_is_cut_off_and_the_next_one_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 100_000)
    data = b"x" * 1_000_000 + b"\nnext\n" + b"y" * 1_000_000
    found = list(LineReader(io.BytesIO(data)))
    assert [line.problem and "longer than 100000 bytes" in line.problem for line in found] == [
        True,
        None,
        True,
    ]
    assert found[1].text == "next"


def test_a_file_that_fails_while_it_is_read_is_a_named_error() -> None:
    class Broken(io.BytesIO):
        def read1(self, _size: int | None = -1, /) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(RequestError, match="be read beyond line 0: Input/output error"):
        list(LineReader(Broken()))


def test_a_line_that_is_not_text_is_the_error_of_its_row() -> None:
    rows = read(b"good\n\xff\xfe\nzero \0 byte\ngood\n", jsonl=False)
    assert [row.prompt for row in rows] == ["good", None, None, "good"]
    assert "line 2 is not UTF-8 text: byte 0xFF at position 1" in str(rows[1].error)
    assert "line 3 is not text" in str(rows[2].error)


def test_a_number_that_json_can_not_write_is_an_error_of_its_row() -> None:
    """Python reads 1e400 as infinity, and would write a word that no other reader takes."""
    for line in (
        '{"messages": [{"role": "user", "content": 1e400}]}',
        '{"messages": [{"role": "user", "content": "a", "x": [-1e999]}]}',
    ):
        (row,) = read(line.encode())
        assert "messages holds a number beyond all that JSON can write" in str(row.error)
        assert row.prompt is None


def test_a_row_keeps_its_own_name_if_it_is_one() -> None:
    for value in ("a", "é" * 512, 0, -5, 10**30):
        (row,) = read(json.dumps({"id": value, "prompt": "x"}).encode())
        assert (row.id, row.error) == (value, None)
    wrong: list[object] = ["", "x" * 513, 1.5, True, [], {"a": 1}]
    for bad in wrong:
        (row,) = read(json.dumps({"id": bad, "prompt": "x"}).encode())
        assert row.id is None
        assert "line 1: id must be a whole number, or a text of 1 to 512 characters" in str(
            row.error
        )
    (row,) = read(b'{"id": "kept", "prompt": "x", "nonsense": 1}')
    assert (row.id, row.error is None) == ("kept", False)


def test_a_row_keeps_the_options_it_sets_and_null_counts_as_left_out() -> None:
    (row,) = read(b'{"prompt": "a", "max_tokens": 3, "top_p": null, "seed": 7, "messages": null}')
    assert row.error is None
    assert (row.prompt, row.options) == ("a", {"max_tokens": 3, "seed": 7})


def test_messages_are_kept_as_they_are_written() -> None:
    (row,) = read('{"messages": [{"role": "user", "content": "é", "name": "x"}]}'.encode())
    assert row.prompt == [{"role": "user", "content": "é", "name": "x"}]
    assert row.error is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["line 1 is not a JSON row", "column 2"]),
        ("[1]", ["must be an object, not list"]),
        ('{"prompt": NaN}', ["NaN is not a JSON number"]),
        ('{"prompt": "a", "prompt": "b"}', ["'prompt' comes twice"]),
        ('{"top_k": 1' + "0" * 5000 + "}", ["line 1 is not a JSON row"]),
        ('{"messages": ' + "[" * 100_000, ["nested too deeply"]),
        ("{}", ["has no prompt"]),
        ('{"max_tokens": 4}', ["has no prompt"]),
        ('{"prompt": "", "messages": []}', ["has both prompt and messages"]),
        ('{"prompt": 5}', ["prompt must be text, not 5"]),
        ('{"prompt": ["a"]}', ["prompt must be text"]),
        ('{"messages": "hi"}', ["messages must be a list, not 'hi'"]),
        ('{"prompt": "a", "max_new_tokens": 5}', ["unknown key 'max_new_tokens'", "max_tokens"]),
        ('{"prompt": "a", "\\ud800": 5}', ["unknown key '\\ud800'"]),
        ('{"prompt": "half \\ud83d"}', ["half of a surrogate pair"]),
        ('{"messages": [{"role": "user", "content": "\\udc00"}]}', ["half of a surrogate pair"]),
        (
            '{"messages": ' + "[" * (MAX_NESTING + 2) + "]" * (MAX_NESTING + 2) + "}",
            [f"nested over {MAX_NESTING} levels"],
        ),
    ],
)
def test_each_malformed_line_says_what_is_wrong_with_it(line: str, words: list[str]) -> None:
    error = error_of(line)
    assert all(word in error for word in words), error
    assert "\n" not in error
    assert len(error) < 450
    error.encode()


def test_a_bad_line_leaves_the_others_alone() -> None:
    rows = read(b'{"prompt": "a"}\n{broken\n\n{"prompt": "b"}\n')
    assert [(row.index, row.prompt, row.error is None) for row in rows] == [
        (0, "a", True),
        (1, None, False),
        (2, "b", True),
    ]
