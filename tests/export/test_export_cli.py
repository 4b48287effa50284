"""The command llama-export: what a person sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from llama_export.cli import main
from llama_export.stages import Stages
from llama_runtime import __version__


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


@pytest.mark.parametrize("command", [[], ["build"], ["verify"], ["inspect"]], ids=str)
def test_help_reads(command: list[str]) -> None:
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert "Usage:" in out


def test_version_says_caravan() -> None:
    assert run("--version")[1] == f"Caravan {__version__} (llama-export)\n"


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
