"""What a sequence shows of its text as it grows, and what it is told when it ends early."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

from llama_runtime.errors import DeadlineError
from llama_runtime.sequence import FinishReason, Sequence
from llama_runtime.stopping import finish_reason, reached_min_tokens


def grow(
    seq: Sequence, token_id: int, eos_token_ids: Collection[int]
) -> tuple[str, FinishReason | None]:
    """Append a token: the text that can be shown by now, and why the sequence ends, if so.

    Raises:
        RequestError: what the completion is held to became too large to go on.
    """
    seq.append(token_id)
    reason = finish_reason(seq, eos_token_ids)
    is_text = reason != "stop"
    if seq.matcher is not None:
        if is_text:
            seq.matcher.accept(token_id)
            reason = "stop" if seq.matcher.is_complete else reason
        elif token_id in eos_token_ids:  # a stop token of the caller's cuts it off
            seq.matcher.end()
    may_stop = reached_min_tokens(seq)
    text = seq.detokenizer.push(token_id) if is_text else ""
    text = seq.stop_texts.push(text, may_stop=may_stop)
    if reason is not None and seq.stop_texts.found is None:
        text += seq.stop_texts.push(seq.detokenizer.finish(), may_stop=may_stop)
    if seq.stop_texts.found is not None:
        return text, "stop"
    return (text if reason is None else text + seq.stop_texts.finish()), reason


def rest_of_text(seq: Sequence) -> str:
    """What was held back of the text of a sequence that ends early."""
    text = ""
    with suppress(Exception):  # what has just failed may fail again
        text = seq.stop_texts.push(seq.detokenizer.finish(), may_stop=False)
        text += seq.stop_texts.finish()
    return text


def late_error(seq: Sequence) -> DeadlineError:
    """What a sequence is told that has not ended by its deadline."""
    where = "waits for a slot" if seq.slot is None else f"has {seq.num_completion_tokens} tokens"
    return DeadlineError(f"the request {where} at its deadline of {seq.params.deadline} s")
