"""Short spellings of what most schemas are made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

Schema = dict[str, Any]

BOOLEAN: Schema = {"type": "boolean"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
TEXT: Schema = {"type": "string"}
NULL: Schema = {"type": "null"}
DATE: Schema = {"type": "string", "format": "date"}
MOMENT: Schema = {"type": "string", "format": "date-time"}
EMAIL: Schema = {"type": "string", "format": "email"}
URI: Schema = {"type": "string", "format": "uri"}
UUID: Schema = {"type": "string", "format": "uuid"}


def text(**rules: Any) -> Schema:
    """A string under these keywords; ``min_length`` is spelled ``minLength``, as in the schema."""
    return {"type": "string", **rules}


def integer(**rules: Any) -> Schema:
    """A whole number under these keywords."""
    return {"type": "integer", **rules}


def number(**rules: Any) -> Schema:
    """A number under these keywords."""
    return {"type": "number", **rules}


def choice(*values: str) -> Schema:
    """One of these texts."""
    return {"type": "string", "enum": list(values)}


def listed(items: Schema | bool, **rules: Any) -> Schema:
    """An array of these."""
    return {"type": "array", "items": items, **rules}


def record(
    properties: Mapping[str, Schema], optional: Collection[str] = (), **keywords: Any
) -> Schema:
    """A closed object whose fields are required, save the optional ones."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
        **keywords,
    }


def ref(name: str) -> Schema:
    """A reference to one of the schema's own definitions."""
    return {"$ref": f"#/$defs/{name}"}


def nullable(schema: Schema) -> Schema:
    """The same, or null, as ``type`` spells it."""
    return {**schema, "type": [schema["type"], "null"]}


def maybe(schema: Schema) -> Schema:
    """The same, or null, as code generators spell it."""
    return {"anyOf": [schema, NULL]}
