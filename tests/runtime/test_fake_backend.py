"""The fake backend reads the cache as attention does, so wrong bookkeeping shows in its logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llama_runtime.backends.fake import Fake
from llama_runtime.errors import BackendError
from llama_runtime.step_batch import Step

CAPACITY, VOCAB_SIZE = 24, 1000


def step(rows: dict[int, tuple[int, list[int]]], num_slots: int = 3, **changes: Any) -> Step:
    """A step in which each slot adds tokens to so many cached ones; all of them get logits."""
    width = max(2, *(len(tokens) for _, tokens in rows.values()))
    unpack = np.zeros((num_slots, width), np.int64)
    seqlens_k, query_seqlens = np.zeros((2, num_slots), np.int32)
    input_ids: list[int] = []
    pack: list[int] = []
    for slot, (past, tokens) in rows.items():
        unpack[slot, : len(tokens)] = np.arange(len(tokens)) + len(input_ids)
        seqlens_k[slot] = past + len(tokens) - 1
        query_seqlens[slot] = len(tokens)
        pack += [slot * width + i for i in range(len(tokens))]
        input_ids += tokens
    arrays = {
        "input_ids": np.array(input_ids, np.int64),
        "logits_rows": np.arange(len(input_ids), dtype=np.int64),
        "unpack": unpack,
        "pack": np.array(pack, np.int64),
        "seqlens_k": seqlens_k,
        "query_seqlens": query_seqlens,
        "total_sequence_length": np.array(max(width, seqlens_k.max() + 1), np.int32),
    }
    return Step(
        **{
            **arrays,
            "first_slot": 0,
            "num_logits": len(input_ids),
            "num_scored": 0,
            "chunks": [],
            **changes,
        }
    )


def fake() -> Fake:
    return Fake(3, CAPACITY, VOCAB_SIZE)


def rows_of(tokens: list[int]) -> npt.NDArray[np.float32]:
    """Logits [tokens, V] of a sequence that runs alone, in one chunk."""
    return fake().run(step({0: (0, tokens)}))


def test_logits_do_not_depend_on_chunks_slots_or_neighbours() -> None:
    backend, expected = fake(), rows_of([5, 6, 7, 8, 9])
    backend.run(step({0: (0, [1, 2, 3])}))
    first = backend.run(step({0: (3, [4]), 2: (0, [5, 6, 7])}))
    second = backend.run(step({2: (3, [8]), 1: (0, [3, 3])}))
    third = backend.run(step({0: (4, [9, 9]), 2: (4, [9])}))
    assert np.array_equal(np.concatenate([first[1:], second[:1], third[2:]]), expected)


def test_a_slot_that_changed_hands_forgets_its_former_owner() -> None:
    backend = fake()
    backend.run(step({0: (0, [9, 8, 7, 6, 5])}))
    assert np.array_equal(backend.run(step({0: (0, [1, 2])})), rows_of([1, 2]))


def test_a_kept_block_is_the_same_in_another_slot() -> None:
    tokens = list(range(34))
    backend = Fake(3, 64, VOCAB_SIZE, num_prefix_blocks=2)
    backend.run(step({0: (0, tokens[:32])}))
    backend.save_block(slot=0, start=0, block=1)
    backend.clean(0, 32)
    backend.load_block(slot=2, start=0, block=1)
    rows = backend.run(step({2: (32, tokens[32:])}))
    expected = Fake(3, 64, VOCAB_SIZE).run(step({0: (0, tokens)}))[32:]
    assert np.array_equal(rows, expected)


@pytest.mark.parametrize(
    "other", [[6, 5, 7], [5, 6, 8], [4, 6, 7], [0, 5, 6, 7], [5, 6], [5, 6, 7, 0]]
)
def test_logits_depend_on_every_token_and_its_place(other: list[int]) -> None:
    assert not np.array_equal(rows_of([5, 6, 7])[-1], rows_of(other)[-1])


def test_a_stale_length_or_a_swapped_slot_shows() -> None:
    expected = rows_of([5, 6, 7, 8])[-1]
    for slot, past in ((0, 2), (0, 4), (1, 3)):
        backend = fake()
        backend.run(step({0: (0, [5, 6, 7]), 1: (0, [7, 6, 5])}))
        assert not np.array_equal(backend.run(step({slot: (past, [8])}))[0], expected)


def test_only_the_rows_asked_for_get_logits() -> None:
    backend, expected = fake(), rows_of([5, 6, 7])
    logits = backend.run(step({0: (0, [5, 6, 7])}, logits_rows=np.array([2, 0])))
    assert np.array_equal(logits, expected[[2, 0]])
    nothing = backend.run(step({0: (0, [5, 6, 7])}, logits_rows=np.zeros(0, np.int64)))
    assert nothing.shape == (0, VOCAB_SIZE)


def test_a_padded_chunk_past_the_capacity_is_an_error() -> None:
    backend = fake()
    backend.run(step({0: (0, list(range(CAPACITY)))}))
    backend.run(step({0: (CAPACITY - 2, [1])}))
    with pytest.raises(BackendError, match="do not fit the cache"):
        backend.run(step({0: (CAPACITY - 1, [1])}))
    with pytest.raises(BackendError, match="do not fit the cache"):
        backend.run(step({0: (CAPACITY - 4, [1]), 1: (0, [1] * 5)}))


def test_lengths_that_contradict_each_other_are_an_error() -> None:
    one = np.array(1, np.int32)
    with pytest.raises(BackendError, match="do not fit the cache"):
        fake().run(step({0: (0, [1, 2, 3])}, total_sequence_length=one))
    with pytest.raises(BackendError, match="do not fit the cache"):
        fake().run(step({0: (-1, [1])}))


def test_pack_must_invert_unpack() -> None:
    with pytest.raises(BackendError, match="pack is not the inverse of unpack"):
        fake().run(step({0: (0, [1, 2])}, pack=np.array([1, 0])))
