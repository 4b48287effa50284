"""Schemas that can't be kept to, and what a refusal has to name."""

from __future__ import annotations

from tests.structured.builders import INTEGER, NUMBER, TEXT, Schema, listed, ref, text

_OBJECT: Schema = {"type": "object"}
_A_B: Schema = {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}}
DRAFT_07 = "http://json-schema.org/draft-07/schema#"
DRAFT_2019 = "https://json-schema.org/draft/2019-09/schema"

UNSUPPORTED: dict[str, tuple[Schema, str]] = {
    # keywords
    "not": ({"not": TEXT}, "not"),
    "not, deep inside": (listed({**_A_B, "properties": {"a": {"not": TEXT}}}), "not"),
    "not, in a definition": ({"$ref": "#/$defs/a", "$defs": {"a": {"not": TEXT}}}, "not"),
    "if and then": ({**_A_B, "if": {"required": ["a"]}, "then": {"required": ["b"]}}, "if"),
    "else": ({**_A_B, "if": {"required": ["a"]}, "else": {"required": ["b"]}}, "else"),
    "dependentRequired": ({**_A_B, "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    "dependentSchemas": ({**_A_B, "dependentSchemas": {"a": {}}}, "dependentSchemas"),
    "dependencies": ({"$schema": DRAFT_07, **_A_B, "dependencies": {"a": ["b"]}}, "dependencies"),
    "contains": (listed({}, contains=INTEGER), "contains"),
    "minContains": (listed({}, contains=INTEGER, minContains=2), "minContains"),
    "uniqueItems": (listed(INTEGER, uniqueItems=True), "uniqueItems"),
    "propertyNames": ({**_OBJECT, "propertyNames": text(pattern="^a")}, "propertyNames"),
    "unevaluatedProperties": ({**_A_B, "unevaluatedProperties": False}, "unevaluatedProperties"),
    "unevaluatedItems": ({"type": "array", "unevaluatedItems": False}, "unevaluatedItems"),
    "$dynamicRef": ({"$dynamicRef": "#node"}, "$dynamicRef"),
    "$recursiveRef": ({"$schema": DRAFT_2019, "$recursiveRef": "#"}, "$recursiveRef"),
    # references
    "a remote reference": ({"$ref": "https://example.com/x.json"}, "https://example.com/x.json"),
    "a file": ({"$ref": "file:///etc/passwd"}, "file:///etc/passwd"),
    "another document": ({"$ref": "other.json#/a"}, "other.json"),
    "a reference to nothing": (ref("none"), "/$defs/none"),
    "a circle with siblings": (
        {
            **ref("a"),
            "$defs": {"a": {**ref("b"), "minLength": 1}, "b": {**ref("a"), "minLength": 1}},
        },
        "circular",
    ),
    # texts
    **{
        f"format {name}": (text(format=name), name)
        for name in (
            "regex",
            "iri",
            "uri-reference",
            "json-pointer",
            "idn-email",
            "password",
            "zip",
        )
    },
    "look-ahead": (text(pattern="^(?!x)[a-z]+$"), "look-around"),
    "a back reference": (text(pattern=r"^(a|b)\1$"), "backreferences"),
    "a word border": (text(pattern=r"\bcat\b"), "lookarounds"),
    "a null as \\0": (text(pattern=r"^\0$"), "\\0"),
    "no pattern": (text(pattern="["), "unclosed"),
    # alternatives that may both hold, or can't be seen to exclude each other
    "oneOf that overlaps": ({"oneOf": [INTEGER, NUMBER]}, "oneOf"),
    "oneOf of open records": ({"oneOf": [{**_A_B, "required": [name]} for name in "ab"]}, "oneOf"),
    "oneOf of references": (
        {"oneOf": [ref("a"), ref("b")], "$defs": {"a": TEXT, "b": text(maxLength=3)}},
        "oneOf",
    ),
    # objects
    "a count of optional properties": ({**_A_B, "minProperties": 2}, "minProperties 2"),
    "patterns that overlap": (
        {**_OBJECT, "patternProperties": {"^a": INTEGER, "b$": TEXT}},
        "disjoint",
    ),
    # nothing fits
    "an enum of another type": ({"type": "string", "enum": [1, 2]}, "incompatible types"),
    "an empty enum": ({"enum": []}, "empty"),
    "an empty range": ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (5)"),
    "an empty range of lengths": (text(minLength=5, maxLength=3), "minLength (5)"),
    "a merge of different types": ({"allOf": [TEXT, INTEGER]}, "incompatible types"),
    "a required property that is forbidden": (
        {**_OBJECT, "properties": {"a": False}, "required": ["a"]},
        "'a' is unsatisfiable",
    ),
    "a pattern shorter than the text": (text(pattern="^a$", minLength=3), "Regex is empty"),
    # no schemas
    "an unknown type": ({"type": "strnig"}, "strnig"),
    "a type that is a number": ({"type": 3}, "type"),
    "required that is a text": ({**_OBJECT, "required": "a"}, "required"),
    "properties that are a list": ({**_OBJECT, "properties": []}, "properties"),
    "a length that is a text": (text(minLength="3"), "minLength"),
    "a negative length": (text(minLength=-1), "minLength"),
    "a limit that is a text": ({"type": "integer", "minimum": "0"}, "minimum"),
    "items that are a number": ({"type": "array", "items": 3}, "schema must be"),
    "a reference that is a number": ({"$ref": 3}, "$ref"),
}
