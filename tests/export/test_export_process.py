"""``llama-export`` in a process of its own: pipes that close, disks that are full or read-only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_export import output_folder
from llama_export.build import build_bundle
from llama_export.bundle_checks import verify_bundle
from llama_export.errors import ExportError
from llama_export.output_folder import new_directory
from llama_runtime.bundle import open_bundle

if sys.platform != "linux":
    pytest.skip("mounts and devices of Linux", allow_module_level=True)


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llama_export", *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, **options)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KB, which the bundle doesn't fit into."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system can't be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def test_a_pipe_that_is_closed_is_quiet(tiny_model: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    for arguments, status in (("--help",), 1), (("inspect", tiny_model), 141):
        ended = run(*arguments, stdout=writing)
        assert (ended.returncode, ended.stderr) == (status, "")
    os.close(writing)


def test_a_standard_output_without_room_is_one_sentence(tiny_model: Path) -> None:
    with open("/dev/full", "wb") as full:
        for arguments in (("--help",), ("inspect", tiny_model)):
            ended = run(*arguments, stdout=full)
            assert ended.returncode == 1
            assert ended.stderr == (
                "Error: can't write to standard output: No space left on device\n"
            )


def test_a_full_and_a_read_only_disk_leave_what_was_there(
    small_disk: Path, tiny_model: Path, tiny_bundle: Path
) -> None:
    with pytest.raises(ExportError, match="bundle can't be written: No space left on device"):
        build_bundle(tiny_model, small_disk / "bundle")
    assert list(small_disk.iterdir()) == []
    remount(small_disk, "size=1200k")
    shutil.copytree(tiny_bundle, small_disk / "bundle")
    with pytest.raises(ExportError, match="No space left on device"):
        build_bundle(tiny_model, small_disk / "bundle", force=True)
    assert [path.name for path in small_disk.iterdir()] == ["bundle"]
    open_bundle(small_disk / "bundle", verify="full")
    remount(small_disk, "ro")
    for output in ("bundle", "other", "deep/er"):
        with pytest.raises(ExportError, match="can't be written: Read-only file system"):
            build_bundle(tiny_model, small_disk / output, force=True)
    assert verify_bundle(small_disk / "bundle", tiny_model).passed


def test_a_batch_on_a_full_disk_leaves_whole_lines(small_disk: Path, tiny_bundle: Path) -> None:
    prompts = small_disk.parent / "prompts.txt"
    prompts.write_text("".join(f"row {i} {'x' * 40}\n" for i in range(400)))
    remount(small_disk, "size=64k")
    command = ["llama_runtime", "batch", str(prompts), "-o", str(small_disk / "out.jsonl")]
    ended = subprocess.run(
        [sys.executable, "-m", *command, "--bundle", str(tiny_bundle), "--max-tokens", "20"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = (small_disk / "out.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["index"] for line in lines] == list(range(len(lines)))
    assert 0 < len(lines) < 400
    assert lines[-1].endswith("\n")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-2:] == [
        f"stopped: the results of {len(lines)} of 400 rows are in {small_disk / 'out.jsonl'}; "
        "the same command goes on",
        f"Error: can't write to {small_disk / 'out.jsonl'}: No space left on device",
    ]


def test_verifying_never_costs_the_bundle(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures that can't be recorded are lost, and nothing else is."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["verification"]["rows"] = 1
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with monkeypatch.context() as patch:
        patch.setattr("llama_export.bundle_checks.write_manifest", full)
        assert verify_bundle(bundle, tiny_model).passed
    assert open_bundle(bundle, verify="full").manifest.verification["rows"] == 1
    assert verify_bundle(bundle, tiny_model).passed
    assert open_bundle(bundle, verify="full").manifest.verification["rows"] == 55


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(output_folder, "_exchange", lambda *_: False)
    for text in ("first", "second"):
        with new_directory(tmp_path / "out") as folder:
            (folder / "file").write_text(text)
    with pytest.raises(ValueError, match="no"), new_directory(tmp_path / "out"):
        raise ValueError("no")
    assert (tmp_path / "out" / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_there_is_never_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two renames have a moment between them; an exchange has none."""
    with new_directory(tmp_path / "out") as folder:
        (folder / "file").write_text("first")
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("renamed"))
    with new_directory(tmp_path / "out") as folder:
        (folder / "file").write_text("second")
    assert (tmp_path / "out" / "file").read_text() == "second"


def test_a_model_that_the_runtime_would_refuse_is_not_built(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "generation_config.json").write_text('{"do_sample": true, "temperature": NaN}')
    with pytest.raises(ExportError, match="model can't be used: "):
        build_bundle(model, tmp_path / "out")
    (model / "generation_config.json").write_text('{"do_sample": true, "top_k": -1}')
    with pytest.raises(ExportError, match="top_k must lie in 0 to"):
        build_bundle(model, tmp_path / "out")
    (model / "generation_config.json").unlink()
    (model / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ExportError, match="the chat template can't be rendered by jinja2"):
        build_bundle(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
