"""What the pages take for granted: a checkpoint at home, its bundle, and files of prompts."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.docs.pages import ROOT
from tests.shared import Shared
from tests.tiny_model import byte_level_tokenizer, write_tiny_model

MODEL = "models/Llama-3.2-1B-Instruct"  # at home
MAX_POSITIONS = 4096
ENDS = 32  # so many end tokens that an answer of random weights has some ten tokens


def _build(folder: Path) -> None:
    """A home with a tiny checkpoint, and what the README's first command makes of it."""
    from llama_decoder.tiny import tiny_config, write_huggingface
    from llama_export.cli import main

    model = folder / MODEL
    model.mkdir(parents=True)
    write_tiny_model(model)
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens([f"<end {number}>" for number in range(ENDS)])
    tokenizer.save(str(model / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    write_huggingface(tiny_config(max_positions=MAX_POSITIONS, vocab_size=size), model, seed=0)
    config = json.loads((model / "config.json").read_text())
    config["eos_token_id"] = list(range(size - ENDS, size))
    (model / "config.json").write_text(json.dumps(config))
    # With --quality there is something for llama-run eval.
    args = ["build", str(model), "--quality", "--output", str(folder / "bundle")]
    result = CliRunner().invoke(main, args, prog_name="llama-export")
    assert result.exit_code == 0, result.output
    (folder / "said.txt").write_text(result.output.replace(f"{folder}/", ""))


@pytest.fixture(scope="session")
def home(shared: Shared) -> Path:
    """Read it only: ``MODEL``, ``bundle``, and what its build said in ``said.txt``."""
    return shared("docs-home", _build)


@pytest.fixture
def desk(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a page's commands run in, which is the current one."""
    place = tmp_path / "desk"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", os.fspath(home))
    monkeypatch.delenv("LLAMA_RUN_BUNDLE", raising=False)
    (place / "bundle").symlink_to(home / "bundle")
    (place / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "prompts.txt", place / "examples")
    (place / "prompts.txt").write_text("Why is the sky blue?\nWho was Ada Lovelace?\n")
    (place / "questions.txt").write_text("Why?\n/stats\nWhy not?\n")
    (place / "engine.plan").touch()
    (place / "talk.json").write_text('{"messages": [{"role": "user", "content": "Hello"}]}')
    rows = [{"id": str(i), "prompt": f"Row {i}", "max_tokens": 8} for i in range(3)]
    (place / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (place / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    body = {
        "model": Path(MODEL).name,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 4,
    }
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    for path in (place / "requests.jsonl.gz", place / "logs" / "day.gz"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(f"{json.dumps(line)}\n".encode()))
    return place
