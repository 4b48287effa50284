"""From a prompt and its parameters to a sequence, if an engine of some size can run it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from collections.abc import Sequence as Seq
from operator import index

from llama_runtime.detokenizer import Detokenizer, TokenBytes
from llama_runtime.errors import CapacityError, RequestError
from llama_runtime.grammars import GrammarCompiler, Matcher
from llama_runtime.params import SamplingParams, fresh_seed
from llama_runtime.prompt_lookup import PromptLookup
from llama_runtime.sampling import sampling_kind
from llama_runtime.sequence import Sequence
from llama_runtime.stop_texts import StopTexts


def new_sequence(
    prompt: Seq[int],
    params: SamplingParams,
    sample: int,
    *,
    ids: Iterator[int],
    token_bytes: TokenBytes,
    vocab_size: int,
    max_len: int,
    seed: int | None = None,
    verifies: bool = False,
    grammars: GrammarCompiler | None = None,
) -> Sequence:
    """Check a request and make its sequence.

    Args:
        prompt: at least one token.
        params: how to continue it.
        sample: which of its ``n`` completions this is.
        ids: gives the sequence its number.
        token_bytes: the vocabulary as bytes.
        vocab_size: V; ids beyond it are refused.
        max_len: the most tokens of one sequence, prompt and completion.
        seed: its random stream where ``params`` name none; None draws a fresh one.
        verifies: whether several tokens of one sequence can be verified in one step.
        grammars: compiles what a completion is held to; None where it can be held to nothing.

    Raises:
        CapacityError: prompt and max_tokens don't fit ``max_len``.
        RequestError: the prompt is empty, it or a parameter holds unknown ids, speculation is asked
            for where it can't be had, or what the completion is held to can't be used.
    """
    if not isinstance(params, SamplingParams):
        raise RequestError(
            f"params must be SamplingParams, not {type(params).__name__}", param="params"
        )
    if not 0 <= sample < params.n:
        raise RequestError(f"sample must lie in 0 to {params.n - 1}, not {sample}", param="n")
    if params.speculation == "on" and not verifies:
        raise RequestError(
            "speculation on needs a bundle for the CPU: set it to auto, or leave it out",
            param="speculation",
        )
    token_ids = _checked_prompt(prompt, params, vocab_size, max_len)
    if params.seed is not None:
        seed = params.seed
    _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    _check_ids("logit_bias", params.logit_bias, vocab_size)
    return Sequence(
        id=next(ids),
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        params=params,
        seed=fresh_seed() if seed is None else seed,
        detokenizer=Detokenizer(token_bytes),
        stop_texts=StopTexts(params.stop, include=params.include_stop),
        sample=sample,
        kind=sampling_kind(params),
        lookup=PromptLookup(token_ids) if params.speculates and verifies else None,
        matcher=_matcher(params, grammars),
    )


def _checked_prompt(
    prompt: Seq[int], params: SamplingParams, vocab_size: int, max_len: int
) -> list[int]:
    try:
        token_ids = [index(token_id) for token_id in prompt]
    except TypeError:
        raise RequestError(
            "a prompt of tokens must be a list of whole numbers", param="prompt"
        ) from None
    length = len(token_ids)
    if length == 0:
        raise RequestError("the prompt is empty: it has no tokens", param="prompt")
    if length + params.max_tokens > max_len:
        raise CapacityError(
            f"{length} prompt tokens and max_tokens {params.max_tokens} need "
            f"{length + params.max_tokens} tokens, over max_len {max_len}: "
            "shorten the prompt, lower max_tokens or raise max_len",
            param="max_tokens" if length < max_len else "prompt",
        )
    _check_ids("prompt", (min(token_ids), max(token_ids)), vocab_size)
    return token_ids


def _matcher(params: SamplingParams, grammars: GrammarCompiler | None) -> Matcher | None:
    constraint = params.constraint
    if constraint is None:
        return None
    if grammars is None:
        raise RequestError(
            f"{constraint.kind} needs an engine that was made with a tokenizer",
            param=constraint.kind,
        )
    return grammars.matcher(constraint)


def _check_ids(param: str, token_ids: Collection[int], vocab_size: int) -> None:
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise RequestError(
            f"{param}: token ids must lie in 0 to {vocab_size - 1}, not "
            f"{min(token_ids)} to {max(token_ids)}",
            param=param,
        )
