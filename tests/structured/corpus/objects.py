"""Objects: open and closed, maps, names in other scripts, very wide ones."""

from __future__ import annotations

from tests.structured.builders import (
    BOOLEAN,
    DATE,
    EMAIL,
    INTEGER,
    NUMBER,
    TEXT,
    Schema,
    choice,
    integer,
    listed,
    nullable,
    number,
    record,
    text,
)

_KINDS = (TEXT, INTEGER, NUMBER, BOOLEAN, DATE, nullable(TEXT), listed(INTEGER, maxItems=2))


def _form(fields: int) -> dict[str, Schema]:
    """So many fields of all kinds."""
    return {f"field_{i:03}": _KINDS[i % len(_KINDS)] for i in range(fields)}


def _open(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties}


OBJECTS: dict[str, Schema] = {
    "anything": {},
    "any object": {"type": "object"},
    "a map of numbers": {"type": "object", "additionalProperties": NUMBER},
    "a map of lists": {"type": "object", "additionalProperties": listed(TEXT)},
    "a map of records": {
        "type": "object",
        "additionalProperties": record({"n": INTEGER, "ok": BOOLEAN}),
    },
    "a map of 1 to 3": {
        "type": "object",
        "patternProperties": {"^[a-z]$": INTEGER},
        "additionalProperties": False,
        "maxProperties": 3,
    },
    "a map that isn't empty": record({}, additionalProperties=BOOLEAN, minProperties=1),
    "fields that may all be missing": _open(a=INTEGER, b=TEXT, c=BOOLEAN),
    "closed, all may be missing": record({"a": INTEGER, "b": TEXT}, optional=["a", "b"]),
    "at least one of three": record(
        {"mail": EMAIL, "phone": TEXT, "fax": TEXT},
        optional=["mail", "phone", "fax"],
        minProperties=1,
    ),
    "at most one of three": record(
        {"mail": EMAIL, "phone": TEXT, "fax": TEXT},
        optional=["mail", "phone", "fax"],
        maxProperties=1,
    ),
    "required without a definition": {"type": "object", "required": ["x", "y"]},
    "required, defined by the rest": {
        "type": "object",
        "required": ["x"],
        "additionalProperties": integer(minimum=0),
    },
    "known and other fields": {
        **_open(id=INTEGER, name=TEXT),
        "required": ["id"],
        "additionalProperties": listed(BOOLEAN, maxItems=2),
    },
    "known, patterned and no other": {
        **_open(id=INTEGER),
        "patternProperties": {"^x-[a-z]+$": TEXT},
        "additionalProperties": False,
        "required": ["id"],
    },
    "two patterns and others": {
        "type": "object",
        "patternProperties": {"^i_": INTEGER, "^s_": TEXT},
        "additionalProperties": BOOLEAN,
    },
    "a field that a pattern rules too": {
        **_open(n_total=number(minimum=0)),
        "patternProperties": {"^n_": integer(maximum=100)},
        "required": ["n_total"],
        "additionalProperties": False,
    },
    "a field that is forbidden": {
        "type": "object",
        "properties": {"secret": False, "shown": TEXT},
        "required": ["shown"],
    },
    "a constant object": {"const": {"a": 1, "b": [True, None], "c": {"d": "e"}}},
    "an enum of objects": {"enum": [{"on": True}, {"on": False, "why": "off"}, {}]},
    "names in other scripts": record(
        {"имя": TEXT, "年齢": INTEGER, "città": TEXT, "naïve": BOOLEAN, "ὄνομα": TEXT, "🦙": NUMBER}
    ),
    "names with escapes": record(
        {
            'say "hi"': TEXT,
            "back\\slash": INTEGER,
            "line\nbreak": BOOLEAN,
            "tab\t": NUMBER,
            "a/b": TEXT,
        }
    ),
    "names with spaces and signs": record(
        {
            "first name": TEXT,
            "e-mail": EMAIL,
            "$price": NUMBER,
            "@id": INTEGER,
            "a.b": TEXT,
            "": TEXT,
        }
    ),
    "names that begin alike": record(
        {"a": INTEGER, "ab": INTEGER, "abc": INTEGER, "abcd": INTEGER}
    ),
    "open, with names that have escapes": {
        **_open(**{'q"': INTEGER, "é": INTEGER}),
        "additionalProperties": text(maxLength=5),
    },
    "names like those of the schema": record(
        {"type": choice("a", "b"), "properties": INTEGER, "$ref": TEXT, "required": BOOLEAN}
    ),
    "values of every kind": record(
        {
            "text": TEXT,
            "whole": INTEGER,
            "number": NUMBER,
            "truth": BOOLEAN,
            "nothing": {"type": "null"},
            "list": {"type": "array"},
            "object": {"type": "object"},
        }
    ),
    "a form of 60 fields": record(_form(60)),
    "a form of 80 fields, half of them optional": record(
        _form(80), optional=[name for name in _form(80) if int(name[-1]) % 2]
    ),
    "a form of 120 flags": record({f"flag_{i}": BOOLEAN for i in range(120)}),
    "an open form of 70 fields": {"type": "object", "properties": _form(70)},
    "an enum of 500": {"enum": [f"product-{i * 7919 % 10_000:04}" for i in range(500)]},
    "an enum of 500 numbers": {"enum": [i * i for i in range(500)]},
    "codes of 250 regions": record(
        {"region": {"enum": [f"{a}{b}" for a in "ABCDEFGHIJ" for b in "ABCDEFGHIJKLMNOPQRSTUVWXY"]}}
    ),
    "a union of 60 records": {
        "anyOf": [record({"kind": {"const": f"kind {i}"}, f"v{i}": INTEGER}) for i in range(60)]
    },
}
