"""Alternatives, merges, and values that may be missing."""

from __future__ import annotations

from tests.structured.builders import (
    BOOLEAN,
    DATE,
    EMAIL,
    INTEGER,
    NULL,
    NUMBER,
    TEXT,
    URI,
    Schema,
    choice,
    integer,
    listed,
    maybe,
    nullable,
    number,
    record,
    ref,
    text,
)


def _open(properties: dict[str, Schema], *required: str) -> Schema:
    """An object that may have other fields too."""
    return {"type": "object", "properties": properties, "required": list(required)}


_NAMED = _open({"name": TEXT}, "name")
_DATED = _open({"created": DATE, "updated": DATE}, "created")

_KIND = {"propertyName": "kind"}

UNIONS: dict[str, Schema] = {
    "shapes by a tag": {
        "oneOf": [
            record({"shape": {"const": "circle"}, "radius": number(exclusiveMinimum=0)}),
            record({"shape": {"const": "square"}, "side": number(exclusiveMinimum=0)}),
            record({"shape": {"const": "line"}, "points": listed(NUMBER, minItems=4, maxItems=4)}),
        ]
    },
    "shapes by an enum of one": {
        "oneOf": [
            record({"kind": {"enum": ["cat"]}, "indoor": BOOLEAN}),
            record({"kind": {"enum": ["dog"]}, "trained": BOOLEAN}),
        ]
    },
    "tag in definitions": {
        "anyOf": [ref("ok"), ref("failed")],
        "$defs": {
            "ok": record({"status": {"const": "ok"}, "value": {}}),
            "failed": record({"status": {"const": "failed"}, "reason": TEXT}),
        },
    },
    "tag that is a digit": {
        "oneOf": [
            record({"version": {"const": "1"}, "name": TEXT}),
            record({"version": {"const": "2"}, "first": TEXT, "last": TEXT}),
        ]
    },
    "tag that is a number": {
        "anyOf": [
            record({"version": {"const": 1}, "name": TEXT}),
            record({"version": {"const": 2}, "first": TEXT, "last": TEXT}),
        ]
    },
    "tag that is a boolean": {
        "oneOf": [
            record({"found": {"const": True}, "value": TEXT}),
            record({"found": {"const": False}, "why": TEXT}),
        ]
    },
    "one of several types": {"oneOf": [TEXT, INTEGER, listed(TEXT), record({"ref": URI})]},
    "types as a list": {"type": ["string", "number", "boolean", "null", "array", "object"]},
    "types with rules for each": {
        "type": ["string", "integer", "array"],
        "minLength": 2,
        "maxLength": 5,
        "minimum": 10,
        "maximum": 99,
        "maxItems": 2,
        "items": BOOLEAN,
    },
    "rules without a type": {"minLength": 3, "minimum": 5, "maxItems": 1, "maxLength": 10},
    "nullable by type": record({"nickname": nullable(TEXT), "age": nullable(INTEGER)}),
    "nullable by union": record(
        {"nickname": maybe(TEXT), "address": maybe(record({"city": TEXT}))}
    ),
    "nullable by enum": record({"size": {"enum": ["S", "M", "L", None]}}),
    "nullable list of nullables": record({"values": {"anyOf": [listed(nullable(NUMBER)), NULL]}}),
    "union in a union": {
        "anyOf": [{"anyOf": [TEXT, BOOLEAN]}, {"anyOf": [NULL, {"oneOf": [INTEGER, listed(NULL)]}]}]
    },
    "union of lists": {"anyOf": [listed(INTEGER), listed(text(maxLength=3))]},
    "union of texts": {"anyOf": [EMAIL, text(pattern="^@[a-z]{3,15}$"), text(maxLength=0)]},
    "union of overlapping records": {
        "anyOf": [
            record({"id": INTEGER, "name": TEXT}),
            record({"id": INTEGER, "email": EMAIL}),
            record({"id": INTEGER}),
        ]
    },
    "fields beside a union": {
        "type": "object",
        "properties": {"id": INTEGER},
        "required": ["id"],
        "anyOf": [_open({"mail": EMAIL}, "mail"), _open({"phone": text(minLength=5)}, "phone")],
    },
    "merge of two": {"allOf": [_NAMED, _DATED]},
    "merge with its own fields": {
        "type": "object",
        "properties": {"id": integer(minimum=1)},
        "required": ["id"],
        "allOf": [_NAMED, _DATED],
    },
    "merge of references": {
        "allOf": [ref("named"), ref("dated"), _open({"tags": listed(TEXT)}, "tags")],
        "$defs": {"named": _NAMED, "dated": _DATED},
    },
    "merge that narrows a number": {
        "allOf": [number(minimum=0), number(maximum=10), integer(), {"multipleOf": 2}]
    },
    "merge that narrows a text": {
        "allOf": [text(minLength=3), text(maxLength=8), text(pattern="^[a-z]+$")]
    },
    "merge that narrows a list": {
        "allOf": [listed(integer(minimum=0), minItems=1), listed(integer(maximum=9), maxItems=4)]
    },
    "merge of unions": {
        "allOf": [
            {"anyOf": [INTEGER, TEXT]},
            {"anyOf": [text(maxLength=4), BOOLEAN, integer(maximum=5)]},
        ]
    },
    "enum beside a pattern": {
        "enum": ["red", "green", "blue", 7],
        "type": "string",
        "minLength": 4,
    },
    "reference with a rule beside it": {
        "type": "object",
        "properties": {"short": {**ref("word"), "maxLength": 4}, "long": ref("word")},
        "required": ["short", "long"],
        "additionalProperties": False,
        "$defs": {"word": text(pattern="^[a-z]+$", minLength=1, maxLength=30)},
    },
    "the empty text or a date": record({"died": {"anyOf": [{"const": ""}, DATE]}}),
    "tagged union of references": {  # as generators of models in code write it
        **record({"shape": {"oneOf": [ref("circle"), ref("box")], "discriminator": _KIND}}),
        "$defs": {
            "circle": record({"kind": {"const": "circle"}, "radius": NUMBER}),
            "box": record({"kind": choice("box", "square"), "sides": listed(NUMBER, maxItems=3)}),
        },
    },
    "tagged union by number": {
        "oneOf": [
            record({"version": {"const": 1}, "name": TEXT}),
            record({"version": {"const": 2}, "names": listed(TEXT)}),
            record({"version": {"enum": [3, 4]}}),
        ]
    },
    "results or an error": {
        "anyOf": [
            record({"results": listed(record({"id": INTEGER, "score": NUMBER}))}),
            record({"error": record({"code": choice("none", "many"), "hint": TEXT})}),
        ]
    },
}
