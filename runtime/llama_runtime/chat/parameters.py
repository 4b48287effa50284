"""Sampling parameters as a user sets them in the middle of a conversation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from llama_runtime.errors import RequestError, one_line
from llama_runtime.params import OPTIONS, SamplingParams


def _whole(text: str) -> object:
    return int(text)


def _number(text: str) -> object:
    return float(text)


def _whole_or_none(text: str) -> object:
    return None if text == "none" else int(text)


def _truth(text: str) -> object:
    return {"true": True, "false": False}[text.lower()]


_Reader = tuple[Callable[[str], object], str]
_WHOLE: _Reader = (_whole, "a whole number")
_NUMBER: _Reader = (_number, "a number")
_TRUTH: _Reader = (_truth, "true or false")
_READERS: dict[str, _Reader] = {
    "max_tokens": _WHOLE,
    "min_tokens": _WHOLE,
    "temperature": _NUMBER,
    "top_k": _WHOLE,
    "top_p": _NUMBER,
    "min_p": _NUMBER,
    "repetition_penalty": _NUMBER,
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "seed": (_whole_or_none, "a whole number, or none"),
    "include_stop": _TRUTH,
    "ignore_eos": _TRUTH,
    "speculation": (str, "off, on or auto"),
}
SETTABLE = tuple(_READERS)
# What makes no sense for one reader of one answer.
POINTLESS = (
    *("n", "logprobs", "top_logprobs", "prompt_logprobs"),
    *("priority", "deadline", "caller", "cache_salt"),
)
# What has no short spelling: it comes from the command line, or a file.
GIVEN_AT_START = tuple(name for name in OPTIONS if name not in (*SETTABLE, *POINTLESS))


def changed(params: SamplingParams, name: str, text: str) -> SamplingParams:
    """The same parameters but for one.

    Args:
        params: those in force.
        name: one of ``SETTABLE``.
        text: the value, as it was typed.

    Raises:
        RequestError: there is no such parameter, or the value is none that it takes.
    """
    if name in GIVEN_AT_START:
        option = "--" + name.replace("_", "-")
        raise RequestError(
            f"{name} is given when the chat begins, as {option}; /set has {', '.join(SETTABLE)}",
            param="name",
        )
    if name not in _READERS:
        raise RequestError(
            f"there is no parameter {one_line(name, 40)!r} to set; there are {', '.join(SETTABLE)}",
            param="name",
        )
    read, wanted = _READERS[name]
    try:
        value = read(text)
    except (ValueError, KeyError):
        message = f"{name} must be {wanted}, not {one_line(text, 40)!r}"
        raise RequestError(message, param=name) from None
    return replace(params, **{name: value})  # type: ignore[arg-type]


def table(params: SamplingParams) -> str:
    """The parameters in force, a line each; of those that can't be set here, what was given."""
    shown = [*SETTABLE, *(name for name in GIVEN_AT_START if getattr(params, name))]
    width = max(map(len, shown))
    return "\n".join(f"{name:{width}}  {_shown(getattr(params, name))}" for name in shown)


def _shown(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}={bias:g}" for key, bias in value.items())
    if isinstance(value, (tuple, frozenset)):
        return ", ".join(repr(item) for item in sorted(value))
    return str(value)
