"""Schemas that are made to do harm, and some that would be kept to in part only.

Those that may take the process with them run in one of their own; ``scripts/prove_structured`` has
them all, with their times.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llama_runtime.errors import RequestError
from llama_runtime.params import SamplingParams
from tests.hostile.measured import measured
from tests.structured.builders import INTEGER, TEXT, Schema
from tests.structured.walks import Walker

CASES = (
    "100,000 objects deep",
    "an enum of 100,000 texts",
    "a product of 30 unions",
    "a reference to itself",
    "minItems of a million",
    "a pattern that repeats a repetition",
    "a chain of 80 definitions 50 levels deep",
)
BROKEN: dict[str, Schema] = {
    "separators of one's own": {"x-guidance": {"item_separator": ";"}, "items": INTEGER},
    "a number that floats round": {"const": 2**53 + 1},
    "a number larger than floats": {"const": 10**400},
    "a reference to itself": {"$ref": "#"},
    "keys that may repeat, counted": {
        "type": "object",
        "additionalProperties": TEXT,
        "minProperties": 2,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_schema_takes_little(name: str, real_tokenizer: Path) -> None:
    program = [sys.executable, "-m", "tests.structured.compile_hostile"]
    run = measured([*program, str(real_tokenizer), name], limit_s=60)
    assert run.status == 0, run.said
    assert json.loads(run.out)["outcome"]
    assert run.peak_bytes < 2**30


@pytest.mark.parametrize("schema", BROKEN.values(), ids=BROKEN)
def test_what_would_be_kept_to_in_part_is_refused(schema: Schema, walker: Walker) -> None:
    constraint = SamplingParams(json_schema=schema).constraint
    assert constraint is not None
    with pytest.raises(RequestError):
        walker.compiler.prepare(constraint)
