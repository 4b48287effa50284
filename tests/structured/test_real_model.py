"""The real model keeps to schemas, and its neighbours don't notice; a slice of prove_structured."""

from __future__ import annotations

from pathlib import Path

from llama_runtime.llm import LLM
from tests.structured.answers import ask
from tests.structured.schemas import SCHEMAS

MAX_TOKENS = 24
NAMES = (  # of every kind, and short
    "label",
    "yes or no",
    "mark",
    "label in an object",
    "refund request",
    "editor settings",
    "feature flags",
    "no arguments",
    "get_weather",
    "set_thermostat",
    "linked list",
    "expression by arrays",
    "types with rules for each",
    "nullable by enum",
    "a text of format date",
    "a colour",
    "a semantic version",
    "a number of -2.5 to 7.25",
    "a multiple of 7",
    "a pair",
    "an enum of lists",
    "an enum of 500",
    "draft 7 with a tuple",
    "draft 4 with exclusive flags",
)


def test_answers_are_valid_and_neighbours_unchanged(real_bundle: Path) -> None:
    schemas = {name: SCHEMAS[name] for name in NAMES}
    with LLM(real_bundle, max_batch=16, max_len=128) as llm:
        answers = ask(llm, schemas, [0.8], MAX_TOKENS)
    assert answers.complaints == []
    assert answers.finished > len(schemas) / 3
