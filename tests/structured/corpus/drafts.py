"""What generators of schemas write: annotations, older drafts, unknown keywords."""

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
    record,
    text,
)

DRAFT_04 = "http://json-schema.org/draft-04/schema#"
DRAFT_07 = "http://json-schema.org/draft-07/schema#"
DRAFT_2019 = "https://json-schema.org/draft/2019-09/schema"
DRAFT_2020 = "https://json-schema.org/draft/2020-12/schema"

DRAFTS: dict[str, Schema] = {
    "as pydantic writes it": {
        "title": "Order",
        "description": "An order of the shop.",
        "type": "object",
        "properties": {
            "id": {"title": "Id", "type": "integer"},
            "note": {"anyOf": [TEXT, NULL], "default": None, "title": "Note"},
            "lines": {"items": {"$ref": "#/$defs/Line"}, "title": "Lines", "type": "array"},
            "state": {"allOf": [{"$ref": "#/$defs/State"}], "default": "new"},
        },
        "required": ["id", "lines"],
        "$defs": {
            "Line": {
                "properties": {"sku": {"title": "Sku", "type": "string"}, "n": {"type": "integer"}},
                "required": ["sku", "n"],
                "title": "Line",
                "type": "object",
            },
            "State": {"enum": ["new", "paid"], "title": "State", "type": "string"},
        },
    },
    "as zod writes it": {
        "$schema": DRAFT_07,
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1},
            "tags": {"type": "array", "items": {"type": "string"}},
            "kind": {"type": "string", "const": "user"},
        },
        "required": ["name", "kind"],
        "additionalProperties": False,
    },
    "as quicktype writes it": {
        "$schema": "http://json-schema.org/draft-06/schema#",
        "$ref": "#/definitions/Welcome",
        "definitions": {
            "Welcome": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"greeting": TEXT, "count": INTEGER},
                "required": ["count", "greeting"],
                "title": "Welcome",
            }
        },
    },
    "draft 4 with exclusive flags": {
        "$schema": DRAFT_04,
        "id": "http://example.com/price",
        "type": "object",
        "properties": {
            "price": {"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 100}
        },
        "required": ["price"],
        "additionalProperties": False,
    },
    "draft 7 with definitions": {
        "$schema": DRAFT_07,
        "$id": "http://example.com/shipment.json",
        "definitions": {"address": record({"street": TEXT, "city": TEXT})},
        "type": "object",
        "properties": {
            "from": {"$ref": "#/definitions/address"},
            "to": {"$ref": "#/definitions/address"},
        },
        "required": ["from", "to"],
        "additionalProperties": False,
    },
    "draft 7 with a tuple": {
        "$schema": DRAFT_07,
        "type": "array",
        "items": [NUMBER, choice("m", "km")],
        "additionalItems": False,
        "minItems": 2,
    },
    "draft 7 with a tuple and more": {
        "$schema": DRAFT_07,
        "type": "array",
        "items": [TEXT],
        "additionalItems": INTEGER,
        "minItems": 1,
        "maxItems": 4,
    },
    "draft 2019-09": {
        "$schema": DRAFT_2019,
        "$defs": {"positive": integer(exclusiveMinimum=0)},
        "type": "object",
        "properties": {"n": {"$ref": "#/$defs/positive", "maximum": 10}},
        "required": ["n"],
    },
    "draft 2020-12 with an address of its own": {
        "$schema": DRAFT_2020,
        "$id": "https://example.com/reading.schema.json",
        "title": "Reading",
        "type": "object",
        "properties": {"celsius": NUMBER, "at": {"type": "string", "format": "date-time"}},
        "required": ["celsius"],
    },
    "annotations everywhere": record(
        {
            "login": text(
                title="Login",
                description="What the user types in.",
                examples=["ada", "alan"],
                default="guest",
                pattern="^[a-z]{2,12}$",
            ),
            "secret": text(writeOnly=True, **{"$comment": "never shown"}),
            "since": integer(readOnly=True, minimum=1990, maximum=2030),
        },
        title="Account",
        description='Long text with "quotes", \\ and\nlines.',
        examples=[{"login": "ada"}],
    ),
    "keywords nobody knows": {
        **record(
            {"size": integer(**{"x-unit": "kB", "x-order": 3}), "file": text(**{"x-at": "disk"})}
        ),
        "x-vendor": {"not": {"type": "null"}},
        "nullable": False,
        "version": 3,
    },
    "as OpenAPI writes it": record(
        {
            "id": integer(format="int64", example=10),
            "price": {"type": "number", "format": "double", "nullable": True},
            "status": choice("available", "pending", "sold"),
        },
        xml={"name": "Pet"},
        externalDocs={"url": "https://example.com"},
    ),
    "a payload in a text": record(
        {"encoded": text(contentEncoding="base64", contentMediaType="application/json")}
    ),
    "keywords of another type": {
        "type": "boolean",
        "minLength": 3,
        "maximum": 2,
        "required": ["a"],
    },
    "definitions that nobody uses": {
        "type": "integer",
        "$defs": {"unused": {"not": {"type": "string"}}, "other": {"$ref": "#/$defs/unused"}},
    },
    "a reference into properties": {
        "type": "object",
        "properties": {
            "billing": record({"street": TEXT, "zip": text(pattern="^[0-9]{5}$")}),
            "shipping": {"$ref": "#/properties/billing"},
        },
        "required": ["billing", "shipping"],
        "additionalProperties": False,
    },
    "always valid members": {
        "type": "object",
        "properties": {"any": True, "empty": {}, "list": listed(True, maxItems=2), "flag": BOOLEAN},
        "required": ["any", "empty", "flag"],
        "additionalProperties": False,
    },
}
