"""A runner without a model or a device, for tests of everything around the ``paged`` dialect."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_runtime.backends.base import Outcome
from llama_runtime.backends.fake import digest
from llama_runtime.chunk import Chunk
from llama_runtime.errors import BackendError
from llama_runtime.grammar_masks import MaskFiller, Masks, forbid, mask_words
from llama_runtime.host_masks import grammar_rows
from llama_runtime.paged_batch import Layout, PagedBatch, PagedStep
from llama_runtime.paged_cache import PagedCache
from llama_runtime.params import SamplingParams
from llama_runtime.sampling import NOT_FINITE, Logits, Reference, draw, likeliest, uniform
from llama_runtime.sequence import Sequence, TokenLogprob
from llama_runtime.step_arrays import EDITED, FILTERED, GREEDY, MASKED

Views = dict[str, npt.NDArray[Any]]

MAX_TEMPERATURE = 100.0  # which the inverse of its inverse may exceed by a rounding


class FakePaged:
    """Deterministic logits that depend on every token of a sequence and on nothing else.

    It does what the device does: reads the packed arrays of a step and nothing else, keeps token
    ids in blocks where a model keeps keys and values, leaves each slot's newest token where the
    next step finds it, and samples as ``rows`` says. Logits are those of ``Fake``, so the same
    sequence gets the same tokens, and a wrong cell, a stale table or somebody else's token changes
    what is generated. A step that breaks the contract raises; so does a row of a sequence with
    penalties, ``logit_bias`` or ``min_tokens``, whose tables only the device keeps.

    Args:
        cache: who holds which block.
        prompt_budget: the most prompt tokens of a step.
        vocab_size: V.
    """

    overlaps = True
    verifies = False

    def __init__(self, cache: PagedCache, prompt_budget: int, vocab_size: int) -> None:
        self._cache = cache
        self._batch = PagedBatch(cache, prompt_budget, vocab_size)
        self._memory = np.zeros(self._batch.largest.num_bytes, np.uint8)
        self._bounds: dict[Layout, list[int]] = {}  # of steps that decode, as they were captured
        self.cells = np.full(cache.num_blocks * cache.block_size, -1, np.int64)
        self._newest = np.full(cache.num_slots, NOT_FINITE, np.int64)  # by slot
        self._noise = np.random.default_rng(0).standard_normal(2 * vocab_size).astype(np.float32)
        self._vocab_size = vocab_size
        self._filler = MaskFiller(threads=1)

    def launch(self, chunks: Seq[Chunk]) -> FakeInFlight:
        """See ``Runner.launch``."""
        self._memory.fill(0xEE)  # what a step doesn't write is no part of it
        step = self._batch.build(chunks, self._memory)
        views = step.layout.views(self._memory)
        logits = self.run(step, views)
        masks: Masks = np.full((step.num_sampled, mask_words(self._vocab_size)), -1, np.int32)
        if rows := grammar_rows(chunks):
            self._filler.fill(rows, masks)
        tokens = self._sample(step, views["rows"], logits, masks)
        return FakeInFlight(tokens, *_score(step, tokens, logits))

    def run(self, step: PagedStep, views: Views) -> Logits:
        """Write the new tokens into their blocks.

        Returns:
            Logits [R, V].
        """
        new = views["given"].astype(np.int64)
        pending = new < 0
        new[pending] = self._newest[-1 - new[pending]].clip(0)
        histories = self._histories(step, views)
        mapping = views["slot_mapping"]
        self.cells[mapping[mapping >= 0]] = new[mapping >= 0]
        begins = views["cumulative_sequence_length"]
        logits = np.zeros((step.layout.num_logits, self._vocab_size), np.float32)
        for row, place in enumerate(views["logits_rows"].tolist()):
            owner = int(np.searchsorted(begins, place, side="right")) - 1
            if not 0 <= owner < len(histories):
                raise BackendError(f"row {row} of the logits is of no token: {place}")
            history = histories[owner]
            if not len(history):  # a padded row
                continue
            seen = self.cells[history[: len(history) - int(begins[owner + 1]) + place + 1]]
            if seen.min() < 0:
                raise BackendError(f"row {owner} looks at a cell that nobody has written")
            start = digest(seen) % self._vocab_size
            logits[row] = self._noise[start : start + self._vocab_size]
        return logits

    def clean(self, seq: Sequence) -> None:
        """See ``Runner.clean``."""
        blocks = self.cells.reshape(-1, self._cache.block_size)
        blocks[self._cache.own_blocks(seq)] = -1

    def close(self) -> None:
        """See ``Runner.close``."""

    def _histories(self, step: PagedStep, views: Views) -> list[npt.NDArray[np.int64]]:
        """The cells of each row's tokens, those of the step last; none where a row is padded."""
        begins, pasts = views["cumulative_sequence_length"], views["past_seqlens"]
        mapping, size = views["slot_mapping"], self._cache.block_size
        most_new, most, fewest = self._bounds_of(step)
        if begins[0] != 0 or begins[-1] != len(mapping):
            raise BackendError("the rows of a step don't cover its tokens")
        histories, read = [], np.zeros(len(self.cells), np.int64)
        for i, (begin, past) in enumerate(zip(begins[:-1].tolist(), pasts.tolist(), strict=True)):
            count = int(begins[i + 1]) - begin
            total = past + count
            if not 1 <= count <= most_new or not fewest <= total <= most:
                raise BackendError(f"row {i}: {count} tokens after {past} exceed the step's bounds")
            places = mapping[begin : begin + count]
            if step.decodes and views["rows"]["slot"][i] < 0:
                if places[0] != -1 or past != 0:
                    raise BackendError(f"row {i} is padded, but writes or looks back")
                histories.append(np.zeros(0, np.int64))
                continue
            positions = np.arange(total)
            cells = views["block_table"][i].astype(np.int64)[positions // size] * size
            cells += positions % size
            if not np.array_equal(cells[past:], places):
                raise BackendError(f"row {i} writes elsewhere than its table says")
            read[cells] += 1
            histories.append(cells)
        if (read[mapping[mapping >= 0]] != 1).any():
            raise BackendError("a row writes where another looks")
        return histories

    def _bounds_of(self, step: PagedStep) -> list[int]:
        """``attention_metadata``; a step that decodes keeps what its size was captured with."""
        bounds: list[int] = step.metadata.tolist()
        return self._bounds.setdefault(step.layout, bounds) if step.decodes else bounds

    def _sample(
        self, step: PagedStep, rows: npt.NDArray[Any], logits: Logits, masks: Masks
    ) -> list[int]:
        slots, tokens = [], []
        for i, row in enumerate(rows):
            if row["slot"] < 0:
                continue
            if row["flags"] & EDITED:
                raise BackendError("the fake can't change logits before it samples from them")
            values = logits[i].copy()
            if row["flags"] & MASKED:
                forbid(values, masks[i])
            token = int(likeliest(values[None])[0])
            if token != NOT_FINITE and not row["flags"] & GREEDY:
                number = uniform(int(row["seed"]), int(row["sample"]), int(row["index"]))
                token = draw(values, _params(row), number)
            slots.append(int(row["slot"]))
            tokens.append(token)
        if len(tokens) != step.num_sampled:
            raise BackendError(f"{len(tokens)} rows are sampled, not {step.num_sampled}")
        self._newest[slots] = tokens
        return tokens


class FakeInFlight:
    """See ``Launched``."""

    ready = True

    def __init__(
        self,
        tokens: list[int],
        logprobs: list[TokenLogprob | None],
        prompt_logprobs: list[list[TokenLogprob | None]],
    ) -> None:
        self._outcome = Outcome(tokens, logprobs, prompt_logprobs)

    def result(self) -> Outcome:
        """See ``Launched.result``."""
        return self._outcome


def _params(row: np.void) -> SamplingParams:
    """What ``ROW`` says of a row that isn't greedy."""
    temperature = min(1 / float(row["inverse_temperature"]), MAX_TEMPERATURE)
    if not row["flags"] & FILTERED:
        return SamplingParams(temperature=temperature)
    return SamplingParams(
        temperature=temperature,
        top_k=int(row["top_k"]),
        top_p=float(row["top_p"]),
        min_p=float(row["min_p"]),
    )


def _score(
    step: PagedStep, tokens: list[int], logits: Logits
) -> tuple[list[TokenLogprob | None], list[list[TokenLogprob | None]]]:
    """The log-probabilities that the sequences ask for: of sampled tokens, and of prompts'."""
    wanted = np.array([*tokens, *step.scored], np.int64)
    scores = Reference().score(logits[: len(wanted)], wanted.clip(0))

    def logprob(row: int, num_top: int) -> TokenLogprob:
        ids, values = scores.top_token_ids[row, :num_top], scores.top_logprobs[row, :num_top]
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return TokenLogprob(int(wanted[row]), float(scores.logprobs[row]), top)

    sampling = [chunk.seq.params for chunk in step.chunks if chunk.samples]
    logprobs = [
        logprob(row, params.top_logprobs) if params.logprobs else None
        for row, params in enumerate(sampling)
    ]
    prompt_logprobs: list[list[TokenLogprob | None]] = []
    row = len(tokens)
    for chunk in step.chunks:
        params, count = chunk.seq.params, chunk.num_scored
        first = params.prompt_logprobs and chunk.seq.cache_len == 0
        prompt_logprobs.append([None] if first else [])
        prompt_logprobs[-1] += [logprob(row + i, params.top_logprobs) for i in range(count)]
        row += count
    return logprobs, prompt_logprobs
