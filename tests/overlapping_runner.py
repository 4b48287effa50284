"""A runner that overlaps, over the `Fake` backend: a step ends when a test or a clock says so."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llama_runtime.backends.base import Outcome
from llama_runtime.backends.fake import Fake
from llama_runtime.chunk import Chunk
from llama_runtime.contract import MIN_CHUNK, cache_capacity
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.errors import BackendError
from llama_runtime.host_masks import HostMasks
from llama_runtime.kv_cache import SlotCache
from llama_runtime.runner import HostRunner
from llama_runtime.sampler import Sampler
from llama_runtime.sampling import Reference
from llama_runtime.scheduler import Scheduler
from llama_runtime.sequence import Sequence
from llama_runtime.step_batch import StepBatch

VOCAB_SIZE, MAX_LEN = 97, 160
END_TOKENS = frozenset({2, 3, 4, 5})  # so that one sequence in a few ends early
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB_SIZE]
BYTE_LEVEL = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
BYTE_LEVEL.decoder = decoders.ByteLevel()
TABLE = TokenBytes(BYTE_LEVEL)
LAUNCHING = 0.01  # on a clock


@dataclass
class Clock:
    """Time that passes only where somebody computes or waits."""

    now: float = 0.0


class Overlapping:
    """Steps that take until they are released, or asked `polls` times whether they are over.

    Tokens are known to nobody but this runner until `result`, like those on a device.

    Attributes:
        polls: of the steps launched from now on; None has them wait for `release`.
        log: what happened: "a launches", "a collects", "a waits" where a step wasn't over, and "a
            is interrupted".
        fails_after: so many steps work; the results of later ones fail.
        refuses: whether launching fails.
        interrupts: so many times, whoever asks for a result is interrupted.
        flights: what was launched and not collected yet, in order.
        clock: if there is one, steps take ``length`` on it, one after the other, and launching
            takes ``LAUNCHING``.
        gaps: for each step but the first, how long the device was idle before it.
    """

    def __init__(self, name: str, num_slots: int, *, overlaps: bool, log: list[str]) -> None:
        backend = Fake(num_slots, cache_capacity(MAX_LEN, MIN_CHUNK), VOCAB_SIZE)
        step_batch = StepBatch(num_slots, MIN_CHUNK, backend.row_multiple)
        self._host = HostRunner(
            backend, step_batch, Sampler(Reference(), END_TOKENS), HostMasks(VOCAB_SIZE)
        )
        self._pending: dict[int, int] = {}  # tokens of the last step, by sequence
        self.name, self.overlaps, self.log = name, overlaps, log
        self.verifies = not overlaps
        self.polls: int | None = 0
        self.fails_after = float("inf")
        self.refuses = False
        self.num_launched = 0
        self.num_closes = 0
        self.closing_fails = False
        self.interrupts = 0
        self.flights: list[Flight] = []
        self.clock: Clock | None = None
        self.length, self.free_at = 0.0, 0.0
        self.gaps: list[float] = []

    def launch(self, chunks: Seq[Chunk]) -> Flight:
        if self.refuses:
            raise BackendError(f"{self.name} refuses")
        self.num_launched += 1
        self.log.append(f"{self.name} launches")
        with self._settled([chunk.seq for chunk in chunks]):
            outcome = self._host.launch(chunks).result()
            sampled = [chunk.seq.id for chunk in chunks if chunk.samples]
        self._pending = dict(zip(sampled, outcome.token_ids, strict=True))
        flight = Flight(self, None if self.num_launched > self.fails_after else outcome)
        flight.sequences = [chunk.seq for chunk in chunks]
        self.flights.append(flight)
        assert len(self.flights) <= 1 + self.overlaps
        if self.clock is not None:
            self.clock.now += LAUNCHING
            begins = max(self.clock.now, self.free_at)
            if self.num_launched > 1:
                self.gaps.append(begins - self.free_at)
            flight.over_at = self.free_at = begins + self.length
        return flight

    def release(self) -> None:
        """Let the oldest step be over that isn't."""
        next(flight for flight in self.flights if flight.polls_left != 0).polls_left = 0

    def clean(self, seq: Sequence) -> None:
        self._host.clean(seq)

    def close(self) -> None:
        self.num_closes += 1
        if self.closing_fails:
            raise BackendError(f"{self.name} can't be closed")

    @contextmanager
    def _settled(self, seqs: Seq[Sequence]) -> Iterator[None]:
        """The sequences as they will be when the last step is known."""
        pending = [seq for seq in seqs if seq.num_pending]
        for seq in pending:
            assert seq.num_pending == 1
            seq.token_ids.append(self._pending[seq.id])
            seq.num_pending = 0
        try:
            yield
        finally:
            for seq in pending:
                seq.token_ids.pop()
                seq.num_pending = 1


class Flight:
    """See `Launched`."""

    def __init__(self, runner: Overlapping, outcome: Outcome | None) -> None:
        self._runner, self._outcome, self.polls_left = runner, outcome, runner.polls
        self.sequences: list[Sequence] = []
        self.over_at = 0.0

    @property
    def ready(self) -> bool:
        if self._runner.clock is not None:
            return self._runner.clock.now >= self.over_at
        if self.polls_left:
            self.polls_left -= 1
            return False
        return self.polls_left is not None

    def result(self) -> Outcome:
        runner = self._runner
        assert runner.flights[0] is self
        if runner.interrupts:
            runner.interrupts -= 1
            runner.log.append(f"{runner.name} is interrupted")
            raise KeyboardInterrupt
        waits = runner.overlaps and self.polls_left != 0
        if runner.clock is not None:
            waits = runner.clock.now < self.over_at
            runner.clock.now = max(runner.clock.now, self.over_at)
        runner.log.append(f"{runner.name} {'waits' if waits else 'collects'}")
        if self._outcome is None:
            runner.flights.clear()  # nobody asks a device that is lost
            raise BackendError(f"{runner.name} failed")
        del runner.flights[0]
        return self._outcome


def engines(
    sizes: Seq[int], *, overlaps: bool = True
) -> tuple[list[Engine], list[Overlapping], list[str]]:
    """Engines with so many slots each, called "a", "b" and so on; their runners, and the log."""
    log: list[str] = []
    ids = count()
    runners = [
        Overlapping(n, s, overlaps=overlaps, log=log) for n, s in zip("abcdef", sizes, strict=False)
    ]
    made = [
        Engine(
            runner,
            Scheduler(SlotCache(size, MAX_LEN), prompt_budget=MIN_CHUNK, max_chunk=MIN_CHUNK),
            TABLE,
            END_TOKENS,
            vocab_size=VOCAB_SIZE,
            max_len=MAX_LEN,
            ids=ids,
        )
        for runner, size in zip(runners, sizes, strict=True)
    ]
    return made, runners, log
