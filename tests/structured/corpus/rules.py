"""Rules and switches that people set: alerts, firewalls, linters, shortcuts."""

from __future__ import annotations

from typing import Any

from tests.structured.builders import (
    BOOLEAN,
    INTEGER,
    NUMBER,
    TEXT,
    Schema,
    choice,
    integer,
    listed,
    record,
    text,
)

_PORT = integer(minimum=1, maximum=65_535)


def _named(item: Schema, key: str = "^[a-z][a-z0-9-]*$", **rules: Any) -> Schema:
    """A map from names of this form."""
    return {
        "type": "object",
        "patternProperties": {key: item},
        "additionalProperties": False,
        **rules,
    }


RULES: dict[str, Schema] = {
    "feature flags": _named(
        {
            "anyOf": [
                BOOLEAN,
                record({"percent": integer(minimum=0, maximum=100)}),
                record({"only_for": listed(TEXT, minItems=1)}),
            ]
        },
        key="^[a-z_]+$",
    ),
    "logging": record(
        {
            "level": choice("debug", "info", "warning", "error"),
            "handlers": listed(
                {
                    "oneOf": [
                        record({"kind": {"const": "console"}, "colour": BOOLEAN}),
                        record({"kind": {"const": "file"}, "path": TEXT, "keep": INTEGER}),
                        record({"kind": {"const": "syslog"}, "host": TEXT, "port": _PORT}),
                    ]
                },
                minItems=1,
            ),
        }
    ),
    "firewall rules": listed(
        record(
            {
                "action": choice("allow", "deny"),
                "from": text(format="ipv4"),
                "prefix": integer(minimum=0, maximum=32),
                "ports": {"anyOf": [{"const": "any"}, listed(_PORT, minItems=1, maxItems=10)]},
            }
        ),
        maxItems=20,
    ),
    "cron jobs": listed(
        record(
            {
                "when": text(pattern=r"^((\*|[0-9]{1,2})(/[0-9]{1,2})? ){4}(\*|[0-6])$"),
                "run": TEXT,
                "enabled": BOOLEAN,
            }
        )
    ),
    "lint rules": _named(
        {
            "anyOf": [
                choice("off", "warn", "error"),
                {
                    "type": "array",
                    "prefixItems": [choice("warn", "error"), {"type": "object"}],
                    "minItems": 2,
                    "items": False,
                },
            ]
        },
        key="^[a-z]+(-[a-z]+)*$",
    ),
    "alerts": listed(
        record(
            {
                "metric": TEXT,
                "op": choice("<", "<=", ">", ">=", "=="),
                "threshold": NUMBER,
                "for": text(format="duration"),
                "notify": listed(choice("mail", "pager", "chat"), minItems=1),
            }
        ),
        minItems=1,
    ),
    "keyboard shortcuts": listed(
        record(
            {
                "keys": text(pattern="^((ctrl|alt|shift)\\+)*([a-z]|f[1-9]|enter|esc)$"),
                "command": text(pattern=r"^[a-z]+(\.[a-zA-Z]+)+$"),
                "args": {"type": ["object", "array", "null"]},
            },
            optional=["args"],
        )
    ),
}
