"""What callers of ``LLM`` and ``AsyncLLM`` may give as prompts and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from numbers import Integral

from llama_runtime.completion import Prompt
from llama_runtime.errors import RequestError
from llama_runtime.params import SamplingParams

Message = Mapping[str, object]


def as_list(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """A list of prompts, also from a single one.

    Raises:
        RequestError: it is neither.
    """
    if not isinstance(prompts, str) and not is_list(prompts):
        raise wrong_type("prompts", "a text, a list of token ids, or a list of either", prompts)
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], Integral)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def is_list(value: object) -> bool:
    """Whether it has items in order; bytes have, but are no token ids and no text."""
    if isinstance(value, (str, bytes, bytearray, memoryview, Mapping)):
        return False
    return hasattr(value, "__len__") and hasattr(value, "__getitem__")


def wrong_type(param: str, wanted: str, value: object) -> RequestError:
    """The error that says so."""
    return RequestError(f"{param} must be {wanted}, not {type(value).__name__}", param=param)


def as_conversations(given: Seq[Message] | Seq[Seq[Message]]) -> list[Seq[Message]]:
    """A list of conversations, also from a single one.

    Raises:
        RequestError: it is neither.
    """
    if not is_list(given):
        raise wrong_type("conversations", "a list of messages, or of such lists", given)
    if not given or isinstance(given[0], Mapping):
        return [given]  # type: ignore[list-item]
    return list(given)  # type: ignore[arg-type]


def params_of_each(
    given: SamplingParams | Seq[SamplingParams] | None, default: SamplingParams, count: int
) -> list[SamplingParams]:
    """One for each of so many prompts.

    Raises:
        RequestError: they are as many others, or something else.
    """
    if given is None or isinstance(given, SamplingParams):
        return [given or default] * count
    if not is_list(given):
        raise wrong_type("params", "SamplingParams, or a list of them", given)
    if len(given) != count:
        raise RequestError(f"{count} prompts with {len(given)} parameters", param="params")
    for one in given:
        if not isinstance(one, SamplingParams):
            raise wrong_type("params", "SamplingParams, or a list of them", one)
    return list(given)
