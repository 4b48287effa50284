"""Lists and tuples."""

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


def _tuple(*items: Schema, **rules: object) -> Schema:
    """A list of exactly these."""
    return {
        "type": "array",
        "prefixItems": list(items),
        "items": False,
        "minItems": len(items),
        **rules,
    }


ARRAYS: dict[str, Schema] = {
    "any list": {"type": "array"},
    "a list of anything": listed(True),
    "a list of nothing": listed(False),
    "an empty list": listed(INTEGER, maxItems=0),
    "a list of one": listed(TEXT, minItems=1, maxItems=1),
    "a list of at least two": listed(BOOLEAN, minItems=2),
    "a list of up to three": listed(text(maxLength=5), maxItems=3),
    "a list of 2 to 5": listed(INTEGER, minItems=2, maxItems=5),
    "a list of 30": listed(integer(minimum=0, maximum=9), minItems=30, maxItems=30),
    "a list of nulls": listed(NULL, minItems=1, maxItems=4),
    "a list of choices": listed(choice("a", "b", "c"), minItems=1),
    "a matrix": listed(listed(NUMBER, minItems=3, maxItems=3), minItems=3, maxItems=3),
    "a list of lists of texts": listed(listed(listed(TEXT, maxItems=2), maxItems=2), maxItems=2),
    "a pair": _tuple(TEXT, INTEGER),
    "a tuple of five": _tuple(TEXT, INTEGER, BOOLEAN, NULL, listed(NUMBER)),
    "a tuple that may be cut short": _tuple(INTEGER, INTEGER, TEXT, minItems=1),
    "a tuple with more of a kind": {
        "type": "array",
        "prefixItems": [choice("sum", "mean"), INTEGER],
        "items": NUMBER,
        "minItems": 2,
        "maxItems": 6,
    },
    "a tuple with more of anything": {"type": "array", "prefixItems": [TEXT], "minItems": 1},
    "a tuple of records": _tuple(record({"a": TEXT}), record({"b": INTEGER})),
    "a list of tuples": listed(_tuple(choice("x", "y"), NUMBER), maxItems=4),
    "a constant list": {"const": [1, "two", None, [True, {"three": 3}]]},
    "an enum of lists": {"enum": [[], [1], [1, 2], ["a", "b"]]},
    "a spreadsheet": record(
        {
            "header": listed(TEXT, minItems=1),
            "rows": listed(listed({"type": ["string", "number", "boolean", "null"]})),
        }
    ),
}
