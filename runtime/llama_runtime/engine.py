"""The step loop: manual control over many sequences.

The engine has no threads, no sockets and no clock of its own, and is used from one thread at a
time. ``LLM`` is the comfortable way in.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Seq
from contextlib import suppress
from operator import attrgetter, index
from typing import NamedTuple

import numpy as np

from llama_runtime.backends.base import Backend
from llama_runtime.detokenizer import Detokenizer, TokenBytes
from llama_runtime.errors import BackendError, CapacityError, CaravanError, RequestError
from llama_runtime.kv_cache import SlotCache
from llama_runtime.params import SamplingParams, fresh_seed
from llama_runtime.sampler import Sampler
from llama_runtime.sampling import NOT_FINITE, Kernels, Logits, Reference, sampling_kind
from llama_runtime.scheduler import Chunk, Scheduler
from llama_runtime.sequence import FinishReason, Sequence, TokenLogprob
from llama_runtime.step_batch import Step, StepBatch
from llama_runtime.stop_texts import StopTexts
from llama_runtime.stopping import finish_reason, reached_min_tokens


class TokenEvent(NamedTuple):
    """What one step did to one sequence.

    Attributes:
        sequence_id: as ``Engine.add`` returned it.
        token_id: the new token, or None if the sequence ended without one.
        text: the text that became complete; the texts of all events are the completion.
        finish_reason: why the sequence ended, or None if it goes on.
        error: what went wrong, if ``finish_reason`` is "error".
        logprob: how likely the model found the token, if ``logprobs`` asks for it.
        sample: which of the ``n`` completions of a request this is of, from 0.
    """

    sequence_id: int
    token_id: int | None
    text: str
    finish_reason: FinishReason | None = None
    error: CaravanError | None = None
    logprob: TokenLogprob | None = None
    sample: int = 0


class Engine:
    """Add sequences, step, read events.

    Args:
        backend: runs the graph; the engine owns and closes it.
        token_bytes: the vocabulary as bytes, for the text of events.
        eos_token_ids: every end token of the model.
        vocab_size: V; ids beyond it are refused.
        max_batch: B, sequences that run at once.
        max_len: the most tokens of one sequence, prompt and completion.
        prompt_budget: the most prompt tokens of one step.
        max_chunk: the most prompt tokens of one sequence in one step.
        refill: False gives fixed batches, for comparison.
        kernels: what chooses tokens; None computes in numpy.

    Attributes:
        failure: why it has stopped, or None.
        num_failed_steps: forwards that failed, whoever was at fault.
    """

    def __init__(
        self,
        backend: Backend,
        token_bytes: TokenBytes,
        eos_token_ids: Collection[int],
        *,
        vocab_size: int,
        max_batch: int,
        max_len: int,
        prompt_budget: int,
        max_chunk: int,
        refill: bool = True,
        kernels: Kernels | None = None,
    ) -> None:
        self.max_len = max_len
        self.failure: BackendError | None = None
        self.num_failed_steps = 0
        self.closed = False
        self._backend = backend
        self._token_bytes = token_bytes
        self._eos_token_ids = frozenset(eos_token_ids)
        self._vocab_size = vocab_size
        self._cache = SlotCache(max_batch, max_len)
        self._scheduler = Scheduler(
            self._cache, prompt_budget=prompt_budget, max_chunk=max_chunk, refill=refill
        )
        self._step_batch = StepBatch(max_batch, prompt_budget, backend.row_multiple)
        self._sampler = Sampler(kernels or Reference(), self._eos_token_ids)
        self._sequences: dict[int, Sequence] = {}
        self._doubtful = False  # whether the last forward failed, and one sequence got the blame
        self._next_id = 0

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits or runs, so that a step would move something."""
        return bool(self._sequences)

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot yet."""
        return len(self._scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._scheduler.running)

    def add(
        self, prompt_token_ids: Seq[int], params: SamplingParams, *, sample: int = 0
    ) -> Sequence:
        """Queue a prompt.

        Args:
            prompt_token_ids: at least one token.
            params: how to continue it. A ``seed`` of None draws a fresh one.
            sample: which of its ``n`` completions this is; each is added by itself.

        Returns:
            The sequence; its ``id`` is that of the events, its ``seed`` the one in use.

        Raises:
            CapacityError: prompt and max_tokens don't fit ``max_len``.
            RequestError: the prompt is empty, or it or a parameter holds unknown ids.
            BackendError: an earlier step failed and the engine has stopped.
            CaravanError: the engine is closed.
        """
        if self.failure is not None:
            raise BackendError(f"the engine has stopped: {self.failure}") from self.failure
        if self.closed:
            raise CaravanError("the engine is closed")
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"params must be SamplingParams, not {type(params).__name__}", param="params"
            )
        if not 0 <= sample < params.n:
            raise RequestError(f"sample must lie in 0 to {params.n - 1}, not {sample}", param="n")
        token_ids = self._checked_prompt(prompt_token_ids, params)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("logit_bias", params.logit_bias)
        seq = Sequence(
            id=self._next_id,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            params=params,
            seed=fresh_seed() if params.seed is None else params.seed,
            detokenizer=Detokenizer(self._token_bytes),
            stop_texts=StopTexts(params.stop, include=params.include_stop),
            sample=sample,
            kind=sampling_kind(params),
        )
        self._next_id += 1
        self._sequences[seq.id] = seq
        self._scheduler.add(seq)
        return seq

    def step(self) -> list[TokenEvent]:
        """Run one forward; one event for each sequence that got a token or ended.

        A row whose logits aren't finite ends its own sequence. If a forward fails, each of its
        sequences runs alone, and those that fail then end with their own error; if none runs, every
        sequence ends with the same error and the engine has stopped.
        """
        chunks = self._scheduler.schedule()
        if not chunks:
            return []
        chunks.sort(key=attrgetter("seq.kind"))
        try:
            events = self._forward(chunks)
        except Exception as error:
            events = self._isolate(chunks, error)
        return events if self.failure is None else events + self._fail(self.failure)

    def abort(self, sequence_id: int) -> None:
        """End a sequence now and free its slot; unknown and ended ones are ignored."""
        seq = self._sequences.get(sequence_id)
        if seq is not None:
            self._end(seq, "abort")

    def check(self) -> None:
        """Raise if the bookkeeping doesn't balance.

        Raises:
            RuntimeError: an invariant is broken, which is a defect of Caravan.
        """
        self._cache.check()
        held = self.num_waiting + self.num_running
        if held != len(self._sequences) or self.num_running + self._cache.num_free != (
            self._cache.num_slots
        ):
            raise RuntimeError(f"{len(self._sequences)} sequences, but {held} wait or run")

    def close(self) -> None:
        """Abort what is left and give back what the backend holds; a second call does nothing."""
        for sequence_id in list(self._sequences):
            self.abort(sequence_id)
        if not self.closed:
            self.closed = True
            self._backend.close()
            del self._sampler  # and its graph

    def _checked_prompt(self, prompt: Seq[int], params: SamplingParams) -> list[int]:
        try:
            token_ids = [index(token_id) for token_id in prompt]
        except TypeError:
            raise RequestError(
                "a prompt of tokens must be a list of whole numbers", param="prompt"
            ) from None
        count = len(token_ids)
        if count == 0:
            raise RequestError("the prompt is empty: it has no tokens", param="prompt")
        if count + params.max_tokens > self.max_len:
            raise CapacityError(
                f"{count} prompt tokens and max_tokens {params.max_tokens} need "
                f"{count + params.max_tokens} tokens, over max_len {self.max_len}: "
                "shorten the prompt, lower max_tokens or raise max_len",
                param="max_tokens" if count < self.max_len else "prompt",
            )
        self._check_ids("prompt", (min(token_ids), max(token_ids)))
        return token_ids

    def _check_ids(self, param: str, token_ids: Collection[int]) -> None:
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
            raise RequestError(
                f"{param}: token ids must lie in 0 to {self._vocab_size - 1}, not "
                f"{min(token_ids)} to {max(token_ids)}",
                param=param,
            )

    def _forward(self, chunks: Seq[Chunk]) -> list[TokenEvent]:
        """One forward; nothing has changed but the cache if it raises."""
        step = self._step_batch.build(chunks)
        logits = self._backend.run(step)
        scored = self._score_prompts(step, logits)
        sampled = [chunk.seq for chunk in chunks if chunk.samples]
        token_ids, logprobs = self._sampler.sample(logits[: step.num_logits], sampled)
        for chunk, prompt_logprobs in zip(chunks, scored, strict=True):
            chunk.seq.cache_len += chunk.num_tokens
            chunk.seq.prompt_logprobs += prompt_logprobs
        self._doubtful = False
        return [self._commit(*row) for row in zip(sampled, token_ids, logprobs, strict=True)]

    def _isolate(self, chunks: Seq[Chunk], error: Exception) -> list[TokenEvent]:
        """Find whose fault it was: what a chunk writes into the cache is the same again.

        One that has nobody beside it to compare with is believed to be at fault, once.
        """
        self.num_failed_steps += 1
        events: list[TokenEvent] = []
        failed = [(chunks[0], error)] if len(chunks) == 1 else []
        for chunk in chunks if len(chunks) > 1 else ():
            try:
                events += self._forward([chunk])
            except Exception as own_error:
                failed.append((chunk, own_error))
        if len(failed) == len(chunks) and (self._doubtful or len(chunks) > 1):
            return self._fail(_backend_error(error))
        self._doubtful = len(failed) == len(chunks)
        return events + [self._end_in_error(chunk.seq, _backend_error(e)) for chunk, e in failed]

    def _score_prompts(self, step: Step, logits: Logits) -> list[list[TokenLogprob | None]]:
        """For each chunk, the log-probabilities of the prompt's tokens that follow its rows."""
        scored: list[list[TokenLogprob | None]] = []
        first = step.num_logits
        for chunk in step.chunks:
            seq, count = chunk.seq, chunk.num_scored
            asked = seq.params.prompt_logprobs and seq.cache_len == 0
            scored.append([None] if asked else [])
            if count:
                following = seq.token_ids[seq.cache_len + 1 : seq.cache_len + 1 + count]
                rows = logits[first : first + count]
                tops = [seq.params.top_logprobs] * count
                scored[-1] += self._sampler.score(rows, np.array(following), tops)
                first += count
        return scored

    def _commit(self, seq: Sequence, token_id: int, logprob: TokenLogprob | None) -> TokenEvent:
        """Give a sequence its token; whatever goes wrong is its own affair."""
        if token_id == NOT_FINITE:
            error = BackendError("the model's logits were not finite numbers")
            return self._end_in_error(seq, error)
        try:
            text, reason = self._grow(seq, token_id)
        except Exception as error:
            return self._end_in_error(seq, _backend_error(error))
        if logprob is not None:
            seq.logprobs.append(logprob)
        if reason is not None:
            self._end(seq, reason)
        return TokenEvent(seq.id, token_id, text, reason, logprob=logprob, sample=seq.sample)

    def _grow(self, seq: Sequence, token_id: int) -> tuple[str, FinishReason | None]:
        """Append a token: the text that can be shown by now, and why the sequence ends, if so."""
        seq.append(token_id)
        reason = finish_reason(seq, self._eos_token_ids)
        may_stop = reached_min_tokens(seq)
        text = "" if reason == "stop" else seq.detokenizer.push(token_id)
        text = seq.stop_texts.push(text, may_stop=may_stop)
        if reason is not None and seq.stop_texts.found is None:
            text += seq.stop_texts.push(seq.detokenizer.finish(), may_stop=may_stop)
        if seq.stop_texts.found is not None:
            return text, "stop"
        return (text if reason is None else text + seq.stop_texts.finish()), reason

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        seq.finish_reason = reason
        del self._sequences[seq.id]
        self._scheduler.remove(seq)

    def _end_in_error(self, seq: Sequence, error: BackendError) -> TokenEvent:
        """End a sequence whose part of the cache may hold anything."""
        if seq.slot is not None and self.failure is None:
            try:
                self._backend.clean(seq.slot, seq.num_tokens)
            except Exception as cleaning:
                self.failure = _backend_error(cleaning)
        self._end(seq, "error")
        text = ""
        with suppress(Exception):  # what has just failed may fail again
            text = seq.stop_texts.push(seq.detokenizer.finish(), may_stop=False)
            text += seq.stop_texts.finish()
        return TokenEvent(seq.id, None, text, "error", error, sample=seq.sample)

    def _fail(self, error: BackendError) -> list[TokenEvent]:
        self.failure = error
        return [self._end_in_error(seq, error) for seq in list(self._sequences.values())]


def _backend_error(error: Exception) -> BackendError:
    if isinstance(error, BackendError):
        return error
    failure = BackendError(f"the backend failed: {error!r}")
    failure.__cause__ = error
    return failure
