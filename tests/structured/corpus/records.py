"""What is pulled out of documents: invoices, people, places, events."""

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

_MONEY = record({"amount": number(minimum=0), "currency": text(pattern="^[A-Z]{3}$")})
_ADDRESS = record(
    {
        "street": TEXT,
        "city": text(minLength=1, maxLength=80),
        "postcode": text(pattern=r"^[0-9A-Z -]{3,10}$"),
        "country": text(minLength=2, maxLength=2),
    },
    optional=["postcode"],
)
_YEAR = integer(minimum=1900, maximum=2100)

RECORDS: dict[str, Schema] = {
    "invoice": record(
        {
            "number": text(pattern="^INV-[0-9]{4,8}$"),
            "issued": DATE,
            "due": DATE,
            "seller": ref("party"),
            "buyer": ref("party"),
            "lines": listed(ref("line"), minItems=1),
            "total": ref("money"),
        },
        **{
            "$defs": {
                "money": _MONEY,
                "party": record({"name": TEXT, "vat_id": nullable(TEXT), "address": _ADDRESS}),
                "line": record(
                    {
                        "description": TEXT,
                        "quantity": number(exclusiveMinimum=0),
                        "unit_price": ref("money"),
                    }
                ),
            }
        },
    ),
    "receipt": record(
        {
            "merchant": TEXT,
            "time": MOMENT,
            "items": listed(record({"name": TEXT, "price": number(minimum=0)})),
            "tax": number(minimum=0),
            "total": number(minimum=0),
            "paid_by": choice("cash", "card", "voucher"),
        },
        optional=["tax", "paid_by"],
    ),
    "résumé": record(
        {
            "name": TEXT,
            "email": EMAIL,
            "links": listed(URI, maxItems=3),
            "work": listed(
                record(
                    {
                        "employer": TEXT,
                        "role": TEXT,
                        "from": text(pattern="^[0-9]{4}-(0[1-9]|1[0-2])$"),
                        "to": nullable(text(pattern="^[0-9]{4}-(0[1-9]|1[0-2])$")),
                        "highlights": listed(text(maxLength=200), maxItems=4),
                    }
                )
            ),
            "education": listed(record({"school": TEXT, "degree": TEXT, "year": _YEAR})),
            "skills": listed(text(minLength=1)),
        }
    ),
    "contact": record(
        {
            "name": TEXT,
            "emails": listed(EMAIL),
            "phones": listed(text(pattern=r"^\+?[0-9][0-9 ()-]{5,18}$")),
            "birthday": maybe(DATE),
        }
    ),
    "postal address": _ADDRESS,
    "event announcement": record(
        {
            "title": TEXT,
            "starts": MOMENT,
            "ends": maybe(MOMENT),
            "place": {"anyOf": [record({"venue": TEXT, "city": TEXT}), record({"online": URI})]},
            "free": BOOLEAN,
        }
    ),
    "person of a sentence": record(
        {"name": TEXT, "age": maybe(INTEGER), "occupation": maybe(TEXT)}
    ),
    "recipe": record(
        {
            "title": TEXT,
            "serves": integer(minimum=1, maximum=24),
            "ingredients": listed(
                record(
                    {
                        "item": TEXT,
                        "quantity": number(minimum=0),
                        "unit": choice("g", "kg", "ml", "l", "tsp", "tbsp", "piece"),
                    },
                    optional=["quantity", "unit"],
                ),
                minItems=2,
            ),
            "steps": listed(text(minLength=5), minItems=1, maxItems=12),
        }
    ),
    "flight booking": record(
        {
            "locator": text(pattern="^[A-Z0-9]{6}$"),
            "legs": listed(
                record(
                    {
                        "flight": text(pattern="^[A-Z]{2}[0-9]{1,4}$"),
                        "from": text(pattern="^[A-Z]{3}$"),
                        "to": text(pattern="^[A-Z]{3}$"),
                        "departs": MOMENT,
                        "seat": maybe(text(pattern="^[1-9][0-9]?[A-K]$")),
                    }
                ),
                minItems=1,
                maxItems=4,
            ),
        }
    ),
    "medical note": record(
        {
            "symptoms": listed(record({"name": TEXT, "days": integer(minimum=0)})),
            "medication": listed(
                record({"name": TEXT, "dose_mg": number(minimum=0), "per_day": integer(minimum=1)})
            ),
            "allergies": listed(TEXT),
            "follow_up": BOOLEAN,
        }
    ),
    "contract clauses": listed(
        record(
            {
                "clause": text(pattern=r"^[0-9]+(\.[0-9]+)*$"),
                "kind": choice("payment", "liability", "termination", "confidentiality", "other"),
                "summary": text(maxLength=300),
                "deadline": maybe(DATE),
            }
        )
    ),
    "job advertisement": record(
        {
            "title": TEXT,
            "remote": choice("no", "partly", "fully"),
            "salary": maybe(
                record({"from": integer(minimum=0), "to": integer(minimum=0), "per": TEXT})
            ),
            "must_have": listed(TEXT),
            "nice_to_have": listed(TEXT),
        }
    ),
    "business card": {
        "type": "object",
        "properties": {"name": TEXT, "company": TEXT, "title": TEXT, "email": EMAIL, "web": URI},
    },
    "bank statement line": record(
        {
            "booked": DATE,
            "iban": text(pattern="^[A-Z]{2}[0-9]{2}[A-Z0-9]{11,30}$"),
            "amount": number(multipleOf=0.01),
            "purpose": TEXT,
        }
    ),
    "book citation": record(
        {
            "authors": listed(record({"family": TEXT, "given": TEXT}), minItems=1),
            "title": TEXT,
            "year": _YEAR,
            "isbn": maybe(text(pattern="^97[89][0-9]{10}$")),
            "pages": maybe(text(pattern="^[0-9]+-[0-9]+$")),
        }
    ),
    "real estate listing": record(
        {
            "rooms": number(multipleOf=0.5, minimum=1, maximum=20),
            "area_m2": number(exclusiveMinimum=0),
            "energy_class": choice("A+", "A", "B", "C", "D", "E", "F", "G", "H"),
            "features": listed(choice("balcony", "garden", "garage", "lift", "cellar")),
            "available_from": DATE,
        }
    ),
    "weather observation": record(
        {
            "station": text(pattern="^[0-9]{5}$"),
            "celsius": number(minimum=-90, maximum=60),
            "humidity": integer(minimum=0, maximum=100),
            "wind": record({"degrees": integer(minimum=0, exclusiveMaximum=360), "knots": NUMBER}),
        }
    ),
    "meeting minutes": record(
        {
            "present": listed(TEXT, minItems=2),
            "decisions": listed(TEXT),
            "actions": listed(record({"who": TEXT, "what": TEXT, "until": maybe(DATE)})),
            "next": maybe(MOMENT),
        }
    ),
    "sports result": record(
        {
            "home": TEXT,
            "away": TEXT,
            "score": {
                "type": "array",
                "prefixItems": [integer(minimum=0), integer(minimum=0)],
                "items": False,
                "minItems": 2,
            },
            "scorers": listed(record({"player": TEXT, "minute": integer(minimum=1, maximum=120)})),
        }
    ),
    "patent header": record(
        {
            "number": text(pattern="^(EP|US|WO)[0-9]{6,12}[A-C][0-9]?$"),
            "filed": DATE,
            "classes": listed(text(pattern="^[A-H][0-9]{2}[A-Z] [0-9]{1,4}/[0-9]{2,6}$")),
            "inventors": listed(TEXT, minItems=1),
        }
    ),
    "chemical safety": record(
        {
            "substance": TEXT,
            "cas": text(pattern="^[0-9]{2,7}-[0-9]{2}-[0-9]$"),
            "hazards": listed(text(pattern="^H[2-4][0-9]{2}$")),
            "flash_point_c": nullable(NUMBER),
        }
    ),
}
