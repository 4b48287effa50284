"""The bundle check: what was built opens, and anything else is one clear sentence."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_runtime import verified
from llama_runtime.bundle import describe_files, open_bundle, write_manifest
from llama_runtime.contract import Geometry
from llama_runtime.errors import BundleError, RequestError
from llama_runtime.manifest import Graph, Licence, Manifest, Source

FILES = {
    "decoder.onnx": b"graph",
    "model.safetensors": b"weights " * 100,
    "tokenizer.json": b"{}",
    "generation_config.json": b'{"eos_token_id": [1, 2]}',
    "chat_template.jinja": "{{ 'é' }}\r\n".encode(),
    "README.md": b"# A model",
    "licences/LICENSE": b"terms",
}
GEOMETRY = Geometry(2, 4, 2, 8, 32, 64, 100, 128)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("LOCALAPPDATA", str(folder))
    return folder / "llama-caravan" / "verified.json"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    root = tmp_path / "bundle"
    for name, data in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write_manifest(root, make_manifest(root))
    return root


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed, as it happens."""
    names: list[str] = []
    digest = hashlib.file_digest

    def record(file: Any, name: str) -> Any:
        names.append(Path(file.name).name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", record)
    return names


def make_manifest(root: Path) -> Manifest:
    return Manifest(
        name="tiny",
        created_by={"llama-caravan": "0.1.0", "torch": "2.13"},
        source=Source("gguf", "tiny.gguf", "0" * 64),
        licence=Licence("apache-2.0", ("licences/LICENSE",)),
        geometry=GEOMETRY,
        graphs=(Graph("slots", "fp32", "decoder.onnx"),),
        special_tokens={"bos_token": "<s>"},
        verification={"max_logit_difference": 1e-5, "prompts": [1, 2]},
        files=describe_files(root),
    )


def refused(root: Path, *words: str) -> None:
    with pytest.raises(BundleError) as caught:
        open_bundle(root)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_what_was_written_is_read_back(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.manifest == make_manifest(bundle)
    assert opened.path == bundle
    assert opened.graph_path("slots") == bundle / "decoder.onnx"
    assert opened.tokenizer_path == bundle / "tokenizer.json"
    assert opened.generation_config == {"eos_token_id": [1, 2]}
    assert opened.chat_template == "{{ 'é' }}\r\n"


def test_the_same_manifest_is_the_same_bytes(bundle: Path) -> None:
    before = (bundle / "manifest.json").read_bytes()
    manifest = make_manifest(bundle)
    shuffled = dataclasses.replace(manifest, files=dict(reversed(list(manifest.files.items()))))
    write_manifest(bundle, shuffled)
    assert (bundle / "manifest.json").read_bytes() == before
    assert sorted(describe_files(bundle)) == sorted(FILES)


def test_a_manifest_that_would_be_refused_is_never_written(bundle: Path) -> None:
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="not JSON"):
        write_manifest(
            bundle, dataclasses.replace(make_manifest(bundle), verification={"loss": float("nan")})
        )
    assert (bundle / "manifest.json").read_bytes() == before
    assert {path.name for path in bundle.iterdir()} == {"manifest.json", "licences"} | {
        name for name in FILES if "/" not in name
    }


def test_a_bundle_without_chat_template_has_none(bundle: Path) -> None:
    (bundle / "chat_template.jinja").unlink()
    write_manifest(bundle, make_manifest(bundle))
    assert open_bundle(bundle).chat_template is None


def test_a_dialect_that_was_not_built_is_refused_by_name(bundle: Path) -> None:
    with pytest.raises(
        BundleError, match=r"no graph in the dialect paged, only in slots: .*--target cuda"
    ):
        open_bundle(bundle).graph_path("paged")


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_generation_config_that_is_no_object_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / "generation_config.json").write_bytes(content)
    write_manifest(bundle, make_manifest(bundle))
    with pytest.raises(BundleError, match=r"generation_config\.json"):
        _ = open_bundle(bundle).generation_config


