"""What a CUDA device must hold: weights, workspace, and a pool that takes what is left."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llama_decoder.shapes import LLAMA_3_1_8B, LLAMA_3_2_1B
from llama_runtime.cuda_plan import CudaPlan, block_size_of
from llama_runtime.errors import CapacityError
from llama_runtime.machine import Memory
from llama_runtime.memory_plan import MAX_BATCH

GPU = Memory(80_000_000_000, "GPU 0, some card")
PLAN = CudaPlan(
    geometry=LLAMA_3_1_8B.geometry,
    weights=16_060_000_000,
    available=GPU,
    max_batch=128,
    max_len=4096,
    prompt_budget=2048,
    block_size=128,
)


def test_a_block_is_what_the_cache_of_all_layers_takes_for_its_tokens() -> None:
    # 32 layers, keys and values, 8 heads of 128 numbers of 2 bytes
    assert PLAN.block_bytes == 128 * 32 * 2 * 8 * 128 * 2


def test_numbers_of_half_the_size_make_blocks_of_half_the_size() -> None:
    """And as many again in what is left, for all else takes what it took."""
    whole = replace(PLAN, max_len=16_384)
    small = replace(whole, cache_dtype="float8e4m3fn")
    assert 2 * small.block_bytes == whole.block_bytes
    assert small.workspace == whole.workspace
    assert 0 <= small.num_blocks - 2 * whole.num_blocks <= 1


def test_the_pool_takes_what_is_left() -> None:
    left = GPU.num_bytes - PLAN.weights - PLAN.workspace
    assert PLAN.cache <= left < PLAN.cache + PLAN.block_bytes
    assert PLAN.fits
    assert PLAN.total <= GPU.num_bytes


def test_the_pool_is_no_larger_than_all_sequences_could_fill() -> None:
    few = replace(PLAN, max_batch=4, max_len=1000)
    assert few.num_blocks == 4 * 8
    assert few.cache == 32 * few.block_bytes


def test_one_sequence_must_fit_and_is_counted_even_where_it_does_not() -> None:
    long = replace(PLAN, available=Memory(19_000_000_000, "GPU 0"), max_len=131_072)
    assert long.num_blocks == 1024
    assert not long.fits
    with pytest.raises(CapacityError, match=r"need .* MB: weights 16,060 MB, cache") as caught:
        long.check()
    assert caught.value.param in ("max_batch", "max_len")
    assert f"set max_len {long.largest_max_len}" in str(caught.value).replace("or ", "set ")


@pytest.mark.parametrize("num_bytes", [18_500_000_000, 24_000_000_000, 80_000_000_000])
def test_the_nearest_settings_fit_and_the_next_do_not(num_bytes: int) -> None:
    plan = replace(PLAN, available=Memory(num_bytes, "GPU 0"), max_len=8192)
    length, batch = plan.largest_max_len, plan.largest_max_batch
    if length:
        assert replace(plan, max_len=length).fits
        assert length == plan.geometry.max_positions or not replace(plan, max_len=length + 64).fits
    if batch:
        assert replace(plan, max_batch=batch).fits
        assert batch == MAX_BATCH or not replace(plan, max_batch=batch + 1).fits


def test_more_sequences_share_the_pool_and_cost_their_tables() -> None:
    more = replace(PLAN, max_batch=256)
    assert more.num_blocks < PLAN.num_blocks
    # two tables of the sampler and a row of logits for each slot
    assert more.workspace - PLAN.workspace >= 128 * 128_256 * (6 + 2)


def test_a_model_that_does_not_fit_at_all_says_so() -> None:
    small = replace(PLAN, available=Memory(8_000_000_000, "GPU 0, a small card"))
    with pytest.raises(CapacityError, match=r"GPU 0, a small card\): the model itself doesn't fit"):
        small.check()


def test_the_summary_names_the_device_and_the_tokens() -> None:
    text = PLAN.summary()
    assert "GPU 0, some card" in text
    assert f"{PLAN.num_blocks * 128:,} tokens in blocks of 128" in text


def test_blocks_are_those_that_flash_attention_takes() -> None:
    assert block_size_of(LLAMA_3_2_1B.head_dim) == 256
    assert block_size_of(LLAMA_3_1_8B.head_dim) == 128
