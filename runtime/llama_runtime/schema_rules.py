"""Rules of a JSON schema that its grammar would keep in part only, or not be made from.

``llguidance`` refuses most of what it can't keep to. This module refuses the rest: what it would
round, or obey though no schema means it, or count otherwise than a validator does. And where a
``oneOf`` can't have two branches that hold, as in the tagged unions that code generators write, it
is the ``anyOf`` that grammars can do.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

Schema = dict[str, Any]

EXACT = 2**53  # whole numbers up to it are what they seem, as floats
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLES = ("items", "additionalItems", "additionalProperties", "contains", "propertyNames")
_VALUES = ("const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
MAX_BRANCHES = 64  # of a oneOf that is looked at
_MOST_REFERENCES = 100  # one after the other, which circles have more of


class BrokenRuleError(ValueError):
    """A rule that wouldn't be kept; the message says which."""


def kept_schema(schema: Schema) -> Schema:
    """A schema that means the same, in a form that grammars are made from.

    Args:
        schema: JSON values; it is left as it is.

    Raises:
        BrokenRuleError: a part of it would not be kept.
    """
    kept: Schema = _kept(schema, schema)
    return kept


def _kept(value: Any, root: Schema) -> Any:
    if not isinstance(value, dict):
        return value
    _check(value, root)
    schema = {key: _kept_part(key, part, root) for key, part in value.items()}
    branches = schema.get("oneOf")
    if isinstance(branches, list) and "anyOf" not in schema and _exclude(branches, root):
        schema["anyOf"] = schema.pop("oneOf")
        schema.pop("discriminator", None)  # OpenAPI's name for the property that tells them apart
    if schema.get("uniqueItems") is False:  # which generators write, and which asks for nothing
        del schema["uniqueItems"]
    return schema


def _kept_part(key: str, part: Any, root: Schema) -> Any:
    if key in _MAPS and isinstance(part, dict):
        return {name: _kept(one, root) for name, one in part.items()}
    if key in _LISTS and isinstance(part, list):
        return [_kept(one, root) for one in part]
    if key in _SINGLES:
        return _kept(part, root)
    return part


def _check(schema: Schema, root: Schema) -> None:
    if "x-guidance" in schema:
        raise BrokenRuleError("x-guidance is no keyword of JSON Schema")
    for key in _VALUES:
        for number in _numbers(schema.get(key)):
            if abs(number) > EXACT:
                raise BrokenRuleError(f"{key} holds a number beyond 2^53, which would be rounded")
    for key in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(schema.get(key), bool) and "draft-04" not in str(root.get("$schema")):
            raise BrokenRuleError(f"{key} must be a number, unless $schema says draft-04")
    fewest, required = schema.get("minProperties", 0), schema.get("required", [])
    if (
        isinstance(fewest, int)
        and fewest > max(1, len(required) if isinstance(required, list) else 0)
        and schema.get("additionalProperties") is not False
    ):
        raise BrokenRuleError(
            f"minProperties {fewest} can't be counted where keys are free: one may come twice"
        )


def _numbers(value: Any) -> Iterator[int | float]:
    """Those in a JSON value."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def _exclude(branches: list[Any], root: Schema) -> bool:
    """Whether it can be seen that no value satisfies two of them."""
    if len(branches) > MAX_BRANCHES:  # each is compared with each
        return False
    resolved = [_resolved(branch, root) for branch in branches]
    known = [(_types(schema), _tags(schema)) for schema in resolved]
    return all(_are_apart(one, other) for one, other in combinations(known, 2))


def _resolved(branch: Any, root: Schema) -> Schema:
    """A branch, or what it refers to in the same document."""
    for _ in range(_MOST_REFERENCES):
        if not isinstance(branch, dict):
            return {}
        reference = branch.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/") or len(branch) > 1:
            return branch
        found: Any = root
        for name in reference[2:].split("/"):
            name = name.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, dict) else None
        branch = found
    return {}


Known = tuple[set[str], dict[str, set[tuple[str, Any]]]]  # the types of a schema, and its tags


def _are_apart(one: Known, other: Known) -> bool:
    """Whether two schemas differ in their types, or in what a property that both need must be."""
    (types, tags), (other_types, other_tags) = one, other
    if types and other_types and types.isdisjoint(other_types):
        return True
    if not types == other_types == {"object"}:
        return False
    return any(tags[name].isdisjoint(other_tags[name]) for name in tags.keys() & other_tags.keys())


def _types(schema: Schema) -> set[str]:
    """The types that a schema names; empty where it doesn't."""
    named = schema.get("type")
    listed = named if isinstance(named, list) else [named]
    types = {one for one in listed if isinstance(one, str)}
    return types | {"number"} if "integer" in types else types  # each of which is one


def _tags(schema: Schema) -> dict[str, set[tuple[str, Any]]]:
    """The properties that an object needs and whose values are listed, with their values."""
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return {}
    tags = {}
    for name in required:
        rule = properties.get(name) if isinstance(name, str) else None
        if not isinstance(rule, dict):
            continue
        listed = [rule["const"]] if "const" in rule else rule.get("enum")
        if isinstance(listed, list) and all(isinstance(one, (str, bool, int)) for one in listed):
            tags[name] = {(type(one).__name__, one) for one in listed}  # True is no 1
    return tags