def test_a_place_that_is_no_bundle_says_what_builds_one(tmp_path: Path, bundle: Path) -> None:
    refused(tmp_path / "nowhere", "does not exist", "llama-export build")
    refused(bundle / "README.md", "is not a directory", "llama-export build")
    (bundle / "manifest.json").unlink()
    refused(bundle, "has no manifest.json", "llama-export build")


def test_a_path_that_can_be_none_is_refused() -> None:
    with pytest.raises(BundleError, match="zero byte"):
        open_bundle(Path("a\0b"))


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("tokenizer.json", 2**20 + 512 * 100),
        ("generation_config.json", 2**20),
        ("chat_template.jinja", 2**20),
    ],
)
def test_a_text_larger_than_it_needs_to_be_is_refused_before_it_is_read(
    bundle: Path, hashed: list[str], name: str, limit: int
) -> None:
    for size in (limit, limit + 1):
        os.truncate(bundle / name, size)
        content = json.loads((bundle / "manifest.json").read_text())
        content["files"][name]["size"] = size
        (bundle / "manifest.json").write_text(json.dumps(content))
        words = "sha256 is another" if size == limit else f"may have {limit:,} at most"
        hashed.clear()
        with pytest.raises(BundleError, match=words):
            open_bundle(bundle)
    assert hashed == []


def test_more_bytes_than_a_model_of_the_geometry_has_are_refused_before_they_are_hashed(
    bundle: Path, hashed: list[str]
) -> None:
    os.truncate(bundle / "model.safetensors", 10**12)  # sparse
    content = json.loads((bundle / "manifest.json").read_text())
    content["files"]["model.safetensors"]["size"] = 10**12
    (bundle / "manifest.json").write_text(json.dumps(content))
    refused(bundle, "1,000,000,", "a model of its geometry")
    assert hashed == []


