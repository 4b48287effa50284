"""What callers of ``LLM`` and ``AsyncLLM`` may give as prompts and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from numbers import Integral

from llama_runtime.completion import Prompt
from llama_runtime.errors import RequestError

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
