"""Texts: formats, patterns, lengths."""

from __future__ import annotations

from tests.structured.builders import TEXT, Schema, listed, record, text

FORMATS = (
    "date",
    "time",
    "date-time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uuid",
    "uri",
)

STRINGS: dict[str, Schema] = {
    **{f"a text of format {name}": text(format=name) for name in FORMATS},
    "texts of all formats": record({name.replace("-", "_"): text(format=name) for name in FORMATS}),
    "any text": TEXT,
    "an empty text": text(maxLength=0),
    "a text of one character": text(minLength=1, maxLength=1),
    "a text of 5 to 10 characters": text(minLength=5, maxLength=10),
    "a text of 100 characters": text(minLength=100, maxLength=100),
    "a text of up to 2,000 characters": text(maxLength=2000),
    "a hexadecimal digest": text(pattern="^[0-9a-f]{64}$"),
    "a semantic version": text(
        pattern=r"^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?$"
    ),
    "a slug": text(pattern="^[a-z0-9]+(?:-[a-z0-9]+)*$"),
    "a colour": text(pattern="^#(?:[0-9a-fA-F]{3}){1,2}$"),
    "a phone number": text(pattern=r"^\+[1-9]\d{6,14}$"),
    "a licence plate": text(pattern="^[A-ZÄÖÜ]{1,3}-[A-Z]{1,2} [1-9][0-9]{0,3}$"),
    "a Roman numeral": text(pattern="^M{0,3}(CM|CD|D?C{0,3})(XC|XL|L?X{0,3})(IX|IV|V?I{0,3})$"),
    "a move of chess": text(pattern="^([KQRBN]?[a-h]?x?[a-h][1-8](=[QRBN])?[+#]?|O-O(-O)?)$"),
    "Base64": text(pattern="^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"),
    "a path with quotes and backslashes": text(pattern=r'^[A-Z]:\\("[a-z ]+"\\){1,4}$'),
    "a pattern without anchors": text(pattern="cat|dog"),
    "a pattern with one anchor": text(pattern="^https://"),
    "a pattern with a length": text(pattern="^[a-z ]+$", minLength=5, maxLength=20),
    "a pattern of any character": text(pattern="^.{3,6}$"),
    "a pattern of line breaks": text(pattern="^[a-z]+(\n[a-z]+){1,3}$"),
    "a pattern of tabs and controls": text(pattern="^\\t[\\x01-\\x1f]{1,3}$"),
    "a pattern of Greek letters": text(pattern="^[α-ω]+( [α-ω]+)*$"),
    "a pattern of words and spaces": text(pattern=r"^\w+\s\w+\S$"),
    "a pattern of emoji": text(pattern="^[😀-😏]{1,4}$"),
    "a pattern of Chinese": text(pattern="^[一-龥]{2,8}$"),
    "a pattern of three choices": text(pattern="^(yes|no|don't know)$"),
    "a pattern with lazy repetition": text(pattern="^a+?b*?c{2,3}?$"),
    "texts of several patterns": listed(
        {"anyOf": [text(pattern="^[0-9]{3}$"), text(pattern="^[a-z]{3}$"), text(minLength=7)]},
        maxItems=3,
    ),
    "a constant text": {"const": "the only answer"},
    "a constant with escapes": {"const": 'tab\t, quote ", backslash \\, line\nend, é, 😀, \u0007'},
    "an enum of texts with escapes": {"enum": ["a/b", "a\\b", 'a"b', "a\nb", "\u007f", "ünï", ""]},
}
