"""Numbers: ranges, multiples, constants."""

from __future__ import annotations

from tests.structured.builders import INTEGER, NUMBER, Schema, integer, listed, number, record

NUMBERS: dict[str, Schema] = {
    "any number": NUMBER,
    "any whole number": INTEGER,
    "a whole number of 0 to 255": integer(minimum=0, maximum=255),
    "a whole number above 5 and below 8": integer(exclusiveMinimum=5, exclusiveMaximum=8),
    "a whole number of -17 to 42": integer(minimum=-17, maximum=42),
    "a negative whole number": integer(maximum=-1),
    "a whole number from a million on": integer(minimum=1_000_000),
    "a 32-bit number": integer(minimum=-(2**31), maximum=2**31 - 1, format="int32"),
    "a 53-bit number": integer(minimum=-(2**53) + 1, maximum=2**53 - 1),
    "a positive number": number(exclusiveMinimum=0),
    "a share": number(minimum=0, maximum=1),
    "a share without its ends": number(exclusiveMinimum=0, exclusiveMaximum=1),
    "a number of -2.5 to 7.25": number(minimum=-2.5, maximum=7.25),
    "a tiny range": number(minimum=0.001, maximum=0.002),
    "a wide range": number(minimum=-1_000_000.5, maximum=1_000_000.5),
    "a range that is one number": number(minimum=3.5, maximum=3.5),
    "a range between whole numbers": number(exclusiveMinimum=99, maximum=100),
    "a multiple of 7": integer(multipleOf=7),
    "a multiple of 15 in a range": integer(multipleOf=15, minimum=0, maximum=1440),
    "a multiple of a quarter": number(multipleOf=0.25, minimum=0, maximum=24),
    "an amount in cents": number(multipleOf=0.01),
    "a whole number as a multiple": number(multipleOf=1),
    "multiples of 4 and of 6": {"type": "integer", "allOf": [{"multipleOf": 4}, {"multipleOf": 6}]},
    "a constant number": {"const": 42},
    "a constant fraction": {"const": -0.125},
    "an enum of numbers": {"enum": [0, 1, 1.5, -3, 1000000]},
    "an enum of HTTP states": integer(enum=[200, 201, 204, 301, 400, 401, 403, 404, 500]),
    "a position": record(
        {"lat": number(minimum=-90, maximum=90), "lon": number(minimum=-180, maximum=180)}
    ),
    "a vector": listed(number(minimum=-1, maximum=1), minItems=8, maxItems=8),
    "a histogram": listed(
        record({"from": NUMBER, "to": NUMBER, "count": integer(minimum=0)}), minItems=1, maxItems=20
    ),
}
