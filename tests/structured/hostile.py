"""Schemas that somebody could send to take a server's time, memory or stack.

Each is written as JSON text by a function, because some are megabytes long and some are nested
deeper than Python's own writer goes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

DEEP = 100_000
LONG = 2_000_000  # characters, where a text is merely long


def _nested(levels: int, before: str, inside: str, after: str) -> str:
    return before * levels + inside + after * levels


def _arrays(levels: int) -> str:
    return _nested(levels, '{"type":"array","items":', '{"type":"null"}', "}")


def _objects(levels: int) -> str:
    before = '{"type":"object","required":["a"],"additionalProperties":false,"properties":{"a":'
    return _nested(levels, before, '{"type":"null"}', "}}")


def _unions(levels: int) -> str:
    return _nested(levels, '{"anyOf":[{"type":"null"},', '{"type":"boolean"}', "]}")


def _intersections(levels: int) -> str:
    return _nested(levels, '{"allOf":[{"type":"object"},', '{"type":"object"}', "]}")


def _schema(**keywords: Any) -> str:
    return json.dumps(keywords)


def _text(**rules: Any) -> str:
    return _schema(type="string", **rules)


def _patterns(count: int) -> str:
    """Open maps whose keys fall under many patterns, which llguidance compares by pairs."""
    return _schema(
        type="object",
        patternProperties={f"^k{i}[a-z]+(x|y{i})*$": {"type": "integer"} for i in range(count)},
        additionalProperties=False,
    )


def _product(factors: int) -> str:
    """Each member of ``allOf`` doubles the branches of the intersection."""
    choice = [{"properties": {f"a{i}": {"const": i}}} for i in range(2)]
    return _schema(type="object", allOf=[{"anyOf": choice} for _ in range(factors)])


def _doubling(levels: int) -> str:
    """Definitions of a few lines each that unfold to two to the power of levels."""
    definitions: dict[str, Any] = {"d0": {"type": "integer"}}
    for i in range(1, levels):
        inner = {"$ref": f"#/$defs/d{i - 1}"}
        definitions[f"d{i}"] = {
            "type": "object",
            "properties": {"l": {**inner, "minimum": i}, "r": {**inner, "minimum": i}},
            "required": ["l", "r"],
            "additionalProperties": False,
        }
    return json.dumps({"$ref": f"#/$defs/d{levels - 1}", "$defs": definitions})


def _chain(links: int, *, siblings: bool = False) -> str:
    """Definitions each of which is the next one."""
    more = {"minLength": 1} if siblings else {}
    definitions: dict[str, Any] = {
        f"d{i}": {"$ref": f"#/$defs/d{i + 1}", **more} for i in range(links)
    }
    return json.dumps({"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{links}": {}}})


def _record_chain(links: int) -> str:
    """Records each of which holds the next one."""
    definitions: dict[str, Any] = {
        f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}}
        for i in range(links)
    }
    return json.dumps({"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{links}": {}}})


def _deep_chain(links: int, levels: int) -> str:
    """Each definition is shallow enough; each is read from within the one before."""
    definitions = [
        f'"{i}":' + _nested(levels, '{"items":', f'{{"$ref":"#/$defs/{i + 1}"}}', "}")
        for i in range(links)
    ]
    return '{"$ref":"#/$defs/0","$defs":{' + ",".join(definitions) + f',"{links}":true}}}}'


def _cycle(**siblings: Any) -> str:
    a, b = {"$ref": "#/$defs/b", **siblings}, {"$ref": "#/$defs/a", **siblings}
    return json.dumps({"$ref": "#/$defs/a", "$defs": {"a": a, "b": b}})


def _endless_list() -> str:
    """Nothing finite fits: each node needs another one."""
    node = {
        "type": "object",
        "properties": {"next": {"$ref": "#"}},
        "required": ["next"],
        "additionalProperties": False,
    }
    return json.dumps(node)


def _wide(fields: int, *, required: bool) -> str:
    names = [f"field_{i}" for i in range(fields)]
    return _schema(
        type="object",
        properties={name: {"type": "string"} for name in names},
        required=names if required else [],
        additionalProperties=False,
    )


def _union_of_records(branches: int) -> str:
    return _schema(
        anyOf=[
            {
                "type": "object",
                "properties": {"kind": {"const": f"k{i}"}, f"v{i}": {"type": "integer"}},
                "required": ["kind", f"v{i}"],
                "additionalProperties": False,
            }
            for i in range(branches)
        ]
    )


def _exclusive_records(branches: int) -> str:
    return _union_of_records(branches).replace('"anyOf"', '"oneOf"')


HOSTILE: dict[str, Callable[[], str]] = {
    # nesting
    "100,000 arrays deep": lambda: _arrays(DEEP),
    "1,000 arrays deep": lambda: _arrays(1_000),
    "120 arrays deep": lambda: _arrays(120),
    "100,000 objects deep": lambda: _objects(DEEP),
    "60 objects deep": lambda: _objects(60),
    "100,000 unions deep": lambda: _unions(DEEP),
    "120 unions deep": lambda: _unions(120),
    "100,000 intersections deep": lambda: _intersections(DEEP),
    "a constant 100,000 arrays deep": lambda: '{"const":' + "[" * DEEP + "]" * DEEP + "}",
    # size
    "a description of megabytes": lambda: _text(description="x" * LONG),
    "a constant of megabytes": lambda: _schema(const="x" * LONG),
    "a constant of 100,000 characters": lambda: _schema(const="x" * 100_000),
    "a property name of megabytes": lambda: _schema(
        type="object", properties={"x" * LONG: {"type": "null"}}, required=["x" * LONG]
    ),
    "10,000 required fields": lambda: _wide(10_000, required=True),
    "2,000 optional fields": lambda: _wide(2_000, required=False),
    "30,000 optional fields": lambda: _wide(30_000, required=False),
    "100,000 optional fields": lambda: _wide(100_000, required=False),
    "an enum of 100,000 texts": lambda: _schema(enum=[f"value-{i}" for i in range(100_000)]),
    "an enum of 10,000 texts": lambda: _schema(enum=[f"value-{i}" for i in range(10_000)]),
    "an enum of 100,000 numbers": lambda: _schema(enum=list(range(100_000))),
    "a million definitions that nobody uses": lambda: _schema(
        type="null", **{"$defs": {f"d{i}": True for i in range(1_000_000)}}
    ),
    # branches
    "5,000 branches of anyOf": lambda: _union_of_records(5_000),
    "1,000 branches of anyOf": lambda: _union_of_records(1_000),
    "5,000 branches of oneOf": lambda: _exclusive_records(5_000),
    "1,000 branches of oneOf": lambda: _exclusive_records(1_000),
    "a product of 12 unions": lambda: _product(12),
    "a product of 30 unions": lambda: _product(30),
    # references
    "references in a circle": lambda: _cycle(),
    "references in a circle with siblings": lambda: _cycle(minLength=1),
    "a reference to itself": lambda: _schema(**{"$ref": "#"}),
    "a union of nothing but itself": lambda: _schema(anyOf=[{"$ref": "#"}, {"$ref": "#"}]),
    "a list without an end": _endless_list,
    "a chain of 100,000 references": lambda: _chain(DEEP),
    "a chain of 2,000 references": lambda: _chain(2_000),
    "a chain of 200 references with siblings": lambda: _chain(200, siblings=True),
    "a chain of 100,000 records": lambda: _record_chain(DEEP),
    "a chain of 2,000 records": lambda: _record_chain(2_000),
    "a chain of 80 definitions 50 levels deep": lambda: _deep_chain(80, 50),
    "references that double 24 times": lambda: _doubling(24),
    "references that double 16 times": lambda: _doubling(16),
    "references that double 12 times": lambda: _doubling(12),
    # counts
    "maxItems of two billion": lambda: _schema(
        type="array", items={"type": "integer"}, maxItems=2**31
    ),
    "maxItems of 2^63": lambda: _schema(type="array", items={"type": "integer"}, maxItems=2**63),
    "minItems of a million": lambda: _schema(
        type="array", items={"type": "integer"}, minItems=10**6
    ),
    "minItems of 10,000": lambda: _schema(type="array", items={"type": "integer"}, minItems=10_000),
    "nested minItems of 1,000": lambda: _schema(
        type="array",
        minItems=1_000,
        items={"type": "array", "minItems": 1_000, "items": {"type": "integer"}},
    ),
    "minLength of two billion": lambda: _text(minLength=2**31),
    "minLength of a million": lambda: _text(minLength=10**6),
    "minLength of 10,000": lambda: _text(minLength=10_000),
    "maxLength of a million": lambda: _text(maxLength=10**6),
    "maxLength of 2^63": lambda: _text(maxLength=2**63),
    "minProperties of a million": lambda: _schema(
        type="object", additionalProperties={"type": "null"}, minProperties=10**6
    ),
    "maximum of 1e308": lambda: _schema(type="integer", minimum=-1e308, maximum=1e308),
    "a multiple of 1e-300": lambda: _schema(type="number", multipleOf=1e-300),
    "a multiple of a large prime": lambda: _schema(type="integer", multipleOf=1_000_003),
    "a multiple of the largest 32-bit number": lambda: _schema(
        type="integer", multipleOf=2**31 - 1
    ),
    "a multiple of a thousand": lambda: _schema(type="integer", multipleOf=1_000),
    "a multiple of ten thousand and seven": lambda: _schema(type="integer", multipleOf=10_007),
    "many multiples": lambda: _schema(
        type="integer", allOf=[{"multipleOf": n} for n in (97, 101, 103, 107, 109)]
    ),
    "a multiple of a thousandth in a range": lambda: _schema(
        type="number", multipleOf=0.001, minimum=0, maximum=10**15
    ),
    # patterns
    "a pattern that repeats a repetition": lambda: _text(pattern="^(a{1000}){1000}$"),
    "a pattern of six repetitions": lambda: _text(
        pattern="^((((((a{10}){10}){10}){10}){10}){10})$"
    ),
    "a pattern of nested stars": lambda: _text(pattern="^(([a-z]*)*)*$"),
    "a pattern with many states": lambda: _text(pattern="^(a|b)*a(a|b){24}$"),
    "a pattern with too many states": lambda: _text(pattern="^(.*a.{200}b.*)$"),
    "a pattern of 10,000 alternatives": lambda: _text(
        pattern="^(" + "|".join(f"word{i}" for i in range(10_000)) + ")$"
    ),
    "a pattern of megabytes": lambda: _text(pattern="^" + "a" * LONG + "$"),
    "a pattern of 100,000 groups": lambda: _text(pattern="(" * DEEP + "a" + ")" * DEEP),
    "a pattern of letters in any script": lambda: _text(pattern=r"^[\p{L}\p{N}]{1,500}$"),
    "patterns that all must fit": lambda: _schema(
        type="string", allOf=[{"pattern": f"a.{{{i}}}b"} for i in range(20, 40)]
    ),
    "200 patterns of keys": lambda: _patterns(200),
    "20 patterns of keys": lambda: _patterns(20),
    # texts that are no schemas
    "no JSON": lambda: "{",
    "a number that is none": lambda: '{"maximum": NaN}',
    "half of a surrogate pair": lambda: '{"const": "\\ud800"}',
    "a null byte": lambda: '{"const": "\\u0000", "title": "\\u0000"}',
}
