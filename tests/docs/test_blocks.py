"""Every block of code in README.md and docs/ is run, or checked as far as that is quick.

A comment before a block, ``<!-- test: ... -->``, says what a test should know: ``app``, the block
makes an application that is asked a few things; ``skip, REASON`` with a reason of ``SKIPPED``.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.applications import Starlette
from starlette.testclient import TestClient

from llama_runtime import AsyncLLM
from llama_runtime.cli import cli as llama_run
from llama_runtime.server import ServerSettings, create_app
from tests.docs import shell
from tests.docs.pages import PAGES, Block, read

LANGUAGES = {"python", "sh", "console", "json", "yaml", "text"}
SKIPPED: dict[str, int] = {}  # how many blocks may be skipped for which reason
UNNAMED = {"docs/architecture.md": 1}  # blocks that other tests compare with the code
BLOCKS = [block for path in PAGES for block in read(path).blocks]


def of(*languages: str) -> pytest.MarkDecorator:
    found = [
        block
        for block in BLOCKS
        if block.language in languages and not block.marker.startswith("skip")
    ]
    return pytest.mark.parametrize("block", found, ids=[block.where for block in found])


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    unknown = Counter(
        block.where.partition(":")[0] for block in BLOCKS if block.language not in LANGUAGES
    )
    assert unknown == UNNAMED


def test_few_blocks_are_skipped_and_each_for_a_reason_of_the_list() -> None:
    markers = Counter(block.marker for block in BLOCKS if block.marker)
    app = markers.pop("app")
    assert app == 1
    assert markers == {f"skip, {reason}": count for reason, count in SKIPPED.items()}


@of("python")
def test_python(block: Block, desk: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    code = compile("\n" * (block.line - 1) + block.text, block.page, "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
        if block.marker == "app":
            ask_the_app(names["app"])
        else:
            assert printed.getvalue().strip(), "a block that shows nothing teaches nothing"


def ask_the_app(app: Starlette) -> None:
    with TestClient(app) as client:
        assert client.get("/llm/v1/models").json()["data"][0]["id"] == "llama"
        body = {"model": "llama", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
        answer = client.post("/llm/v1/chat/completions", json=body).json()
        assert answer["usage"]["completion_tokens"] <= 3
        assert client.get("/title", params={"about": "llamas"}).status_code == 200


@pytest.fixture(scope="module")
def client(home: Path) -> Iterator[TestClient]:
    """Of the server that ``llama-run serve --served-model-name llama`` would be."""
    llm = AsyncLLM(home / "bundle", max_batch=2, max_len=256)
    with TestClient(create_app(llm, ServerSettings(model_names=("llama",)))) as client:
        yield client
    asyncio.run(llm.close())


@of("sh")
def test_shell(block: Block, desk: Path, client: TestClient) -> None:
    for command in shell.commands(block.text):
        shell.check(command)
        if command.program == "curl":
            shell.ask(command, client)
        elif command.program in shell.PROGRAMS and shell.unrun_because(command) is None:
            result = shell.run(command)
            assert result.exit_code == 0, result.output


@of("json")
def test_json(block: Block) -> None:
    json.loads(block.text)


@of("yaml")
def test_yaml(block: Block) -> None:
    yaml.safe_load(block.text)


@of("console")
def test_console(block: Block, desk: Path, home: Path) -> None:
    """What a transcript shows is what the command says today, but for numbers and names."""
    _, *parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    for part in parts:
        line, _, shown = part.partition("\n")
        (command,) = shell.commands(line)
        shell.check(command)
        if command.program == "llama-export":
            said = (home / "said.txt").read_text()
        elif command.program == "llama-run":
            messages = "".join(re.findall(r"^> (.*\n)", shown, re.MULTILINE))
            # Answers that are drawn, yet the same in every run, and never of one token only.
            settled = f"/set seed 1\n/set min_tokens 4\n{messages}" if messages else None
            result = shell.run(command, settled)
            assert result.exit_code == 0, result.output
            said = result.output
            if messages:
                shown = "".join(
                    re.findall(r"^> /(?:set|undo|stats|save).*\n((?:[^>\n].*\n?)+)", shown, re.M)
                )
                assert shown
        else:
            continue
        left = iter(shape(said))
        for expected in shape(shown.partition("\n[")[0]):
            assert expected in left, f"not said, or not there:\n{expected}\n---\n{said}"


def shape(text: str) -> list[str]:
    """Lines without what differs from model to model and machine to machine."""
    text = re.sub(
        r"^(\w+: |)(?:Smollm2[\w ]*Ep2|Llama-3.2-1B-Instruct)(?=[:,])", r"\1MODEL", text, flags=re.M
    )
    text = re.sub(r"\b\d[\d,.]*", "0", text)
    text = re.sub(r"(?<=MB  )(?:this machine|container|ulimit -v)$", "here", text, flags=re.M)
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def test_examples_of_help_are_commands_that_it_explains(desk: Path) -> None:
    for program, group in shell.PROGRAMS.items():
        for name, command in group.commands.items():
            _, _, examples = (command.epilog or "").partition("\n")
            lines = [line for line in examples.splitlines()[1:] if line.strip()]
            assert lines or name in ("inspect", "verify"), f"{program} {name} has no example"
            for found in shell.commands("\n".join(lines)):
                shell.check(found)


def test_the_programs_of_the_pages_are_those_that_are_checked() -> None:
    assert llama_run in shell.PROGRAMS.values()
    with pytest.raises(ValueError, match=r"[Nn]o such option"):
        shell.check(shell.commands("llama-run batch rows.jsonl --max-token 3")[0])
    with pytest.raises(ValueError, match="has no command"):
        shell.check(shell.commands("llama-run complete x")[0])
    with pytest.raises(ValueError, match="has no --round:"):
        shell.check(shell.commands("scripts/bench_gpu --round 3")[0])
    with pytest.raises(ValueError, match="no extra"):
        shell.check(shell.commands("pip install 'llama-caravan[cpus]'")[0])
