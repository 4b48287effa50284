"""Which rules of a schema are refused or rewritten before a grammar is made of it."""

from __future__ import annotations

import json
from contextlib import suppress
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_runtime.schema_rules import EXACT, BrokenRuleError, kept_schema

Schema = dict[str, Any]

TEXT, WHOLE, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
BIG = EXACT + 1


def tagged(**rule: Any) -> Schema:
    return {"type": "object", "properties": {"kind": rule, "x": TEXT}, "required": ["kind"]}


APART: dict[str, list[Any]] = {
    "types": [TEXT, {"type": ["integer", "null"]}, {"type": "array"}],
    "tags": [tagged(const="a"), tagged(const="b"), tagged(enum=["c", "d"])],
    "numbers": [tagged(const=1), tagged(const=2)],
    "a truth and a one": [tagged(const=1), tagged(const=True)],
    "references": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b~1c"}, {"$ref": "#/$defs/on"}],
}
TOGETHER: dict[str, list[Any]] = {
    "the same type": [TEXT, {"type": "string", "maxLength": 3}],
    "whole numbers are numbers": [WHOLE, NUMBER],
    "a type that isn't named": [{"const": "a"}, {"const": "b"}],
    "open types": [tagged(const="a"), {**tagged(const="b"), "type": ["object", "null"]}],
    "no type": [{k: v for k, v in tagged(const=t).items() if k != "type"} for t in "ab"],
    "tags that meet": [tagged(enum=["a", "b"]), tagged(enum=["b", "c"])],
    "a tag that isn't needed": [tagged(const="a"), {**tagged(const="b"), "required": ["x"]}],
    "a tag that is any text": [tagged(const="a"), tagged(type="string")],
    "floats": [tagged(const=1.0), tagged(const=1)],
    "one of three": [TEXT, WHOLE, {"type": "string"}],
    "a reference to nothing": [{"$ref": "#/$defs/none"}, TEXT],
    "a circle": [{"$ref": "#/$defs/round"}, TEXT],
    "a reference with a rule beside it": [{"$ref": "#/$defs/a", "maxProperties": 1}, TEXT],
    "anything": [True, TEXT],
}
DEFINITIONS = {
    "a": tagged(const="a"),
    "b/c": tagged(const="b"),
    "on": {"$ref": "#/$defs/on2"},
    "on2": TEXT,
    "round": {"$ref": "#/$defs/round"},
}


@pytest.mark.parametrize("branches", APART.values(), ids=APART)
def test_branches_that_exclude_each_other_become_anyof(branches: list[Any]) -> None:
    schema = {"oneOf": branches, "$defs": DEFINITIONS, "discriminator": {"propertyName": "kind"}}
    kept = kept_schema({"type": "object", "properties": {"deep": schema}, **schema})
    for found in (kept, kept["properties"]["deep"]):
        assert found["anyOf"] == branches
        assert not {"oneOf", "discriminator"} & found.keys()


@pytest.mark.parametrize("branches", TOGETHER.values(), ids=TOGETHER)
def test_others_stay_as_they_are(branches: list[Any]) -> None:
    schema = {"oneOf": branches, "$defs": DEFINITIONS}
    assert kept_schema(schema) == schema
    assert kept_schema({**schema, "oneOf": branches[::-1]})["oneOf"] == branches[::-1]


def test_a_union_beside_another_stays() -> None:
    schema = {"oneOf": APART["types"], "anyOf": [TEXT, WHOLE]}
    assert kept_schema(schema) == schema


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"x-guidance": {"item_separator": ";"}}, "x-guidance"),
        ({"const": BIG}, "const.*2\\^53"),
        ({"const": {"a": [1, -BIG]}}, "const"),
        ({"enum": [1, 10**400]}, "enum"),
        ({"minimum": -BIG}, "minimum"),
        ({"exclusiveMaximum": 1e300}, "exclusiveMaximum"),
        ({"minProperties": 2}, "minProperties 2"),
        ({"minProperties": 3, "required": ["a", "b"]}, "minProperties 3"),
    ],
)
def test_what_would_be_kept_in_part_is_refused_wherever_it_is(rule: Schema, said: str) -> None:
    places: list[Schema] = [
        rule,
        {"properties": {"a": rule}},
        {"patternProperties": {"a": {"items": rule}}},
        {"items": [TEXT, rule]},
        {"prefixItems": [rule]},
        {"additionalProperties": rule},
        {"anyOf": [TEXT, {"allOf": [rule]}]},
        {"$defs": {"a": {"definitions": {"b": rule}}}},
    ]
    for schema in places:
        with pytest.raises(BrokenRuleError, match=said):
            kept_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"const": EXACT, "enum": [-EXACT, "9" * 400, True, None, 0.5]},
        {"properties": {"x-guidance": TEXT, "minProperties": TEXT, "const": WHOLE}},
        {"default": {"x-guidance": 1, "const": BIG}, "examples": [{"minProperties": 5}]},
        {"enum": [{"x-guidance": 1, "minProperties": 7, "oneOf": [TEXT, WHOLE]}]},
        {"minProperties": 1},
        {"minProperties": 2, "required": ["a", "b"]},
        {"minProperties": 2, "additionalProperties": False},
        {"items": True, "additionalProperties": False, "properties": {"a": True}},
        {"allOf": "no list", "properties": ["no", "map"], "minProperties": "many", "type": "what"},
    ],
)
def test_all_else_passes_and_nothing_is_changed(schema: Schema) -> None:
    before = deepcopy(schema)
    assert kept_schema(schema) == before == schema
    assert json.dumps(schema) == json.dumps(before)


KEYWORDS = ["oneOf", "anyOf", "type", "properties", "required", "const", "enum", "$ref", "$defs"]
KEYWORDS += ["minProperties", "items", "minimum", "x-guidance", "kind"]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["object", "string", "#/$defs/a"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(KEYWORDS), ANYTHING, max_size=5))
def test_nonsense_is_kept_or_refused(schema: Schema) -> None:
    with suppress(BrokenRuleError):
        kept_schema(schema)
