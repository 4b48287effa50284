"""What a caller sets when a bundle is loaded, and what that comes to for each kind of bundle."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal, TypeAlias

from llama_runtime.contract import CHUNK_MULTIPLE
from llama_runtime.errors import RequestError
from llama_runtime.memory_plan import MAX_BATCH, MIN_LEN

AUTO: Literal["auto"] = "auto"
MaxBatch: TypeAlias = int | Literal["auto"] | None

DEFAULT_MAX_BATCH = 32
AUTO_MAX_BATCH = 128  # beyond, the CPU gains next to nothing
DEFAULT_MAX_LEN = 4096
LEAST_DEFAULT_LEN = 512  # less is not chosen for anybody: max_tokens alone is 256 by default
DEFAULT_PREFIX_TOKENS = 4096  # of prompts, kept for others
MAX_PREFIX_TOKENS = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The arguments of ``LLM``, which says what they mean; None is what is usual.

    What is usual, and allowed, differs from backend to backend, so the methods are told.
    """

    max_batch: MaxBatch = None
    max_len: int | None = None
    threads: int | None = None
    devices: Seq[int] | None = None
    prefix_tokens: int | None = None
    stream_budget: int | None = None

    @property
    def finds_batch(self) -> bool:
        """Whether the number of sequences that run at once is to be found."""
        return self.max_batch == AUTO

    def batch(self, usual: int) -> int:
        """Sequences that run at once; the usual number where it is to be found."""
        if self.max_batch is None or self.max_batch == AUTO:
            return usual
        return in_range("max_batch", self.max_batch, MAX_BATCH)

    def length(self, limit: int) -> int:
        """The most tokens of a sequence, where the model's limit is known."""
        usual = min(DEFAULT_MAX_LEN, limit)
        wanted = usual if self.max_len is None else self.max_len
        return in_range("max_len", wanted, limit, low=MIN_LEN)

    def num_threads(self, usual: int) -> int:
        """Threads of the kernels."""
        return in_range("threads", usual if self.threads is None else self.threads, 1024)

    def budget(self, usual: int, *, least: int, most: int) -> int:
        """Prompt tokens of a step while somebody reads a stream; no step has more than the most."""
        wanted = usual if self.stream_budget is None else self.stream_budget
        return in_range("stream_budget", wanted, most, low=least)

    def num_prefix_tokens(self) -> int:
        """Tokens of prompts that are kept, in whole blocks."""
        wanted = DEFAULT_PREFIX_TOKENS if self.prefix_tokens is None else self.prefix_tokens
        wanted = in_range("prefix_tokens", wanted, MAX_PREFIX_TOKENS, low=0)
        return -(-wanted // CHUNK_MULTIPLE) * CHUNK_MULTIPLE

    def ordinals(self) -> list[int]:
        """The numbers of CUDA devices, checked as far as that goes without looking at them."""
        if self.devices is None:
            return [0]
        given: object = self.devices
        found: list[object] = list(given) if isinstance(given, Seq) else []
        numbers = [one for one in found if isinstance(one, int) and not isinstance(one, bool)]
        if not found or len(set(numbers)) < len(found) or min(numbers) < 0:
            raise RequestError(
                "devices must be different numbers of CUDA devices, such as [0, 1], not "
                f"{self.devices!r}",
                param="devices",
            )
        return numbers

    def refuse(self, name: str, reason: str, *allowed: object) -> None:
        """Refuse an argument that a bundle has no use for, unless it is None or one of a few.

        Raises:
            RequestError: it is something else.
        """
        value = getattr(self, name)
        if value is None or any(value == one and type(value) is type(one) for one in allowed):
            return
        choice = "".join(f", or be {one}," for one in allowed)
        raise RequestError(
            f"{name} must be left out{choice or ','} not {value!r:.80}: {reason}", param=name
        )


def in_range(param: str, value: object, high: int, *, low: int = 1) -> int:
    """A whole number, sure to lie in its range.

    Raises:
        RequestError: it doesn't, or is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{param} must lie in {low} to {high}, not {value!r}", param=param)
    return value
