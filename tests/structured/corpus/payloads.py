"""What services send each other: orders, payments, webhooks, pages of results, maps."""

from __future__ import annotations

from tests.structured.builders import (
    BOOLEAN,
    EMAIL,
    INTEGER,
    MOMENT,
    NUMBER,
    TEXT,
    URI,
    UUID,
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

_CENTS = integer(minimum=0, maximum=99_999_999)
_POSITION: Schema = {
    "type": "array",
    "prefixItems": [number(minimum=-180, maximum=180), number(minimum=-90, maximum=90)],
    "items": False,
    "minItems": 2,
}


def _geometry(kind: str, coordinates: Schema) -> Schema:
    return record({"type": {"const": kind}, "coordinates": coordinates})


def _page(item: Schema) -> Schema:
    """One page of results behind a cursor."""
    return record({"data": listed(item), "has_more": BOOLEAN, "next_cursor": nullable(TEXT)})


def _webhook(**events: Schema) -> Schema:
    """An envelope whose content follows from its type."""
    return {
        "oneOf": [
            record({"id": UUID, "type": {"const": name}, "created": INTEGER, "data": data})
            for name, data in events.items()
        ]
    }


_GEOMETRIES = [
    _geometry("Point", _POSITION),
    _geometry("MultiPoint", listed(_POSITION)),
    _geometry("LineString", listed(_POSITION, minItems=2)),
    _geometry("Polygon", listed(listed(_POSITION, minItems=4), minItems=1)),
]

PAYLOADS: dict[str, Schema] = {
    "order": record(
        {
            "id": UUID,
            "customer": record({"id": INTEGER, "email": EMAIL}),
            "items": listed(
                record(
                    {
                        "sku": text(pattern="^[A-Z]{3}-[0-9]{5}$"),
                        "quantity": integer(minimum=1, maximum=999),
                        "cents": _CENTS,
                    }
                ),
                minItems=1,
                maxItems=50,
            ),
            "status": choice("new", "paid", "shipped", "returned", "cancelled"),
            "notes": maybe(text(maxLength=500)),
        }
    ),
    "payment": record(
        {
            "amount": _CENTS,
            "currency": choice("EUR", "USD", "GBP", "JPY"),
            "source": {
                "oneOf": [
                    record(
                        {
                            "object": {"const": "card"},
                            "last4": text(pattern="^[0-9]{4}$"),
                            "exp_month": integer(minimum=1, maximum=12),
                            "exp_year": integer(minimum=2024, maximum=2040),
                        }
                    ),
                    record({"object": {"const": "iban"}, "iban": text(minLength=15, maxLength=34)}),
                    record({"object": {"const": "wallet"}, "token": UUID}),
                ]
            },
            "metadata": {"type": "object", "additionalProperties": TEXT},
        }
    ),
    "refund request": record(
        {"payment": UUID, "reason": choice("duplicate", "fraud", "wish"), "cents": maybe(_CENTS)},
        optional=["cents"],
    ),
    "webhook": _webhook(
        **{
            "invoice.paid": record({"invoice": UUID, "cents": _CENTS}),
            "invoice.failed": record(
                {"invoice": UUID, "code": choice("funds", "expired", "stolen")}
            ),
            "customer.created": record({"email": EMAIL, "name": nullable(TEXT)}),
            "customer.deleted": record({"id": INTEGER}),
        }
    ),
    "repository webhook": _webhook(
        push=record(
            {
                "branch": TEXT,
                "commits": listed(
                    record(
                        {"sha": text(pattern="^[0-9a-f]{40}$"), "message": TEXT, "author": EMAIL}
                    )
                ),
            }
        ),
        release=record({"tag": text(pattern=r"^v[0-9]+\.[0-9]+\.[0-9]+$"), "draft": BOOLEAN}),
        star=record({"user": TEXT}),
    ),
    "point of GeoJSON": _GEOMETRIES[0],
    "geometry of GeoJSON": {"anyOf": _GEOMETRIES},
    "features of GeoJSON": record(
        {
            "type": {"const": "FeatureCollection"},
            "features": listed(
                record(
                    {
                        "type": {"const": "Feature"},
                        "geometry": maybe({"anyOf": _GEOMETRIES}),
                        "properties": {"type": ["object", "null"]},
                    }
                )
            ),
        }
    ),
    "page of users": _page(record({"id": INTEGER, "login": TEXT, "admin": BOOLEAN})),
    "page of anything": _page({}),
    "page by numbers": record(
        {
            "items": listed(TEXT, maxItems=20),
            "page": integer(minimum=1),
            "pages": integer(minimum=1),
            "links": record({"prev": maybe(URI), "next": maybe(URI)}),
        }
    ),
    "problem details": {
        "type": "object",
        "properties": {
            "type": {"type": "string", "format": "uri", "default": "about:blank"},
            "title": TEXT,
            "status": integer(minimum=100, maximum=599),
            "detail": TEXT,
        },
        "required": ["title", "status"],
        "additionalProperties": True,
    },
    "JSON-RPC request": record(
        {
            "jsonrpc": {"const": "2.0"},
            "method": text(minLength=1),
            "params": {"anyOf": [{"type": "object"}, {"type": "array"}]},
            "id": {"type": ["string", "integer", "null"]},
        },
        optional=["params", "id"],
    ),
    "JSON-RPC answer": {
        "anyOf": [
            record({"jsonrpc": {"const": "2.0"}, "result": {}, "id": INTEGER}),
            record(
                {
                    "jsonrpc": {"const": "2.0"},
                    "error": record(
                        {"code": INTEGER, "message": TEXT, "data": {}}, optional=["data"]
                    ),
                    "id": nullable(INTEGER),
                }
            ),
        ]
    },
    "JSON Patch": listed(
        {
            "oneOf": [
                record({"op": {"const": op}, "path": text(pattern="^(/[^/]*)*$"), "value": {}})
                for op in ("add", "replace", "test")
            ]
            + [record({"op": {"const": "remove"}, "path": TEXT})]
            + [record({"op": {"const": op}, "from": TEXT, "path": TEXT}) for op in ("move", "copy")]
        }
    ),
    "shipment tracking": record(
        {
            "carrier": choice("post", "parcel", "freight"),
            "code": text(pattern="^[A-Z]{2}[0-9]{9}[A-Z]{2}$"),
            "events": listed(
                record({"at": MOMENT, "place": TEXT, "state": choice("in", "out", "held", "done")})
            ),
        }
    ),
    "exchange rates": record(
        {
            "base": text(pattern="^[A-Z]{3}$"),
            "rates": {
                "type": "object",
                "patternProperties": {"^[A-Z]{3}$": number(exclusiveMinimum=0)},
                "additionalProperties": False,
            },
        }
    ),
    "chat message": record(
        {
            "role": choice("system", "user", "assistant", "tool"),
            "content": {
                "anyOf": [
                    TEXT,
                    listed(
                        {
                            "anyOf": [
                                record({"type": {"const": "text"}, "text": TEXT}),
                                record({"type": {"const": "image_url"}, "image_url": URI}),
                            ]
                        }
                    ),
                ]
            },
            "name": text(pattern="^[a-zA-Z0-9_-]{1,64}$"),
        },
        optional=["name"],
    ),
    "metrics batch": listed(
        record(
            {
                "name": text(pattern="^[a-z][a-z0-9_.]*$"),
                "kind": choice("counter", "gauge"),
                "value": NUMBER,
                "labels": {"type": "object", "additionalProperties": TEXT},
                "at_ms": integer(minimum=0),
            },
            optional=["labels"],
        ),
        minItems=1,
    ),
    "sensor frames": record(
        {
            "device": text(pattern="^([0-9A-F]{2}:){5}[0-9A-F]{2}$"),
            "frames": listed(listed(number(minimum=-1, maximum=1), minItems=3, maxItems=3)),
        }
    ),
    "user profile": record(
        {
            "id": UUID,
            "handle": text(pattern="^[a-z0-9_]{3,20}$"),
            "avatar": nullable(URI),
            "settings": record(
                {"theme": choice("light", "dark"), "volume": integer(minimum=0, maximum=10)},
                optional=["theme", "volume"],
            ),
            "followers": integer(minimum=0),
        }
    ),
    "ledger transfer": record(
        {
            "from": ref("account"),
            "to": ref("account"),
            "amount": text(pattern=r"^(0|[1-9][0-9]{0,11})\.[0-9]{2}$"),
        },
        **{"$defs": {"account": record({"bank": integer(minimum=1), "account": TEXT})}},
    ),
}
