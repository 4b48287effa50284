"""Words and numbers as a page for people shows them."""

from __future__ import annotations

from html import escape
from itertools import pairwise
from math import floor, log10

_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))
_NICE_STEPS = (1, 2, 5)
_NICE_TIMES = (1, 2, 5, 10, 15, 30)
_MINUTE, _HOUR, _DAY = 60, 3600, 86400
NONE = "–"


def text(value: object) -> str:
    """Anything as HTML: nothing in it is markup, and it can be written as UTF-8.

    Control characters and halves of surrogate pairs become U+FFFD.
    """
    return escape("".join(char if _is_shown(char) else "\ufffd" for char in str(value)))


def _is_shown(char: str) -> bool:
    code = ord(char)
    if code < 0xA0:
        return char in "\t\n" or not (code < 0x20 or code >= 0x7F)
    return not 0xD800 <= code < 0xE000 and code & 0xFFFE != 0xFFFE


def number(value: float | None, digits: int = 3) -> str:
    """A number to read: whole ones in full, others to so many significant digits."""
    if value is None:
        return NONE
    if value == int(value):
        return f"{int(value):,}"
    decimals = max(0, digits - 1 - floor(log10(abs(value))))
    shown = f"{value:,.{decimals}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def short(value: float) -> str:
    """A number in the width of a label: 1,500 is 1.5k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return number(value / size) + letter
    return number(value)


def seconds(value: float | None) -> str:
    """A time to read, to three digits: 12 ms, 3.4 s, 5 min 20 s, 2 h 5 min."""
    if value is None:
        return NONE
    if 0 < value < 1:
        return f"{number(value * 1000)} ms"
    if value < _MINUTE:
        return f"{number(value)} s"
    whole = round(value)
    for (size, unit), (smaller, smaller_unit) in pairwise(_UNITS):
        if whole >= size:
            large, rest = int(whole // size), int(whole % size // smaller)
            return f"{large:,} {unit} {rest} {smaller_unit}" if rest else f"{large:,} {unit}"
    return f"{whole} s"


def share(part: float, whole: float) -> str:
    """A part of a whole in percent; never 0 or 100 if it isn't. Nothing of nothing."""
    if not whole:
        return ""
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "< 0.1 %"
    if 99.9 < percent < 100:
        return "> 99.9 %"
    return f"{number(round(percent, 1))} %"


def nice_step(span: float, most: int) -> float:
    """The smallest step of 1, 2 or 5 times a power of ten that fits a span at most so often."""
    tens = 10.0 ** floor(log10(span / most))
    return next(step * tens for step in (*_NICE_STEPS, 10, 20) if step * tens * most >= span)


def nice_time(span: float, most: int) -> float:
    """The same for seconds, in steps that clocks have."""
    if span / most <= 1:
        return nice_step(span, most)
    if span / most > _DAY / 2:
        return nice_step(span / _DAY, most) * _DAY if span / most > _DAY else _DAY
    steps = [
        *_NICE_TIMES,
        *(step * _MINUTE for step in _NICE_TIMES),
        *(step * _HOUR for step in (1, 2, 3, 6, 12)),
    ]
    return float(next(step for step in steps if step * most >= span))


def clock(value: float, step: float) -> str:
    """The label of a tick on an axis of time whose ticks are so far apart."""
    if not value:
        return "0"
    size, unit = next((u for u in _UNITS if step >= u[0]), (1.0, "s"))
    return f"{number(round(value / size, 6))} {unit}"