def test_more_files_than_a_bundle_has_are_refused(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_runtime.bundle._MAX_ENTRIES", 8)
    refused(bundle, "holds more than 8 files")


def test_a_directory_behind_a_symbolic_link_opens(tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "link").symlink_to(bundle, target_is_directory=True)
    assert open_bundle(tmp_path / "link").path == bundle


def test_an_unreadable_file_is_a_sentence(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "decoder.onnx")

    monkeypatch.setattr(hashlib, "file_digest", denied)
    refused(bundle, "can't be read", "Permission denied", "decoder.onnx")


def test_missing_and_extra_files_are_named(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("")
    refused(bundle, "notes.txt", "remove")
    (bundle / "decoder.onnx").unlink()
    (bundle / "README.md").unlink()
    refused(bundle, "lacks README.md, decoder.onnx", "llama-export build")


def test_directories_beyond_the_listed_files_are_refused(bundle: Path) -> None:
    (bundle / "more").mkdir()
    refused(bundle, "more is an empty directory")
    (bundle / "more" / "file").write_text("")
    refused(bundle, "more/file")


@pytest.mark.parametrize("verify", ["full", None])
def test_an_altered_file_is_found_even_if_its_size_and_time_are_the_same(
    bundle: Path, verify: Any
) -> None:
    open_bundle(bundle)
    path = bundle / "model.safetensors"
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"w", b"W"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BundleError, match=r"model\.safetensors was altered, its sha256"):
        open_bundle(bundle, verify=verify)


@pytest.mark.parametrize("verify", ["full", "size", None])
def test_a_file_of_another_size_is_always_found(bundle: Path, verify: Any) -> None:
    (bundle / "model.safetensors").write_bytes(b"short")
    with pytest.raises(BundleError, match="altered, it has 5 bytes instead of 800"):
        open_bundle(bundle, verify=verify)


@pytest.mark.parametrize("name", ["manifest.json", "decoder.onnx", "licences/LICENSE"])
def test_links_are_refused(tmp_path: Path, bundle: Path, name: str) -> None:
    path, aside = bundle / name, tmp_path / "aside"
    path.rename(aside)
    path.symlink_to(aside)
    refused(bundle, Path(name).name, "symbolic link")
    path.unlink()
    path.hardlink_to(aside)
    refused(bundle, Path(name).name, "hard link")
    aside.unlink()
    open_bundle(bundle)


def test_a_linked_directory_is_refused(tmp_path: Path, bundle: Path) -> None:
    (bundle / "licences").rename(tmp_path / "aside")
    (bundle / "licences").symlink_to(tmp_path / "aside")
    refused(bundle, "licences", "symbolic link")


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes in directories")
@pytest.mark.parametrize("name", ["manifest.json", "decoder.onnx"])
def test_what_is_no_regular_file_is_refused_unopened(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    if sys.platform != "win32":
        os.mkfifo(bundle / name)
    refused(bundle, name, "not a regular file")


@pytest.mark.parametrize(
    ("content", "words"), [(b"{", "not JSON"), (b" " * (2**20 + 1), "1,048,577 bytes")]
)
def test_a_bad_manifest_is_refused_with_the_place_of_the_bundle(
    bundle: Path, content: bytes, words: str
) -> None:
    (bundle / "manifest.json").write_bytes(content)
    refused(bundle, str(bundle), "manifest.json", words)


def test_files_are_hashed_once_until_they_are_touched(bundle: Path, hashed: list[str]) -> None:
    names = sorted(Path(name).name for name in FILES)
    open_bundle(bundle)
    assert sorted(hashed) == names
    open_bundle(bundle)
    assert sorted(hashed) == names
    (bundle / "README.md").touch()
    open_bundle(bundle)
    assert sorted(hashed) == sorted(names * 2)


def test_full_always_hashes_and_size_never_does(bundle: Path, hashed: list[str]) -> None:
    open_bundle(bundle, verify="size")
    assert hashed == []
    for times in (1, 2):
        open_bundle(bundle, verify="full")
        assert len(hashed) == times * len(FILES)
    with pytest.raises(RequestError, match="verify is 'none'; it can be 'full' or 'size'"):
        open_bundle(bundle, verify="none")  # type: ignore[arg-type]


def test_another_manifest_or_place_is_hashed_again(bundle: Path, hashed: list[str]) -> None:
    open_bundle(bundle)
    write_manifest(bundle, dataclasses.replace(make_manifest(bundle), name="other"))
    hashed.clear()
    open_bundle(bundle)
    assert len(hashed) == len(FILES)
    open_bundle(bundle.rename(bundle.with_name("moved")))
    assert len(hashed) == 2 * len(FILES)
    assert verified.fingerprint(b"a", {}) != verified.fingerprint(b"b", {})


def test_checking_leaves_the_bundle_as_it_is(bundle: Path, cache: Path) -> None:
    before = sorted(bundle.rglob("*"))
    open_bundle(bundle)
    assert sorted(bundle.rglob("*")) == before
    assert list(json.loads(cache.read_text())) == [str(bundle)]
    assert os.listdir(cache.parent) == [cache.name]


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_a_damaged_cache_is_not_used(
    bundle: Path, cache: Path, hashed: list[str], content: bytes
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    open_bundle(bundle)
    open_bundle(bundle)
    assert len(hashed) == len(FILES)


def test_a_cache_that_cannot_be_written_is_not_used(
    bundle: Path, cache: Path, hashed: list[str]
) -> None:
    cache.parent.parent.write_text("a file where the directory should be")
    open_bundle(bundle)
    open_bundle(bundle)
    assert len(hashed) == 2 * len(FILES)


def test_the_cache_forgets_the_oldest_bundles(bundle: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(json.dumps({f"/{number}": "" for number in range(200)}))
    open_bundle(bundle)
    known = list(json.loads(cache.read_text()))
    assert len(known) == 100
    assert known[-1] == str(bundle)
    assert known[0] == "/101"
