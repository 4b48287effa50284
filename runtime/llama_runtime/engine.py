"""The step loop: manual control over many sequences.

The engine has no threads, no sockets and no clock of its own, and is used from one thread at a
time. ``LLM`` is the comfortable way in.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import index

from llama_runtime.backends.base import Backend
from llama_runtime.detokenizer import Detokenizer, TokenBytes
from llama_runtime.errors import BackendError, CapacityError, CaravanError, RequestError
from llama_runtime.kv_cache import SlotCache
from llama_runtime.params import SamplingParams, fresh_seed
from llama_runtime.sampling import NOT_FINITE, sample
from llama_runtime.scheduler import Chunk, Scheduler
from llama_runtime.sequence import FinishReason, Sequence
from llama_runtime.step_batch import StepBatch
from llama_runtime.stopping import finish_reason


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step did to one sequence.

    Attributes:
        sequence_id: as ``Engine.add`` returned it.
        token_id: the new token, or None if the sequence ended without one.
        text: the text that became complete; the texts of all events are the completion.
        finish_reason: why the sequence ended, or None if it goes on.
        error: what went wrong, if ``finish_reason`` is "error".
    """

    sequence_id: int
    token_id: int | None
    text: str
    finish_reason: FinishReason | None = None
    error: CaravanError | None = None


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
    ) -> None:
        self.max_len = max_len
        self.failure: BackendError | None = None
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
        self._sequences: dict[int, Sequence] = {}
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

    def add(self, prompt_token_ids: Seq[int], params: SamplingParams) -> Sequence:
        """Queue a prompt.

        Args:
            prompt_token_ids: at least one token.
            params: how to continue it. A ``seed`` of None draws a fresh one.

        Returns:
            The sequence; its ``id`` is that of the events, its ``seed`` the one in use.

        Raises:
            CapacityError: prompt and max_tokens don't fit ``max_len``.
            RequestError: the prompt is empty or holds unknown ids.
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
        token_ids = self._checked_prompt(prompt_token_ids, params)
        seq = Sequence(
            id=self._next_id,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            params=params,
            seed=fresh_seed() if params.seed is None else params.seed,
            detokenizer=Detokenizer(self._token_bytes),
        )
        self._next_id += 1
        self._sequences[seq.id] = seq
        self._scheduler.add(seq)
        return seq

    def step(self) -> list[TokenEvent]:
        """Run one forward; one event for each sequence that got a token or ended.

        A row whose logits aren't finite ends its own sequence. A failing backend ends every
        sequence with the same error and stops the engine.
        """
        chunks = self._scheduler.schedule()
        if not chunks:
            return []
        step = self._step_batch.build(chunks)
        try:
            logits = self._backend.run(step)
        except BackendError as error:
            return self._fail(error)
        except Exception as error:
            failure = BackendError(f"the backend failed: {error!r}")
            failure.__cause__ = error
            return self._fail(failure)
        sampled = [chunk.seq for chunk in chunks if chunk.samples]
        token_ids = sample(logits, sampled).tolist()
        self._advance(chunks)
        return [self._commit(seq, token) for seq, token in zip(sampled, token_ids, strict=True)]

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
        if min(token_ids) < 0 or max(token_ids) >= self._vocab_size:
            raise RequestError(
                f"token ids must lie in 0 to {self._vocab_size - 1}, not "
                f"{min(token_ids)} to {max(token_ids)}",
                param="prompt",
            )
        return token_ids

    def _advance(self, chunks: Seq[Chunk]) -> None:
        for chunk in chunks:
            chunk.seq.cache_len += chunk.num_tokens

    def _commit(self, seq: Sequence, token_id: int) -> TokenEvent:
        if token_id == NOT_FINITE:
            self._end(seq, "error")
            error = BackendError("the model's logits were not finite numbers")
            return TokenEvent(seq.id, None, seq.detokenizer.finish(), "error", error)
        seq.token_ids.append(token_id)
        reason = finish_reason(seq, self._eos_token_ids)
        text = "" if reason == "stop" else seq.detokenizer.push(token_id)
        if reason is not None:
            text += seq.detokenizer.finish()
            self._end(seq, reason)
        return TokenEvent(seq.id, token_id, text, reason)

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        seq.finish_reason = reason
        del self._sequences[seq.id]
        self._scheduler.remove(seq)

    def _fail(self, error: BackendError) -> list[TokenEvent]:
        self.failure = error
        events = []
        for seq in list(self._sequences.values()):
            self._end(seq, "error")
            text = seq.detokenizer.finish()
            events.append(TokenEvent(seq.id, None, text, "error", error))
        return events
