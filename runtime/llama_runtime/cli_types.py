"""What the values of options are, where click has no type for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

LONGEST_SECONDS = 1e9
MOST_A_SECOND = 1e9


class Devices(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # older clicks have none
    """Numbers with commas between them."""

    name = "devices"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        """See ``click.ParamType``."""
        try:
            return [int(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r:.80} must be numbers such as 0 or 0,1", param, ctx)


class MaxBatch(click.IntRange):
    """A whole number from 1 on, or "auto"."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """See ``click.ParamType``."""
        if value == "auto":
            return "auto"
        try:
            return int(super().convert(value, None, None))
        except click.BadParameter:
            self.fail(f"{value!r:.80} must be a number from 1 on, or auto", param, ctx)


class Seconds(click.FloatRange):
    """A time; what is no number lies in no range."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """See ``click.ParamType``."""
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value!r:.80} must be a number of seconds", param, ctx)
        return seconds


class ListOf(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # older clicks have none
    """Several of something, with commas between them.

    Args:
        name: of the type.
        parse: makes one of a text, or raises a ``ValueError`` that says why not.
    """

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: Any, ctx: Any) -> list[Any]:
        """See ``click.ParamType``."""
        if not isinstance(value, str):
            return list(value)
        try:
            return [self._parse(part.strip()) for part in value.split(",")]
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Rate(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Requests a second, or inf."""

    name = "rate"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """See ``click.ParamType``."""
        if value in ("inf", float("inf")):
            return float("inf")
        try:
            rate = float(value)
        except ValueError:
            rate = 0.0
        if not 0 < rate <= MOST_A_SECOND:
            self.fail(
                f"{value!r:.80} must be a number above 0, at most {MOST_A_SECOND:.0f}, or inf",
                param,
                ctx,
            )
        return rate


FILE = click.Path(dir_okay=False, path_type=Path)
SECONDS = Seconds(0, LONGEST_SECONDS, min_open=True)
SECONDS_FROM_0 = Seconds(0, LONGEST_SECONDS)
