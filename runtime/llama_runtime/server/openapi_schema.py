"""Small JSON schemas, and how larger ones are made of them, for the server's OpenAPI document."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

MAX_INT = 2**31 - 1


def ref(name: str) -> Schema:
    """A reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def integer(low: int, high: int, description: str = "") -> Schema:
    """The schema of a whole number between two bounds, both included."""
    found: Schema = {"type": "integer", "minimum": low, "maximum": high}
    return found | {"description": description} if description else found


def number(low: float, high: float) -> Schema:
    """The same for any number."""
    return {"type": "number", "minimum": low, "maximum": high}


def array(items: Schema, least: int = 0, most: int | None = None) -> Schema:
    """The schema of a list."""
    found: Schema = {"type": "array", "items": items}
    if least:
        found["minItems"] = least
    return found if most is None else found | {"maxItems": most}


def record(required: dict[str, Schema], optional: dict[str, Schema]) -> Schema:
    """The schema of an object that has these fields and no other; null leaves out optional ones."""
    fields = required | {name: nullable(schema) for name, schema in optional.items()}
    found: Schema = {"type": "object", "properties": fields, "additionalProperties": False}
    return found | {"required": list(required)} if required else found


def nullable(schema: Schema) -> Schema:
    """The same schema, which allows null too."""
    if isinstance(schema.get("type"), str) and "enum" not in schema and "const" not in schema:
        return schema | {"type": list(dict.fromkeys([schema["type"], "null"]))}
    return {"anyOf": [schema, {"type": "null"}]}


def only(value: object, description: str) -> Schema:
    """The schema of a field that takes one value."""
    return {"const": value, "description": description}


def unsupported() -> Schema:
    """The schema of a field of OpenAI's that nothing here can honour."""
    return {"type": "null", "description": "Not supported."}


def answer(fields: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """The schema of an object that has these fields, and some that may be missing."""
    return {
        "type": "object",
        "properties": fields | (optional or {}),
        "required": list(fields),
    }
