"""The manifest: what it says is read back, and a wrong field is one sentence with its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_runtime.contract import Geometry
from llama_runtime.errors import BundleError
from llama_runtime.manifest import (
    SCHEMA_VERSION,
    FileEntry,
    Graph,
    Licence,
    Manifest,
    Source,
)

Content = dict[str, Any]

NAMES = ("LICENSE", "README.md", "decoder.onnx", "generation_config.json", "tokenizer.json")
MANIFEST = Manifest(
    name="tiny",
    created_by={"llama-caravan": "0.1.0", "torch": "2.13"},
    source=Source("gguf", "tiny.gguf", "0" * 64),
    licence=Licence("apache-2.0", ("LICENSE",)),
    geometry=Geometry(
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        hidden_size=32,
        intermediate_size=64,
        vocab_size=100,
        max_positions=128,
    ),
    graphs=(Graph("slots", "fp32", "decoder.onnx"),),
    special_tokens={"bos_token": "<s>"},
    verification={"max_logit_difference": 1e-5, "prompts": [1, {"é": None}]},
    files={name: FileEntry(3, "a" * 64) for name in NAMES},
)


def refused(data: bytes, *words: str) -> None:
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(data)
    message = str(caught.value)
    assert "\n" not in message
    for word in ("manifest.json", *words):
        assert word in message


def edited(change: Callable[[Content], object]) -> bytes:
    """The manifest after somebody's edit."""
    content = json.loads(MANIFEST.to_json())
    change(content)
    return json.dumps(content).encode()


def put(*keys: str | int, value: object) -> Callable[[Content], None]:
    def change(manifest: Content) -> None:
        target: Any = manifest
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = value

    return change


def test_what_was_written_is_read_back() -> None:
    assert Manifest.from_json(MANIFEST.to_json().encode()) == MANIFEST


@pytest.mark.parametrize(
    "name",
    [
        "a.",
        "a ",
        "../x",
        "/x",
        "a//b",
        "a/./b",
        "a/../b",
        "..",
        ".",
        "",
        "a\\b",
        "C:x",
        "a\nb",
        "a\0b",
        "a/",
    ],
)
def test_names_that_leave_the_bundle_are_refused(name: str) -> None:
    data = edited(lambda m: m["files"].update({name: m["files"]["README.md"]}))
    refused(data, "not the name of a file inside the bundle")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"\x00\xff", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"schema": NaN}', "not JSON"),
        (b'{"schema": 1' + b"0" * 5_000 + b"}", "not JSON"),
        (b'{"schema": 1, "schema": 1}', "the key 'schema' comes twice"),
        (b'{"schema": {"a": 1, "a": 2}}', "the key 'a' comes twice"),
        ('{"schema": 1}'.encode("utf-16"), "not JSON"),
        (b'{"schema": 1, "name": "\\ud800"}', "half of a surrogate pair"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "nested over 32 levels"),
        (b"[]", "must be an object"),
        (b"{}", "has no 'schema'"),
    ],
)
def test_a_manifest_that_is_no_manifest_is_refused(content: bytes, words: str) -> None:
    refused(content, words)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (SCHEMA_VERSION + 1, "upgrade it, or rebuild the bundle with llama-export build"),
        (SCHEMA_VERSION - 1, "rebuild the bundle with llama-export build"),
        (True, "must be a whole number"),
        ("1", "must be a whole number"),
    ],
)
def test_another_schema_says_what_to_do(schema: object, words: str) -> None:
    refused(json.dumps({"schema": schema}).encode(), words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("extra", value=1), "unknown field 'extra'"),
        (put("geometry", "extra", value=1), "geometry has an unknown field 'extra'"),
        (lambda m: m.pop("licence"), "has no 'licence'"),
        (lambda m: m["geometry"].pop("head_dim"), "geometry has no 'head_dim'"),
        (put("name", value=1), "name must be text, not 1"),
        (put("name", value="a\x1b[2J"), "name must be text that prints on one line"),
        (put("source", "file", value="a\nb"), "file must be text that prints on one line"),
        (put("files", "readme.MD", value={"size": 3, "sha256": "a" * 64}), "are the same file"),
        (put("files", "Manifest.json", value={"size": 3, "sha256": "a" * 64}), "the same file"),
        (put("created_by", "torch", value=2.13), "created_by: torch must be text"),
        (put("source", "sha256", value="F" * 64), "sha256 must be 64 lower-case hexadecimal"),
        (put("licence", "name", value=[]), "licence: name must be text"),
        (put("licence", "files", value={}), "licence: files must be a list"),
        (put("licence", "files", value=["COPYING"]), "no COPYING among its files"),
        (put("geometry", value=[]), "geometry must be an object"),
        (put("geometry", "head_dim", value=10**9), "head_dim must be a whole number in 1..1000"),
        (put("geometry", "num_layers", value=0), "num_layers must be a whole number in 1.."),
        (put("geometry", "vocab_size", value=True), "vocab_size must be a whole number"),
        (put("geometry", "vocab_size", value=2.0), "vocab_size must be a whole number"),
        (put("geometry", "num_kv_heads", value=3), "4 query heads can't share 3"),
        (put("graphs", value=[]), "one graph for each of one or more dialects"),
        (put("graphs", 0, "file", value="other.onnx"), "no other.onnx among its files"),
        (put("graphs", 0, "file", value="../x"), "not the name of a file inside"),
        (lambda m: m["graphs"].append(m["graphs"][0]), "one graph for each"),
        (put("special_tokens", "bos_token", value=None), "bos_token must be text"),
        (put("verification", value=3), "verification must be an object"),
        (put("files", value=[]), "files must be an object"),
        (lambda m: m["files"].pop("tokenizer.json"), "no tokenizer.json among its files"),
        (put("files", "README.md", "size", value=-1), "size must be a whole number"),
        (put("files", "README.md", "size", value=10**30), "size must be a whole number"),
        (put("files", "README.md", "sha256", value="x"), "sha256 must be 64"),
        (put("files", "README.md", value=None), "README.md must be an object"),
    ],
)
def test_a_wrong_field_is_named(change: Callable[[Content], object], words: str) -> None:
    refused(edited(change), words)


@settings(deadline=None)
@given(data=st.data())
def test_a_damaged_manifest_is_refused_or_harmless(data: st.DataObject) -> None:
    content = bytearray(MANIFEST.to_json().encode())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content) - 1))
        stop = data.draw(st.integers(start, min(start + 30, len(content))))
        content[start:stop] = data.draw(st.binary(max_size=4))
    try:
        manifest = Manifest.from_json(bytes(content))
    except BundleError:
        return
    assert Manifest.from_json(manifest.to_json().encode()) == manifest
