"""CONTRIBUTING.md names files that are there, and names in them that are."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

PAGE = ROOT / "CONTRIBUTING.md"
TEXT = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
FOLDERS = ("models", "export", "runtime", "tests", "scripts", "docs", "deploy", "examples")
PATH = re.compile(rf"\b(?:{'|'.join(FOLDERS)})/[\w./]*\w(?=[`\s,;:)])")
PATHS = sorted({match[0] for match in PATH.finditer(TEXT)})
SECTIONS = dict(re.findall(r"^## (.*)\n((?:(?!^## ).*\n)*)", TEXT, re.MULTILINE))
# Names that the page puts beside a file, and the file.
NAMES = {
    "WITHOUT_EFFECT": "runtime/llama_runtime/openai_api/parsing.py",
    "ATTENTIONS": "export/llama_export/trace.py",
    "TARGETS": "export/llama_export/precision.py",
    "DIALECTS": "runtime/llama_runtime/contract.py",
    "Dialect": "runtime/llama_runtime/contract.py",
    "Reference": "runtime/llama_runtime/sampling.py",
    "Backend": "runtime/llama_runtime/backends/base.py",
    "Runner": "runtime/llama_runtime/backends/base.py",
    "PASSES": "export/llama_export/passes.py",
    "__post_init__": "runtime/llama_runtime/params.py",
    "filtered": "runtime/llama_runtime/params.py",
    "penalized": "runtime/llama_runtime/params.py",
    "prove_resume": "scripts/prove_resume",
    "prove_sampling": "scripts/prove_sampling",
}
WORDS = {"mypy", "transformers", "onnx", "openai", "deploy", "runtime"}  # of no file


@pytest.mark.parametrize("path", PATHS)
def test_every_file_that_it_names_is_there(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_in_the_file_that_has_it(name: str) -> None:
    assert f"`{name}`" in TEXT
    path = ROOT / NAMES[name]
    if path.suffix:
        text = path.read_text(encoding="utf-8")
        assert re.search(rf"^(?:class {name}\b|{name} = |{name}: |    def {name}\()", text, re.M)


def test_no_name_stands_there_that_nobody_looks_up() -> None:
    spans = {match[1] for match in re.finditer(r"`(\w+)`", TEXT)}
    assert spans <= NAMES.keys() | WORDS


def test_each_recipe_is_a_list_of_files_and_the_tests_that_complain() -> None:
    recipes = [name for name in SECTIONS if name.startswith(("A ", "An "))]
    assert len(recipes) == 5
    for name in recipes:
        steps = re.findall(r"^(\d+)\. ", SECTIONS[name], re.MULTILINE)
        assert all(int(after) == int(before) + 1 for before, after in pairwise(steps)), name
        assert len(steps) >= 3, name
        complaint = SECTIONS[name].partition("\nComplain")[2]
        assert re.search(r"`tests/[\w/]+\.py`", complaint), name


def test_there_are_five_commands_and_each_is_a_script() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", SECTIONS["Five commands"], re.MULTILINE)
    assert len(rows) == 5
    for row in rows:
        assert Path(ROOT / row.split()[0]).stat().st_mode & 0o100


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 120
