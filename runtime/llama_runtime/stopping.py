"""When a sequence ends."""

from __future__ import annotations

from collections.abc import Collection

from llama_runtime.sequence import FinishReason, Sequence


def finish_reason(seq: Sequence, eos_token_ids: Collection[int]) -> FinishReason | None:
    """Why the sequence ends with its newest token, or None if it goes on.

    Args:
        seq: with at least one completion token.
        eos_token_ids: every end token of the model (Llama 3 has several).
    """
    newest = seq.token_ids[-1]
    is_end = newest in eos_token_ids and not seq.params.ignore_eos
    if (is_end or newest in seq.params.stop_token_ids) and reached_min_tokens(seq):
        return "stop"
    if seq.num_tokens >= seq.max_tokens:
        return "length"
    return None


def end_token_ids(seq: Sequence, eos_token_ids: Collection[int]) -> Collection[int]:
    """The tokens that end this sequence."""
    if seq.params.ignore_eos:
        return seq.params.stop_token_ids
    return {*seq.params.stop_token_ids, *eos_token_ids}


def reached_min_tokens(seq: Sequence) -> bool:
    """Whether the newest token may be the last one."""
    return seq.num_completion_tokens > seq.params.min_tokens
