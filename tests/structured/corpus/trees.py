"""Schemas that refer to themselves or go deep."""

from __future__ import annotations

from tests.structured.builders import (
    BOOLEAN,
    INTEGER,
    NULL,
    NUMBER,
    TEXT,
    Schema,
    choice,
    integer,
    listed,
    maybe,
    record,
    ref,
    text,
)


def _defined(name: str, **definitions: Schema) -> Schema:
    """The named one of these definitions."""
    return {"$ref": f"#/$defs/{name}", "$defs": definitions}


def _layers(levels: int, inside: Schema) -> Schema:
    """An object in an object, so many times."""
    for level in reversed(range(levels)):
        inside = record({f"level_{level}": inside})
    return inside


def _lists(levels: int, inside: Schema) -> Schema:
    """A list in a list, so many times."""
    for _ in range(levels):
        inside = listed(inside, maxItems=3)
    return inside


_HERE: Schema = {"$ref": "#"}
_BINARY = [
    record({"op": {"const": op}, "left": ref("term"), "right": ref("term")})
    for op in ("add", "sub", "mul", "div")
]
_LEAVES = [
    record({"op": {"const": "num"}, "value": NUMBER}),
    record({"op": {"const": "var"}, "name": text(pattern="^[a-z]$")}),
]

TREES: dict[str, Schema] = {
    "tree of values": _defined(
        "node", node=record({"value": INTEGER, "children": listed(ref("node"))})
    ),
    "tree at the root": record({"name": TEXT, "parts": listed(_HERE)}, optional=["parts"]),
    "binary tree": _defined(
        "node",
        node=record({"key": INTEGER, "left": maybe(ref("node")), "right": maybe(ref("node"))}),
    ),
    "linked list": _defined("cell", cell=record({"head": INTEGER, "tail": maybe(ref("cell"))})),
    "comments": _defined(
        "comment",
        comment=record(
            {
                "author": text(minLength=1, maxLength=20),
                "body": text(maxLength=200),
                "votes": INTEGER,
                "replies": listed(ref("comment"), maxItems=5),
            }
        ),
    ),
    "folder": _defined(
        "folder",
        folder=record({"name": TEXT, "entries": listed({"anyOf": [ref("folder"), ref("file")]})}),
        file=record({"name": TEXT, "bytes": integer(minimum=0)}),
    ),
    "organisation chart": _defined(
        "person",
        person=record({"name": TEXT, "title": TEXT, "reports": listed(ref("person"), maxItems=4)}),
    ),
    "expression": _defined("term", term={"anyOf": _LEAVES + _BINARY}),
    "expression by arrays": _defined(
        "term",
        term={
            "anyOf": [
                NUMBER,
                {
                    "type": "array",
                    "prefixItems": [choice("+", "*", "-"), ref("term"), ref("term")],
                    "items": False,
                    "minItems": 3,
                },
            ]
        },
    ),
    "query filter": _defined(
        "filter",
        filter={
            "anyOf": [
                record({"and": listed(ref("filter"), minItems=2)}),
                record({"or": listed(ref("filter"), minItems=2)}),
                record({"not": ref("filter")}),
                record({"field": TEXT, "equals": {"type": ["string", "number", "boolean"]}}),
            ]
        },
    ),
    "user interface": _defined(
        "view",
        view={
            "anyOf": [
                record({"kind": {"const": "text"}, "content": TEXT}),
                record({"kind": {"const": "button"}, "label": TEXT, "action": TEXT}),
                record(
                    {
                        "kind": {"const": "stack"},
                        "direction": choice("row", "column"),
                        "children": listed(ref("view"), maxItems=6),
                    }
                ),
            ]
        },
    ),
    "two that take turns": _defined(
        "question",
        question=record({"ask": TEXT, "answers": listed(ref("answer"), maxItems=3)}),
        answer=record({"say": TEXT, "then": maybe(ref("question"))}),
    ),
    "menu": record(
        {
            "label": TEXT,
            "items": listed({"anyOf": [_HERE, record({"label": TEXT, "command": TEXT})]}),
        }
    ),
    "statement": _defined(
        "block",
        block=listed(ref("statement"), maxItems=4),
        statement={
            "anyOf": [
                record({"assign": text(pattern="^[a-z]+$"), "to": ref("value")}),
                record({"if": ref("value"), "then": ref("block"), "else": ref("block")}),
                record({"while": ref("value"), "do": ref("block")}),
            ]
        },
        value={"anyOf": [INTEGER, BOOLEAN, text(pattern="^[a-z]+$")]},
    ),
    "type of a language": _defined(
        "type",
        type={
            "anyOf": [
                choice("int", "text", "bool"),
                record({"list": ref("type")}),
                record({"fields": {"type": "object", "additionalProperties": ref("type")}}),
            ]
        },
    ),
    "any JSON spelled out": _defined(
        "json",
        json={
            "anyOf": [
                NULL,
                BOOLEAN,
                NUMBER,
                TEXT,
                listed(ref("json")),
                {"type": "object", "additionalProperties": ref("json")},
            ]
        },
    ),
    "outline in markdown": _defined(
        "section",
        section=record(
            {"heading": text(pattern="^#{1,6} .+$"), "sections": listed(ref("section"))},
            optional=["sections"],
        ),
    ),
    "map of maps": _defined(
        "map",
        map={
            "type": "object",
            "patternProperties": {"^[a-z]{1,8}$": {"anyOf": [ref("map"), INTEGER]}},
            "additionalProperties": False,
        },
    ),
    "12 objects deep": _layers(12, TEXT),
    "20 objects deep": _layers(20, listed(INTEGER, maxItems=2)),
    "10 lists deep": _lists(10, INTEGER),
    "15 lists of records deep": _lists(7, record({"inner": _lists(7, BOOLEAN)})),
    "definitions in a chain": _defined(
        "a",
        a=record({"b": ref("b")}),
        b=record({"c": ref("c")}),
        c=record({"d": ref("d")}),
        d=listed(ref("e"), maxItems=2),
        e=choice("end"),
    ),
    "shared definition": _defined(
        "pair", pair=record({"x": ref("point"), "y": ref("point")}), point=record({"v": NUMBER})
    ),
}
