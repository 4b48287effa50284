"""Files that tools read: pipelines, containers, packages, services."""

from __future__ import annotations

from typing import Any

from tests.structured.builders import (
    BOOLEAN,
    NUMBER,
    TEXT,
    URI,
    Schema,
    choice,
    integer,
    listed,
    number,
    record,
    ref,
    text,
)

_VERSION = text(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+(-[a-z0-9.]+)?$")
_ENVIRONMENT: Schema = {
    "type": "object",
    "patternProperties": {"^[A-Z_][A-Z0-9_]*$": {"type": ["string", "number", "boolean"]}},
    "additionalProperties": False,
}
_PORT = integer(minimum=1, maximum=65_535)
_SIZE = text(pattern="^[1-9][0-9]*(Ki|Mi|Gi)$")


def _named(item: Schema, key: str = "^[a-z][a-z0-9-]*$", **rules: Any) -> Schema:
    """A map from names of this form."""
    return {
        "type": "object",
        "patternProperties": {key: item},
        "additionalProperties": False,
        **rules,
    }


CONFIGS: dict[str, Schema] = {
    "pipeline": record(
        {
            "on": listed(choice("push", "pull_request", "schedule"), minItems=1),
            "env": _ENVIRONMENT,
            "jobs": _named(
                record(
                    {
                        "runs_on": choice("linux", "macos", "windows"),
                        "needs": listed(TEXT),
                        "steps": listed(
                            {
                                "anyOf": [
                                    record({"uses": text(pattern="^[a-z-]+/[a-z-]+@v[0-9]+$")}),
                                    record({"run": TEXT, "shell": TEXT}, optional=["shell"]),
                                ]
                            },
                            minItems=1,
                        ),
                        "timeout": integer(minimum=1, maximum=360),
                    },
                    optional=["needs", "timeout"],
                )
            ),
        },
        optional=["env"],
    ),
    "container": record(
        {
            "image": text(pattern="^[a-z0-9./-]+:[a-z0-9.-]+$"),
            "command": listed(TEXT),
            "env": _ENVIRONMENT,
            "ports": listed(record({"host": _PORT, "container": _PORT})),
            "restart": choice("no", "always", "on-failure"),
        },
        optional=["command", "env", "ports"],
    ),
    "services": record(
        {
            "version": {"const": "3"},
            "services": _named(
                {
                    "type": "object",
                    "properties": {
                        "image": TEXT,
                        "build": {"anyOf": [TEXT, record({"context": TEXT, "target": TEXT})]},
                        "depends_on": listed(TEXT),
                        "volumes": listed(text(pattern="^[^:]+:[^:]+(:ro)?$")),
                    },
                    "additionalProperties": False,
                }
            ),
        }
    ),
    "deployment": record(
        {
            "apiVersion": {"const": "apps/v1"},
            "kind": {"const": "Deployment"},
            "metadata": record({"name": text(pattern="^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")}),
            "spec": record(
                {
                    "replicas": integer(minimum=0, maximum=100),
                    "containers": listed(
                        record(
                            {
                                "name": TEXT,
                                "image": TEXT,
                                "resources": record({"cpu": number(minimum=0.1), "memory": _SIZE}),
                            }
                        ),
                        minItems=1,
                    ),
                }
            ),
        }
    ),
    "package manifest": record(
        {
            "name": text(pattern="^(@[a-z0-9-]+/)?[a-z0-9-]+$"),
            "version": _VERSION,
            "private": BOOLEAN,
            "scripts": {"type": "object", "additionalProperties": TEXT},
            "dependencies": {
                "type": "object",
                "additionalProperties": text(pattern=r"^[\^~]?[0-9]+(\.[0-9]+){0,2}$"),
            },
        },
        optional=["private", "scripts"],
    ),
    "editor settings": {
        "type": "object",
        "properties": {
            "tabSize": integer(minimum=1, maximum=8, default=4),
            "rulers": listed(integer(minimum=40, maximum=200)),
            "wordWrap": {"enum": ["on", "off", 80, 100]},
            "theme": TEXT,
        },
        "additionalProperties": False,
    },
    "proxy": record(
        {
            "listen": _PORT,
            "hosts": listed(text(format="hostname"), minItems=1),
            "routes": listed(
                record(
                    {
                        "match": text(pattern="^/[a-z0-9/*-]*$"),
                        "to": URI,
                        "retries": integer(minimum=0, maximum=5),
                        "headers": {"type": "object", "additionalProperties": TEXT},
                    },
                    optional=["retries", "headers"],
                )
            ),
        }
    ),
    "training run": record(
        {
            "model": choice("tiny", "base", "large"),
            "optimizer": {
                "anyOf": [
                    record({"name": {"const": "sgd"}, "momentum": number(minimum=0, maximum=1)}),
                    record(
                        {
                            "name": {"const": "adam"},
                            "betas": {
                                "type": "array",
                                "prefixItems": [number(minimum=0), number(minimum=0)],
                                "minItems": 2,
                                "maxItems": 2,
                            },
                        }
                    ),
                ]
            },
            "lr": number(exclusiveMinimum=0, maximum=1),
            "batch": integer(minimum=8, multipleOf=8, maximum=4096),
            "epochs": integer(minimum=1),
        }
    ),
    "database": record(
        {
            "url": text(pattern="^(postgres|mysql)://[a-z0-9.:@/_-]+$"),
            "pool": record({"min": integer(minimum=0), "max": integer(minimum=1, maximum=100)}),
            "ssl": {"anyOf": [{"const": False}, record({"ca": TEXT, "verify": BOOLEAN})]},
        },
        optional=["pool", "ssl"],
    ),
    "infrastructure": record(
        {
            "region": text(pattern="^[a-z]{2}-(north|south|east|west|central)-[1-9]$"),
            "resources": listed(
                {
                    "oneOf": [
                        record({"type": {"const": "bucket"}, "name": TEXT, "versioned": BOOLEAN}),
                        record({"type": {"const": "queue"}, "name": TEXT, "fifo": BOOLEAN}),
                        record({"type": {"const": "table"}, "name": TEXT, "keys": ref("keys")}),
                    ]
                }
            ),
            "tags": {"type": "object", "additionalProperties": text(maxLength=64)},
        },
        **{"$defs": {"keys": listed(choice("hash", "range"), minItems=1, maxItems=2)}},
    ),
    "theme": record(
        {
            "colours": {
                "type": "object",
                "additionalProperties": text(pattern="^#[0-9a-fA-F]{6}$"),
                "minProperties": 1,
                "maxProperties": 8,
            },
            "radius": integer(enum=[0, 2, 4, 8]),
            "scale": NUMBER,
        }
    ),
    "translations": {
        "type": "object",
        "patternProperties": {
            "^[a-z]{2}(-[A-Z]{2})?$": {"type": "object", "additionalProperties": TEXT}
        },
        "additionalProperties": False,
    },
    "build matrix": record(
        {
            "python": listed(text(pattern=r"^3\.(9|1[0-4])$"), minItems=1),
            "os": listed(choice("ubuntu", "alpine", "debian"), minItems=1),
            "exclude": listed({"type": "object", "additionalProperties": TEXT, "minProperties": 1}),
        },
        optional=["exclude"],
    ),
}
