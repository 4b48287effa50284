"""The command llama-export: what a person sees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from llama_decoder.tiny import tiny_config, write_huggingface
from llama_export.cli import main
from llama_export.stages import Stages
from llama_runtime import __version__
from llama_runtime.bundle import Graph, open_bundle


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_build_then_verify(tiny_model: Path, tmp_path: Path) -> None:
    code, out, err = run("build", tiny_model, "-o", tmp_path / "b")
    assert code == 0
    assert "verified" in out
    for stage in ("stream weights", "trace decoder", "verify"):
        assert stage in err
    code, out, _ = run("verify", tmp_path / "b", "--model", tiny_model, "--quiet")
    assert code == 0
    assert "55 rows" in out


def test_inspect_shows_the_model(tiny_model: Path) -> None:
    code, out, _ = run("inspect", tiny_model)
    assert code == 0
    assert "safetensors" in out
    assert "<unk>" not in out


@pytest.mark.parametrize("command", [[], ["build"], ["verify"], ["engine"], ["inspect"]], ids=str)
def test_help_reads(command: list[str]) -> None:
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert "Usage:" in out
    assert "\\b" not in out
    _, _, shown = out.replace("Examples:", "Example:").partition("Example:\n")
    examples = shown.strip("\n").splitlines()
    assert bool(examples) == bool(command)
    assert all(line.startswith(f"    llama-export {command[0]} ") for line in examples)


def test_version_says_caravan() -> None:
    assert run("--version")[1] == f"Caravan {__version__} (llama-export)\n"


def test_a_bundle_for_cuda_is_built_here_and_says_it_was_not_run(
    tiny_model: Path, tmp_path: Path
) -> None:
    arguments = ("--target", "cuda", "--precision", "int4")
    code, out, err = run("build", tiny_model, "-o", tmp_path / "b", *arguments)
    assert code == 0
    assert "int4, not run here" in out
    assert "the graph has not been run: llama-export verify" in err
    code, out, _ = run("verify", tmp_path / "b", "--model", tiny_model, "--quiet")
    assert code == 0
    assert "logits of the weights in int4 differ" in out
    assert "not been run here" in out


@pytest.mark.parametrize(
    "arguments",
    [("--precision", "fp16"), ("--target", "cuda", "--precision", "fp32")],
    ids=" ".join,
)
def test_a_precision_that_the_target_lacks_is_wrong_use(
    arguments: tuple[str, ...], tiny_model: Path, tmp_path: Path
) -> None:
    code, _, err = run("build", tiny_model, "-o", tmp_path / "b", *arguments)
    assert code == 2
    assert "Usage:" in err
    assert "cpu takes fp32 or int8 or int4; cuda takes fp16 or bf16 or int4" in err
    assert not (tmp_path / "b").exists()


def test_an_fp8_cache_is_named_beside_the_precision(tiny_model: Path, tmp_path: Path) -> None:
    """And verify, which goes by that name, takes the bundle."""
    vocab_size = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    for precision in ("fp16", "bf16"):
        model, made = tmp_path / f"model_{precision}", tmp_path / precision
        shutil.copytree(tiny_model, model)
        write_huggingface(tiny_config(head_dim=64, vocab_size=vocab_size), model, 0)
        arguments = ("--target", "cuda", "--precision", precision, "--kv-cache", "fp8")
        code, out, err = run("build", model, "-o", made, *arguments)
        assert (code, out.endswith(f", {precision}+fp8kv, not run here\n")) == (0, True), err
        manifest = open_bundle(made, verify="full").manifest
        assert manifest.graphs[0] == Graph("paged", f"{precision}+fp8kv", "decoder.onnx")
        assert f"cuda), {precision}+fp8kv" in (made / "README.md").read_text()
        code, out, _ = run("verify", made, "--model", model, "--quiet")
        assert code == 0
        assert f"logits of the weights in {precision} differ" in out


def test_an_fp8_cache_is_not_for_every_model(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ("--target", "cuda", "--kv-cache", "fp8", "-q")
    code, _, err = run("build", tiny_model, "-o", tmp_path / "b", *arguments)
    assert code == 1
    assert "head dimension of 32, and an fp8 cache needs 64, 128 or 256" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("target", [(), ("--target", "cpu")], ids=["default", "cpu"])
def test_an_fp8_cache_for_the_cpu_is_wrong_use(
    target: tuple[str, ...], tiny_model: Path, tmp_path: Path
) -> None:
    code, _, err = run("build", tiny_model, "-o", tmp_path / "b", *target, "--kv-cache", "fp8")
    assert code == 2
    assert "Usage:" in err
    assert "cpu takes same or int8; cuda takes same or fp8" in err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("value", ["7", "random", "random:", "random:-1", f"random:{9**30}", "x:1"])
def test_weights_are_random_and_a_seed_or_wrong_use(value: str, tmp_path: Path) -> None:
    code, _, err = run("build", "Llama-3.2-1B", "-o", tmp_path / "b", "--weights", value)
    assert code == 2
    assert "--weights" in err


@pytest.mark.parametrize("model", [(), ("Llama-9",)], ids=["none", "unknown"])
def test_random_weights_without_a_known_shape_list_the_shapes(
    model: tuple[str, ...], tmp_path: Path
) -> None:
    code, _, err = run("build", *model, "-o", tmp_path / "b", "--weights", "random:0", "-q")
    assert code == 1
    assert "SmolLM2-135M" in err
    assert err.count("\n") == 1


def not_a_llama(directory: Path) -> Path:
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return directory


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda d: d / "absent", "absent"),
        (lambda d: d, "has no config.json"),
        (not_a_llama, "gpt2"),
        (lambda _: Path(__file__), "neither a .gguf file nor a directory"),
    ],
    ids=["missing", "empty directory", "not a Llama", "a text file"],
)
def test_wrong_model_is_one_sentence(model: object, sentence: str, tmp_path: Path) -> None:
    code, _, err = run("build", model(tmp_path), "-o", tmp_path / "out", "-q")  # type: ignore[operator]
    assert code == 1
    assert err.startswith("Error: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_made_is_one_sentence(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code, _, err = run("build", tiny_model, "-o", tmp_path / "file" / "out", "-q")
    assert code == 1
    assert err.startswith("Error: ")
    assert err.count("\n") == 1


def test_without_model_it_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLAMA_EXPORT_MODEL", raising=False)
    code, _, err = run("build")
    assert code == 1
    assert "scripts/fetch_model.py" in err


def test_without_the_export_extra_it_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_export.cli.EXPORT_PACKAGES", ("not_there_at_all",))
    code, _, err = run("build")
    assert code == 1
    assert "pip install 'llama-caravan[export]'" in err


class Terminal:
    """A stream that claims to be a terminal and keeps what it gets."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_bar_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr("llama_export.stages.REDRAW_S", 0.0)
    terminal = Terminal()
    with Stages(terminal)("stream weights", 10) as advance:  # type: ignore[arg-type]
        advance(5)
    drawn = terminal.text.replace("\x1b[K", "").replace("\n", "\r").split("\r")
    assert max(map(len, drawn)) < 30
    assert any("█" in line for line in drawn)
    assert drawn[-2].endswith(" s")
