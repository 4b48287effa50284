"""Slots have one owner each, and the cache costs only what is touched."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer, decoders, models

from llama_runtime.contract import Geometry
from llama_runtime.detokenizer import Detokenizer, TokenBytes
from llama_runtime.kv_cache import SlotCache, cache_buffers
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence

GEOMETRY = Geometry(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    hidden_size=64,
    intermediate_size=128,
    vocab_size=512,
    max_positions=256,
)
MIB = 2**20


def sequence(sequence_id: int) -> Sequence:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return Sequence(
        id=sequence_id,
        token_ids=[0, 0, 0],
        num_prompt_tokens=3,
        params=SamplingParams(),
        seed=0,
        detokenizer=Detokenizer(TokenBytes(tokenizer)),
    )


def test_the_lowest_free_slot_is_handed_out_first() -> None:
    cache, seqs = SlotCache(4, max_len=10), [sequence(i) for i in range(6)]
    for seq in seqs[:4]:
        cache.allocate(seq)
    assert [seq.slot for seq in seqs[:4]] == [0, 1, 2, 3]
    for i in (2, 0, 3):
        cache.free(seqs[i])
    assert cache.num_free == 3
    cache.allocate(seqs[4])
    cache.allocate(seqs[5])
    assert [seq.slot for seq in seqs] == [None, 1, None, None, 0, 2]
    cache.check()


def test_a_new_owner_starts_with_an_empty_cache() -> None:
    cache, seq = SlotCache(1, max_len=10), sequence(0)
    seq.cache_len = 3
    cache.allocate(seq)
    assert seq.cache_len == 0


def test_only_the_owner_can_free_a_slot_and_only_once() -> None:
    cache, owner, stranger = SlotCache(2, max_len=10), sequence(0), sequence(1)
    cache.allocate(owner)
    stranger.slot = 0
    with pytest.raises(RuntimeError, match="sequence 1 does not hold slot 0"):
        cache.free(stranger)
    cache.check()  # and the owner holds it still
    cache.free(owner)
    with pytest.raises(RuntimeError, match="sequence 0 does not hold slot None"):
        cache.free(owner)
    assert cache.num_free == 2


def test_check_finds_a_slot_that_is_lost_or_held_twice() -> None:
    cache = SlotCache(2, max_len=10)
    cache.allocate(sequence(0))
    cache.check()
    cache._free.append(0)
    with pytest.raises(RuntimeError, match="don't balance"):
        cache.check()
    cache._free.clear()
    with pytest.raises(RuntimeError, match="don't balance"):
        cache.check()


@pytest.mark.parametrize(
    "change", [{"slot": None}, {"slot": 1}, {"cache_len": -1}, {"cache_len": 4}]
)
def test_check_finds_a_sequence_out_of_step(change: dict[str, int | None]) -> None:
    cache, seq = SlotCache(2, max_len=10), sequence(0)
    cache.allocate(seq)
    for name, value in change.items():
        setattr(seq, name, value)
    with pytest.raises(RuntimeError, match="slot 0 is out of step with sequence 0"):
        cache.check()


def test_check_finds_more_tokens_than_fit() -> None:
    cache, seq = SlotCache(1, max_len=2), sequence(0)
    cache.allocate(seq)
    seq.cache_len = 3
    with pytest.raises(RuntimeError, match="out of step"):
        cache.check()


def test_buffers_are_keys_and_values_of_each_layer_in_zeros() -> None:
    buffers = cache_buffers(GEOMETRY, num_slots=3, capacity=40)
    assert [buffer.shape for buffer in buffers] == [(3, 2, 40, 32)] * 4
    for i, buffer in enumerate(buffers):
        assert buffer.dtype == np.float32
        assert buffer.flags.c_contiguous
        assert buffer.flags.writeable
        assert not buffer.any()
        buffer.fill(i + 1)
    assert [float(buffer.max()) for buffer in buffers] == [1, 2, 3, 4]  # and no two overlap


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_resident_only_where_it_was_touched() -> None:
    (keys, *rest) = cache_buffers(replace(GEOMETRY, num_layers=1), num_slots=32, capacity=8192)
    assert keys.nbytes == 64 * MIB
    assert pages_of(keys)["Rss"] == 0
    keys[:, :, :64] = 1
    assert pages_of(keys)["Rss"] * 1024 == keys[:, :, :64].nbytes
    assert "nh" in pages_of(keys)["VmFlags"].split()  # no huge pages
    del rest


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_private_and_goes_back_with_the_buffers() -> None:
    buffers = cache_buffers(GEOMETRY, num_slots=2, capacity=4096)
    addresses = [buffer.ctypes.data for buffer in buffers]
    for buffer in buffers:
        buffer.fill(1)
        # Freed pages of a shared mapping would stay.
        assert pages_of(buffer)["permissions"] == "rw-p"
    del buffers, buffer
    left = [range(*bounds) for bounds, fields in mappings() if "nh" in fields["VmFlags"].split()]
    assert not [address for address in addresses if any(address in pages for pages in left)]


def mappings() -> list[tuple[tuple[int, int], dict[str, Any]]]:
    """Bounds and fields of every mapping of this process; sizes in KiB."""
    found: list[tuple[tuple[int, int], dict[str, Any]]] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        header = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ", line)
        if header:
            bounds = int(header[1], 16), int(header[2], 16)
            found.append((bounds, {"permissions": header[3]}))
        else:
            name, value = line.split(":", 1)
            size = re.fullmatch(r"\s*(\d+) kB", value)
            found[-1][1][name] = int(size[1]) if size else value
    return found


def pages_of(buffer: npt.NDArray[np.float32]) -> dict[str, Any]:
    """The fields of the mapping that holds a buffer, and maybe its neighbours."""
    address = buffer.ctypes.data
    return next(fields for (low, high), fields in mappings() if low <= address < high)
