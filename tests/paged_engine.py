"""An engine over the ``paged`` dialect without a model, and a runner under a test's control."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq

import numpy as np

from llama_runtime.backends.base import Outcome
from llama_runtime.backends.fake_paged import FakeInFlight, FakePaged, Views
from llama_runtime.chunk import Chunk, any_chunk
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.errors import BackendError
from llama_runtime.grammars import GrammarCompiler
from llama_runtime.paged_batch import PagedStep
from llama_runtime.paged_cache import PagedCache
from llama_runtime.sampling import Logits
from llama_runtime.scheduler import Scheduler

POISON = 1 << 40  # a token id that none has


class WatchedPaged(FakePaged):
    """Attributes say what happened, and what is to happen.

    A row that is spoilt leaves its cell spoilt too, but in a prompt's full block, which others may
    share by then. So does every row that holds a block with such a cell, be it behind its tokens:
    what isn't a number stays none when attention masks it.
    """

    def __init__(self, cache: PagedCache, prompt_budget: int, vocab_size: int) -> None:
        super().__init__(cache, prompt_budget, vocab_size)
        self.num_launched = 0
        self.num_closes = 0
        self.rows: Counter[int] = Counter()  # sampled so far, by sequence
        self.refuses: Callable[[Seq[Chunk]], bool] = lambda _: False  # launches that raise
        self.spoils: Callable[[Chunk], bool] = lambda _: False  # rows that become NaN
        self.breaks: Callable[[], bool] = lambda: False  # whether a result raises
        self.interrupts: Callable[[], bool] = lambda: False  # whether waiting for it does, for once
        self.num_interrupts = 0
        self.ready = True

    def launch(self, chunks: Seq[Chunk]) -> WatchedInFlight:
        self.num_launched += 1
        sampling = [chunk.seq.id for chunk in chunks if chunk.samples]
        outcome = super().launch(chunks).result()
        if self.refuses(chunks):
            raise BackendError("this step was told to fail")
        self.rows.update(sampling)
        return WatchedInFlight(outcome, self)

    def run(self, step: PagedStep, views: Views) -> Logits:
        logits = super().run(step, views)
        blocks, size = self.cells.reshape(-1, self._cache.block_size), self._cache.block_size
        sampling = [chunk for chunk in step.chunks if chunk.samples]
        for row, chunk in zip(logits, sampling, strict=False):
            seq, table = chunk.seq, self._cache.table(chunk.seq)
            if self.spoils(chunk) or (blocks[table] == POISON).any():
                row[:] = np.nan
                last = seq.cache_len + chunk.num_tokens - 1
                if last >= seq.num_prompt_tokens // size * size:
                    blocks[table[last // size], last % size] = POISON
        return logits

    def close(self) -> None:
        self.num_closes += 1


class WatchedInFlight(FakeInFlight):
    def __init__(self, outcome: Outcome, runner: WatchedPaged) -> None:
        super().__init__(*outcome)
        self._runner = runner
        self._breaks = runner.breaks()

    @property
    def ready(self) -> bool:  # type: ignore[override]
        return self._runner.ready

    def result(self) -> Outcome:
        if self._runner.interrupts():
            self._runner.num_interrupts += 1
            raise KeyboardInterrupt
        if self._breaks:
            raise BackendError("the device is lost")
        return super().result()


def paged_engine(
    table: TokenBytes,
    eos_token_ids: Collection[int],
    *,
    vocab_size: int,
    max_batch: int,
    max_len: int,
    num_blocks: int,
    block_size: int = 4,
    prompt_budget: int = 64,
    max_chunk: int = 48,
    share_prefixes: bool = True,
    grammars: GrammarCompiler | None = None,
) -> tuple[Engine, WatchedPaged, PagedCache]:
    """An engine that overlaps, its runner and its cache."""
    cache = PagedCache(max_batch, max_len, num_blocks, block_size, share_prefixes=share_prefixes)
    runner = WatchedPaged(cache, prompt_budget, vocab_size)
    scheduler = Scheduler(
        cache, prompt_budget=prompt_budget, max_chunk=max_chunk, cut=any_chunk, max_cells=None
    )
    engine = Engine(
        runner,
        scheduler,
        table,
        eos_token_ids,
        vocab_size=vocab_size,
        max_len=max_len,
        grammars=grammars,
    )
    return engine, runner, cache
