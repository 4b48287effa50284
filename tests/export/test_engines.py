"""``llama-export build --target tensorrt`` and ``llama-export engine``, as a user meets them."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from llama_export.cli import main
from llama_runtime.cli import cli
from llama_runtime.tensorrt import local_engine

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX isn't installed"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tensorrt") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", without_tensorrt)
        done = export("build", tiny_model, "--target", "tensorrt", "-o", output, "-q")
    assert done.exit_code == 0, done.output
    assert "no engine was built" in done.output
    return output


_find_spec = importlib.util.find_spec


def without_tensorrt(name: str, package: str | None = None) -> object:
    return None if name.startswith("tensorrt") else _find_spec(name, package)


def export(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def engines(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/llama-caravan/engines").glob("*/engine.plan"))


@needs_library
def test_a_bundle_and_its_engines_are_built_in_one_command(
    tiny_model: Path, tmp_path: Path
) -> None:
    sizes = ("--max-batch", 4, "--max-len", 100)
    options = ("--target", "tensorrt", "--for", "sm86,sm89", *sizes)
    done = export("build", tiny_model, *options, "-o", tmp_path / "b")
    assert done.exit_code == 0, done.output
    assert re.search(r"^engine for sm86: \d+ MB, tensorrt_rtx 1\.", done.output, re.M)
    assert len(engines(tmp_path)) == 2
    for plan in engines(tmp_path):
        assert plan.stat().st_mode & 0o777 == 0o600
        assert (plan.parent / "build.log").stat().st_size > 0


@needs_library
def test_an_engine_is_built_once_for_all_it_depends_on(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = export("engine", bundle, "--for", "sm80", "--max-batch", 2, "-q")
    assert first.exit_code == 0, first.output
    monkeypatch.delattr(local_engine, "build_engine")
    again = export("engine", bundle, "--for", "sm80", "--max-batch", 2, "-q")
    assert again.output == first.output
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for other in (("sm86", 2), ("sm80", 3)):
        done = export("engine", bundle, "--for", other[0], "--max-batch", other[1], "-q")
        assert done.exit_code == 0, done.output
    assert len(engines(tmp_path)) == 3


@needs_library
def test_other_weights_are_another_engine(bundle: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The graph of another model in the same shape is the same file."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name] * 2}, weights)
    other = tmp_path / "other"
    done = export("build", model, "--target", "tensorrt", "--for", "sm80", "-o", other, "-q")
    assert done.exit_code == 0, done.output
    assert (other / "decoder.onnx").read_bytes() == (bundle / "decoder.onnx").read_bytes()
    done = export("engine", bundle, "--for", "sm80", "-q")
    assert done.exit_code == 0, done.output
    assert len(engines(tmp_path)) == 2


@needs_library
def test_an_engine_that_was_altered_or_given_is_built_again(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build = ("engine", bundle, "--for", "sm80", "--max-batch", 2, "-q")
    export(*build)
    (plan,) = engines(tmp_path)
    whole = plan.read_bytes()
    given = bytearray(whole)
    given[100] ^= 1
    plan.write_bytes(given)
    done = export(*build)
    assert done.exit_code == 0, done.output
    assert "will be built again" in caplog.text
    assert plan.read_bytes() != given


@needs_library
def test_an_engine_from_elsewhere_is_taken_when_the_user_says_so(
    bundle: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "some.plan"
    elsewhere.write_bytes(b"who knows what")
    sizes = ("--for", "sm89", "--max-batch", 2)
    done = export("engine", bundle, *sizes, "--trust", elsewhere)
    assert done.exit_code == 0, done.output
    assert "taken from" in done.output
    (plan,) = engines(tmp_path)
    assert plan.read_bytes() == b"who knows what"
    several = export("engine", bundle, "--for", "sm86,sm89", "--trust", elsewhere)
    assert several.exit_code == 1
    assert "name it with --for" in several.output


@needs_library
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--for", "sm90"], "can't build for 'sm90': it has "),
        (["--for", ""], "can't build for '': it has "),
        (["--for", "sm86,current"], "current can't be combined"),
        (["--for", "current"], "there is no CUDA d"),
        (["--for", "sm86", "--max-batch", "0"], "max_batch must lie in 1 to 1024, not 0"),
        (["--for", "sm86", "--max-len", "100000"], "max_len must lie in 2 to "),
    ],
)
def test_what_can_not_be_built_is_refused_in_a_sentence(
    bundle: Path, tmp_path: Path, options: list[str], sentence: str
) -> None:
    done = export("engine", bundle, *options)
    assert done.exit_code == 1
    assert sentence in done.output
    assert done.output.count("\n") == 1
    assert not engines(tmp_path)


def test_targets_are_of_tensorrt_alone(tiny_model: Path, tmp_path: Path) -> None:
    for option in (["--for", "sm86"], ["--max-batch", "3"], ["--max-len", "64"]):
        done = export("build", tiny_model, "-o", tmp_path / "b", *option)
        assert done.exit_code == 2
        assert "--target tensorrt" in done.output
    assert not (tmp_path / "b").exists()


def test_without_a_library_it_says_which_extras_to_install(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", without_tensorrt)
    done = export("engine", bundle, "--for", "sm86")
    assert done.exit_code == 1
    assert "llama-caravan[tensorrt-rtx]" in done.output
    assert "pypi.nvidia.com" in done.output


def test_another_bundle_has_no_graph_for_it(tiny_bundle: Path) -> None:
    done = export("engine", tiny_bundle, "--for", "sm86")
    assert done.exit_code == 1
    assert "no graph in the dialect tensorrt" in done.output or "can't be found" in done.output


@pytest.mark.parametrize("command", ["generate", "plan"])
def test_it_needs_a_gpu_to_run(bundle: Path, command: str) -> None:
    words = ["a prompt", "--max-tokens", "4"] if command == "generate" else []
    done = CliRunner().invoke(cli, [command, *words, "--bundle", str(bundle)])
    assert done.exit_code != 0
    assert "CUDA" in done.output
    assert "Traceback" not in done.output
