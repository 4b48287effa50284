"""The step loop: manual control over many sequences.

The engine has no threads, no sockets and no clock of its own, and is used from one thread at a
time. ``LLM`` is the comfortable way in.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import count, islice
from math import inf
from operator import attrgetter
from typing import NamedTuple, Unpack

from llama_runtime.backends.base import Launched, Runner
from llama_runtime.batch_sizer import BatchSizer
from llama_runtime.chunk import Chunk
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.errors import BackendError, CaravanError, RequestError, backend_error
from llama_runtime.events import Counters, TokenEvent
from llama_runtime.grammars import GrammarCompiler
from llama_runtime.growth import grow, late_error, rest_of_text
from llama_runtime.new_sequence import new_sequence
from llama_runtime.params import SamplingParams
from llama_runtime.sampling import NOT_FINITE
from llama_runtime.scheduler import Scheduler
from llama_runtime.sequence import FinishReason, Origin, Sequence, TokenLogprob


class Engine:
    """Add sequences, step, read events; ``load`` makes one of a bundle.

    Args:
        runner: runs steps; the engine owns and closes it.
        scheduler: picks what runs in a step, over a cache that is the engine's from now on.
        token_bytes: the vocabulary as bytes, for the text of events.
        eos_token_ids: every end token of the model.
        vocab_size: V; ids beyond it are refused.
        max_len: the most tokens of one sequence, prompt and completion.
        ids: numbers for sequences; several engines that share it never give out one twice.
        batch_sizer: says how many sequences run at once; None for as many as there are slots.
        grammars: compiles what completions are held to; None where they can be held to nothing.
        clock: seconds since some time, for deadlines and for who has waited how long.

    Attributes:
        failure: why it has stopped, or None.
        num_failed_steps: forwards that failed, whoever was at fault.
        crowded: whether sequences wait for a slot somewhere else; see ``EngineGroup``.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        token_bytes: TokenBytes,
        eos_token_ids: Collection[int],
        *,
        vocab_size: int,
        max_len: int,
        ids: Iterator[int] | None = None,
        batch_sizer: BatchSizer | None = None,
        grammars: GrammarCompiler | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_len = max_len
        self.failure: BackendError | None = None
        self.num_failed_steps = 0
        self.crowded = False
        self.closed = False
        self._runner = runner
        self._scheduler = scheduler
        self._cache = scheduler.cache
        self._token_bytes = token_bytes
        self._eos_token_ids = frozenset(eos_token_ids)
        self._vocab_size = vocab_size
        self._sequences: dict[int, Sequence] = {}
        self._in_flight: deque[_InFlight] = deque()  # one or two, where the runner overlaps
        self._refused: tuple[Seq[Chunk], Exception] | None = None  # what could not be launched
        self._events: list[TokenEvent] = []  # untold, until a step ends or after an interrupt
        self._doubtful = False  # whether the last forward failed, and one sequence got the blame
        self._ids = count() if ids is None else ids
        self._counters = Counters()
        self._batch_sizer = batch_sizer
        self._grammars = grammars
        self._clock = clock
        self._collected = -inf  # when the last step was
        if batch_sizer is not None:
            scheduler.limit = batch_sizer.limit

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits or runs, so that a step would move something."""
        untold = bool(self._sequences or self._events)
        return untold or any(step.leaving for step in self._in_flight)

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot yet."""
        return len(self._scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._scheduler.running)

    @property
    def num_slots(self) -> int:
        """Sequences that can run at once."""
        return self._cache.num_slots

    @property
    def has_room(self) -> bool:
        """Whether a sequence that is added now would run in the next step, memory allowing."""
        return self._scheduler.has_room

    def run_apart(self, apart: bool = True) -> None:
        """Run one sequence a step, in turn, or no longer: what batches are measured against."""
        self._scheduler.apart = apart

    @property
    def ready(self) -> bool:
        """Whether ``collect`` would not wait."""
        return not self._in_flight or self._in_flight[0].launched.ready

    def counters(self) -> Counters:
        """A copy of the counters."""
        sizer = self._batch_sizer
        return replace(
            self._counters,
            reused_tokens=self._cache.num_reused_tokens,
            prefix_hits=self._cache.num_prefix_hits,
            cache_use=self._cache.use,
            batch_limit=self._scheduler.limit,
            batch_decisions=tuple(sizer.decisions) if sizer is not None else (),
        )

    def add(
        self, prompt_token_ids: Seq[int], params: SamplingParams, **origin: Unpack[Origin]
    ) -> Sequence:
        """Queue a prompt; ``prepare`` and ``enqueue`` in one.

        Args:
            prompt_token_ids: at least one token.
            params: how to continue it.
            origin: see ``Origin``.

        Returns:
            The sequence; its ``id`` is that of the events, its ``seed`` the one in use.

        Raises:
            CapacityError: prompt and max_tokens don't fit ``max_len``.
            RequestError: the prompt is empty, or it or a parameter holds unknown ids.
            BackendError: an earlier step failed and the engine has stopped.
            CaravanError: the engine is closed.
        """
        seq = self.prepare(prompt_token_ids, params, **origin)
        self.enqueue(seq)
        return seq

    def prepare(
        self,
        prompt_token_ids: Seq[int],
        params: SamplingParams,
        *,
        sample: int = 0,
        seed: int | None = None,
        caller: Hashable = None,
        streamed: bool = False,
    ) -> Sequence:
        """The sequence of a prompt, checked and not yet queued; see ``add``."""
        if self.failure is not None:
            raise BackendError(f"the engine has stopped: {self.failure}") from self.failure
        if self.closed:
            raise CaravanError("the engine is closed")
        seq = new_sequence(
            prompt_token_ids,
            params,
            sample,
            ids=self._ids,
            token_bytes=self._token_bytes,
            vocab_size=self._vocab_size,
            max_len=self.max_len,
            seed=seed,
            verifies=self._runner.verifies,
            grammars=self._grammars,
        )
        seq.caller = caller if params.caller is None else ("named", params.caller)
        seq.streamed = streamed
        seq.arrived = self._clock()
        if params.deadline is not None:
            seq.deadline = seq.arrived + params.deadline
        return seq

    def enqueue(self, seq: Sequence) -> None:
        """Queue a sequence of ``prepare``, of this engine or of one like it."""
        self._sequences[seq.id] = seq
        self._scheduler.add(seq)

    def start(self, seq: Sequence) -> bool:
        """Give a sequence of ``prepare`` its slot at once; False if it would have to wait for it.

        It runs in the next step, and ``num_running`` counts it already.
        """
        if not self.has_room or not self._cache.fits(seq):
            return False
        self._sequences[seq.id] = seq
        self._scheduler.start(seq, self._clock())
        return True

    def step(self) -> list[TokenEvent]:
        """Run one forward; an event for each token, or for the end of a sequence without one.

        Where the runner overlaps, a forward is launched and the events are those of the one before
        it, so the first call may give none.

        A row whose logits aren't finite ends its own sequence. If a forward can't be launched, each
        of its sequences runs alone, and those that fail then end with their own error; if none
        runs, or one fails that was launched, every sequence ends with the same error and the engine
        has stopped.
        """
        return self.collect() if self.launch() else []

    def launch(self) -> bool:
        """The first half of a step: queue a forward, unless one waits behind another already.

        Returns:
            Whether it is time to collect; not if the only forward in flight has just begun, behind
            which the next one should be queued first.
        """
        now = self._clock()
        self._end_late(now)
        due = bool(self._in_flight or self._events) or not self._runner.overlaps
        if self._refused is not None or len(self._in_flight) > self._runner.overlaps:
            return True
        if any(step.has_grammar for step in self._in_flight):
            return True
        chunks = self._scheduler.schedule(now)
        chunks.sort(key=attrgetter("seq.kind"))
        if chunks:
            try:
                self._launch(chunks)
            except Exception as error:
                self._refused = chunks, error
                return True
        return due

    def collect(self) -> list[TokenEvent]:
        """The other half: wait for the oldest forward, and say what it came to."""
        try:
            if self._in_flight:
                self._collect()
            if self._refused is not None and not self._in_flight and self.failure is None:
                (chunks, refusal), self._refused = self._refused, None
                self._isolate(chunks, refusal)
        except Exception as error:
            self.failure = backend_error(error)
        if self.failure is not None:
            self._fail(self.failure)
        events, self._events = self._events, []
        return events

    def abort(self, sequence_id: int) -> None:
        """End a sequence now, and free its slot when no forward of it is in flight any more.

        It has no more events. Unknown and ended ones are ignored.
        """
        self._events = [event for event in self._events if event.sequence_id != sequence_id]
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
        leaving = sum(len(step.leaving) for step in self._in_flight)
        slots = self.num_running + leaving + self._cache.num_free
        if held != len(self._sequences) or slots != self._cache.num_slots:
            raise RuntimeError(f"{len(self._sequences)} sequences, but {held} wait or run")

    def close(self) -> None:
        """Abort what is left and give back what the backend holds; a second call does nothing."""
        for sequence_id in list(self._sequences):
            self.abort(sequence_id)
        if not self.closed:
            self.closed = True
            self._drop_in_flight()
            self._runner.close()

    def _launch(self, chunks: Seq[Chunk]) -> None:
        """Begin one forward; nothing has changed but the cache if it raises."""
        started = self._clock()
        launched = self._runner.launch(chunks)
        has_grammar = any(chunk.samples and chunk.seq.matcher is not None for chunk in chunks)
        self._in_flight.append(_InFlight(launched, chunks, [], started, has_grammar))
        for chunk in chunks:
            seq = chunk.seq
            seq.num_pending += chunk.samples
            seq.cache_len += chunk.num_tokens - len(chunk.draft)
            if seq.cache_len <= seq.num_prompt_tokens:
                self._cache.computed(seq)

    def _collect(self) -> None:
        """What the oldest forward came to; a sequence that has ended meanwhile gets nothing of it.

        An interrupt while it waits loses nothing: the forward can be asked again.
        """
        step = self._in_flight[0]
        outcome = step.launched.result()
        self._in_flight.popleft()
        self._doubtful = False
        if outcome.prompt_logprobs:
            for chunk, scored in zip(step.chunks, outcome.prompt_logprobs, strict=True):
                chunk.seq.prompt_logprobs += scored
        rows = zip(outcome.token_ids, outcome.logprobs, strict=True)
        num_events = len(self._events)
        for chunk in step.chunks:
            of_chunk = list(islice(rows, chunk.num_sampled))
            chunk.seq.num_pending -= chunk.samples
            if of_chunk and chunk.seq.finish_reason is None:
                self._commit(chunk, of_chunk)
            elif any(token_id == NOT_FINITE for token_id, _ in of_chunk):
                self._clean(chunk.seq)
        for seq in step.leaving:
            self._cache.free(seq)
        self._look_at_speed(step, len(self._events) - num_events)

    def _isolate(self, chunks: Seq[Chunk], error: Exception) -> None:
        """Find whose fault it was: what a chunk writes into the cache is the same again.

        One that has nobody beside it to compare with is believed to be at fault, once. Sequences
        that have ended since the launch are out of it.
        """
        self.num_failed_steps += 1
        left = [chunk for chunk in chunks if chunk.seq.finish_reason is None]
        failed = [(chunk, error) for chunk in left if len(chunks) == 1]
        for chunk in left if len(chunks) > 1 else ():
            try:
                self._launch([chunk])
            except Exception as own_error:
                failed.append((chunk, own_error))
            else:
                self._collect()  # which raises where nothing can be trusted any more
        none_runs = 0 < len(failed) == len(left)
        if none_runs and (self._doubtful or len(left) > 1):
            self.failure = backend_error(error)
            return
        self._doubtful = none_runs
        self._events += [self._end_in_error(chunk.seq, backend_error(e)) for chunk, e in failed]

    def _commit(self, chunk: Chunk, rows: Seq[tuple[int, TokenLogprob | None]]) -> None:
        """Give a sequence its tokens: the first, and the next ones while the guesses were right.

        Each row's token was drawn as if the guesses before it had been drawn, so it is the token
        that would have been drawn after them, and stands if they do.
        """
        seq, num_right = chunk.seq, 0
        for i, (token_id, logprob) in enumerate(rows):
            self._events.append(self._take(seq, token_id, logprob))
            if i == len(chunk.draft) or token_id != chunk.draft[i]:
                break
            num_right += 1
            if seq.finish_reason is not None:
                break
            seq.cache_len += 1  # the guess was right, so its keys and values are
        if chunk.draft and seq.lookup is not None:
            seq.lookup.learn(len(chunk.draft), num_right)
            self._counters.drafted_tokens += len(chunk.draft)
            self._counters.accepted_tokens += num_right

    def _take(self, seq: Sequence, token_id: int, logprob: TokenLogprob | None) -> TokenEvent:
        """Give a sequence a token; whatever goes wrong is its own affair."""
        if token_id == NOT_FINITE:
            error = BackendError("the model's logits were not finite numbers")
            return self._end_in_error(seq, error)
        try:
            text, reason = grow(seq, token_id, self._eos_token_ids)
        except RequestError as error:
            return self._end_with(seq, error)
        except Exception as error:
            return self._end_in_error(seq, backend_error(error))
        if logprob is not None:
            seq.logprobs.append(logprob)
        if reason is not None:
            self._end(seq, reason)
        return TokenEvent(seq.id, token_id, text, reason, logprob=logprob, sample=seq.sample)

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        """Let a sequence run no more; what it holds is free when no forward of it is in flight."""
        seq.finish_reason = reason
        del self._sequences[seq.id]
        for step in reversed(self._in_flight):
            if any(chunk.seq is seq for chunk in step.chunks):
                self._scheduler.withdraw(seq)
                step.leaving.append(seq)
                return
        self._scheduler.remove(seq)

    def _end_late(self, now: float) -> None:
        """End what has not ended by its deadline, wherever it is."""
        running = (seq for seq in self._scheduler.running if seq.deadline is not None)
        late = [seq for seq in running if seq.deadline is not None and seq.deadline <= now]
        for seq in [*self._scheduler.waiting.late(now), *late]:
            self._counters.late += 1
            self._events.append(self._end_with(seq, late_error(seq)))

    def _end_in_error(self, seq: Sequence, error: BackendError) -> TokenEvent:
        """End a sequence whose part of the cache may hold anything."""
        self._clean(seq)
        return self._end_with(seq, error)

    def _end_with(self, seq: Sequence, error: CaravanError) -> TokenEvent:
        """End a sequence with an error, after the text that it has got so far."""
        self._end(seq, "error")
        return TokenEvent(seq.id, None, rest_of_text(seq), "error", error, sample=seq.sample)

    def _clean(self, seq: Sequence) -> None:
        """Let nobody read what a sequence wrote."""
        if seq.slot is not None and self.failure is None:
            try:
                self._cache.forget(seq)
                self._runner.clean(seq)
            except Exception as error:
                self.failure = backend_error(error)

    def _drop_in_flight(self) -> None:
        """Forget what was launched: nobody waits for it any more."""
        leaving = [seq for step in self._in_flight for seq in step.leaving]
        self._in_flight.clear()
        self._refused = None
        for seq in leaving:
            self._cache.free(seq)

    def _look_at_speed(self, step: _InFlight, num_tokens: int) -> None:
        """Let the batch's size follow from what steps that move streams take."""
        now = self._clock()
        seconds = now - max(step.started, self._collected)  # it waited for the one before it
        self._collected = now
        moves_streams = all(chunk.num_tokens == 1 + len(chunk.draft) for chunk in step.chunks)
        if self._batch_sizer is not None and moves_streams:
            waits = self.crowded or bool(self._scheduler.waiting)
            self._batch_sizer.observe(len(step.chunks), num_tokens, seconds, waits=waits)
            self._scheduler.limit = self._batch_sizer.limit

    def _fail(self, error: BackendError) -> None:
        self._drop_in_flight()
        self._events += [self._end_in_error(seq, error) for seq in list(self._sequences.values())]


class _InFlight(NamedTuple):
    """A forward on its way, whose it is, who has ended and leaves with it, and since when.

    ``has_grammar`` says whether a grammar has to know a token of it to say what may come next, so
    that no other forward may be planned before.
    """

    launched: Launched
    chunks: Seq[Chunk]
    leaving: list[Sequence]
    started: float
    has_grammar: bool
