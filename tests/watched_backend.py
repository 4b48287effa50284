"""The `Fake` backend under a test's control: it counts steps, and hangs, fails or spoils a row."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models

from llama_runtime.backends.fake import Fake
from llama_runtime.contract import MIN_CHUNK, cache_capacity
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.slots_engine import slots_engine
from llama_runtime.step_batch import Step

VOCAB_SIZE, MAX_LEN = 97, 160
PATIENCE = 20.0  # seconds after which a test that waits is wrong


class Watched(Fake):
    """Attributes say what happened; the methods what is to happen."""

    def __init__(
        self, num_slots: int, capacity: int, vocab_size: int, num_prefix_blocks: int = 0
    ) -> None:
        super().__init__(num_slots, capacity, vocab_size, num_prefix_blocks=num_prefix_blocks)
        self._goes_on = threading.Condition()
        self._allowed = float("inf")
        self.steps: list[set[int]] = []  # the sequences of each step that has begun
        self.threads: set[int] = set()
        self.num_closes = 0
        self.seconds = 0.0  # that a step takes at least
        self.failure: BaseException | None = None
        self.spoiled: set[int] = set()  # first prompt tokens of rows that become NaN

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        with self._goes_on:
            self.steps.append({chunk.seq.id for chunk in step.chunks})
            self.threads.add(threading.get_ident())
            self._goes_on.notify_all()
            assert self._goes_on.wait_for(lambda: len(self.steps) <= self._allowed, PATIENCE)
        time.sleep(self.seconds)
        if self.failure is not None:
            raise self.failure
        logits = super().run(step)
        sampled = [chunk.seq for chunk in step.chunks if chunk.samples]
        for row, seq in zip(logits, sampled, strict=False):
            if seq.token_ids[0] in self.spoiled:
                row[:] = np.nan
        return logits

    def close(self) -> None:
        self.num_closes += 1

    def hang_after(self, steps: int) -> None:
        """Let that many more steps end; the next one hangs until `go_on`."""
        with self._goes_on:
            self._allowed = len(self.steps) + steps
            self._goes_on.notify_all()

    def go_on(self) -> None:
        with self._goes_on:
            self._allowed = float("inf")
            self._goes_on.notify_all()

    def wait_until_it_hangs(self) -> None:
        with self._goes_on:
            assert self._goes_on.wait_for(lambda: len(self.steps) > self._allowed, PATIENCE)

    def steps_with(self, sequence_id: int, since: int) -> int:
        """How many steps after the first `since` ran a sequence."""
        return sum(sequence_id in step for step in self.steps[since:])


def watched_engine(max_batch: int = 2) -> tuple[Engine, Watched]:
    """An engine whose sequences end after `max_tokens` alone, and its backend."""
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.decoder = decoders.ByteLevel()
    backend = Watched(max_batch, cache_capacity(MAX_LEN, MIN_CHUNK), VOCAB_SIZE)
    engine = slots_engine(
        backend,
        TokenBytes(tokenizer),
        (),
        vocab_size=VOCAB_SIZE,
        max_batch=max_batch,
        max_len=MAX_LEN,
        prompt_budget=MIN_CHUNK,
        max_chunk=MIN_CHUNK,
    )
    return engine, backend


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something holds that another thread brings about."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
