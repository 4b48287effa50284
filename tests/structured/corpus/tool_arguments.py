"""Arguments of functions that a model may call."""

from __future__ import annotations

from tests.structured.builders import (
    BOOLEAN,
    DATE,
    EMAIL,
    INTEGER,
    MOMENT,
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

_COLUMN = text(pattern="^[a-z_][a-z0-9_]*$")
_SCALAR: Schema = {"type": ["string", "number", "boolean", "null"]}
_SECONDS = number(minimum=0, maximum=3600)

TOOL_ARGUMENTS: dict[str, Schema] = {
    "get_weather": record(
        {"location": TEXT, "unit": choice("celsius", "fahrenheit")}, optional=["unit"]
    ),
    "get_forecast": record(
        {
            "latitude": number(minimum=-90, maximum=90),
            "longitude": number(minimum=-180, maximum=180),
            "days": integer(minimum=1, maximum=14, default=3),
            "hourly": listed(choice("temperature", "rain", "wind")),
        },
        optional=["days", "hourly"],
    ),
    "web_search": record(
        {
            "query": text(minLength=1, maxLength=200),
            "site": nullable(text(format="hostname")),
            "since": maybe(DATE),
            "limit": integer(minimum=1, maximum=50),
        }
    ),
    "fetch_page": record({"url": URI, "max_chars": integer(minimum=100, maximum=100_000)}),
    "create_event": record(
        {
            "title": TEXT,
            "start": MOMENT,
            "minutes": integer(minimum=5, maximum=1440, multipleOf=5),
            "attendees": listed(EMAIL, maxItems=20),
            "repeat": maybe(
                record(
                    {
                        "every": choice("day", "week", "month", "year"),
                        "times": integer(minimum=1, maximum=100),
                    }
                )
            ),
        }
    ),
    "find_free_slots": record(
        {
            "from": text(format="time"),
            "to": text(format="time"),
            "on": listed(choice("mon", "tue", "wed", "thu", "fri"), minItems=1, maxItems=5),
        }
    ),
    "send_mail": record(
        {
            "to": listed(EMAIL, minItems=1),
            "cc": listed(EMAIL),
            "subject": text(maxLength=120),
            "body": TEXT,
        },
        optional=["cc"],
    ),
    "query_table": record(
        {
            "table": choice("orders", "customers", "products"),
            "columns": {"anyOf": [{"const": "*"}, listed(_COLUMN, minItems=1)]},
            "where": listed(
                {
                    "anyOf": [
                        record(
                            {
                                "column": _COLUMN,
                                "op": choice("=", "!=", "<", ">", "like"),
                                "value": _SCALAR,
                            }
                        ),
                        record(
                            {
                                "column": _COLUMN,
                                "op": {"const": "in"},
                                "values": listed(_SCALAR, minItems=1),
                            }
                        ),
                        record({"column": _COLUMN, "op": choice("is null", "is not null")}),
                    ]
                }
            ),
            "order_by": listed(record({"column": _COLUMN, "desc": BOOLEAN})),
            "limit": integer(minimum=1, maximum=1000),
        },
        optional=["where", "order_by"],
    ),
    "run_sql": record({"sql": text(pattern="^SELECT [^;]+;$"), "timeout_s": _SECONDS}),
    "calculator": record({"expression": text(pattern=r"^[0-9+*/(). -]+$")}),
    "convert_units": record({"value": NUMBER, "from": TEXT, "to": TEXT}),
    "convert_currency": record(
        {
            "amount": number(exclusiveMinimum=0),
            "from": text(pattern="^[A-Z]{3}$"),
            "to": text(pattern="^[A-Z]{3}$"),
        }
    ),
    "no arguments": record({}),
    "read_file": record(
        {
            "path": text(pattern="^[^\\x00]{1,200}$"),
            "lines": {
                "type": "array",
                "prefixItems": [integer(minimum=1), integer(minimum=1)],
                "minItems": 2,
                "items": False,
            },
        },
        optional=["lines"],
    ),
    "edit_file": record(
        {
            "path": TEXT,
            "edits": listed(record({"old": text(minLength=1), "new": TEXT, "all": BOOLEAN})),
        }
    ),
    "run_command": record(
        {
            "argv": listed(text(minLength=1), minItems=1),
            "env": {"type": "object", "additionalProperties": TEXT},
            "cwd": nullable(TEXT),
        },
        optional=["env", "cwd"],
    ),
    "python": record({"code": text(minLength=1)}),
    "draw_chart": record(
        {
            "kind": choice("line", "bar", "pie", "scatter"),
            "series": listed(
                record(
                    {
                        "name": TEXT,
                        "points": listed(
                            {
                                "type": "array",
                                "prefixItems": [NUMBER, NUMBER],
                                "items": False,
                                "minItems": 2,
                            }
                        ),
                    }
                ),
                minItems=1,
            ),
            "axes": record({"x": TEXT, "y": TEXT}),
        }
    ),
    "book_table": record(
        {
            "restaurant": TEXT,
            "guests": integer(minimum=1, maximum=12),
            "at": MOMENT,
            "seating": choice("inside", "outside", "any"),
        },
        optional=["seating"],
    ),
    "translate": record({"text": TEXT, "to": {"enum": ["de", "en", "fr", "es", "pt", "ja"]}}),
    "set_thermostat": record(
        {"room": TEXT, "celsius": number(minimum=5, maximum=30, multipleOf=0.5)}
    ),
    "play_music": {
        "oneOf": [
            record({"track": TEXT, "artist": TEXT}),
            record({"playlist": TEXT, "shuffle": BOOLEAN}),
            record({"station": number(minimum=87.5, maximum=108)}),
        ]
    },
    "transfer_call": record({"to": choice("sales", "support"), "reason": text(maxLength=100)}),
    "robot_moves": listed(
        {
            "anyOf": [
                record({"move": {"const": "forward"}, "cm": integer(minimum=1, maximum=500)}),
                record({"move": {"const": "turn"}, "degrees": integer(minimum=-180, maximum=180)}),
                record({"move": {"const": "grip"}, "closed": BOOLEAN}),
            ]
        },
        minItems=1,
    ),
    "choice of tools": {
        "anyOf": [
            record({"name": {"const": "add"}, "arguments": record({"a": INTEGER, "b": INTEGER})}),
            record({"name": {"const": "now"}, "arguments": record({})}),
            record({"name": {"const": "ask"}, "arguments": ref("question")}),
        ],
        "$defs": {"question": record({"question": TEXT, "options": listed(TEXT)})},
    },
    "parallel tools": listed(
        record(
            {
                "id": text(pattern="^call_[0-9a-f]{8}$"),
                "function": choice("search", "open"),
                "arguments": {"type": "object"},
            }
        ),
        minItems=1,
        maxItems=4,
    ),
}
