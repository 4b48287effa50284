"""docs/architecture.md says what the code says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from llama_runtime.contract import (
    DIALECTS,
    SAMPLER_INPUTS,
    SAMPLER_OUTPUTS,
    Dialect,
    TensorSpec,
)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def between(start: str) -> str:
    match = re.search(rf"<!-- {start} -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    assert match is not None, f"docs/architecture.md has no part '{start}'"
    return match[1]


def row(spec: TensorSpec) -> str:
    name = spec.name.replace(".0.", ".{i}.")
    return f"| `{name}` | {spec.dtype} | [{', '.join(spec.axes)}] | {spec.meaning} |"


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda d: d.name)
def test_contract_table_is_the_contract_module(dialect: Dialect) -> None:
    specs = (*dialect.inputs, *dialect.cache_inputs(1), dialect.logits, *dialect.cache_outputs(1))
    rows = between(f"contract: {dialect.name}").splitlines()[2:]
    assert rows == [row(spec) for spec in specs]


def test_sampler_table_is_the_contract_module() -> None:
    rows = between("contract: sampler").splitlines()[2:]
    assert rows == [row(spec) for spec in (*SAMPLER_INPUTS, *SAMPLER_OUTPUTS)]


def test_layers_are_those_that_import_linter_enforces() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = config["tool"]["importlinter"]["contracts"]
    (layers,) = (c["layers"] for c in contracts if c["type"] == "layers")
    named = [line.replace("llama_runtime.", "") for line in layers]
    assert between("layers").strip().strip("`").split("\n")[1:-1] == named[: named.index("params")]


def test_the_table_of_laws_names_every_file_of_laws_and_every_proof() -> None:
    table = PAGE.partition("\n## Laws\n")[2]
    files = [*(ROOT / "tests" / "laws").glob("test_*.py"), *(ROOT / "scripts").glob("prove_*")]
    names = {str(path.relative_to(ROOT)) for path in files}
    missing = names - set(re.findall(r"`([\w/.]+)`", table))
    assert missing == {"tests/laws/test_shared.py"}, "a law for the tests themselves"


def test_every_file_the_page_names_exists() -> None:
    for path in re.findall(r"`((?:tests|scripts|docs)/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
