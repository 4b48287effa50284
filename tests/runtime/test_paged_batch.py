"""The packed arrays of a step are what a plain reading of the contract makes of its chunks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import count, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from llama_runtime.chunk import Chunk, any_chunk
from llama_runtime.contract import PAGED, max_logits_rows
from llama_runtime.detokenizer import Detokenizer, TokenBytes
from llama_runtime.paged_batch import Layout, PagedBatch, PagedStep, column_bucket
from llama_runtime.paged_cache import PagedCache
from llama_runtime.params import SamplingParams
from llama_runtime.sampling import sampling_kind
from llama_runtime.scheduler import Scheduler
from llama_runtime.sequence import Sequence
from llama_runtime.step_arrays import ALIGNMENT, EDITED, FILTERED, GREEDY, ROW, row_buckets

BYTE_LEVEL = Tokenizer(models.BPE({"a": 0}, []))
BYTE_LEVEL.decoder = decoders.ByteLevel()
TABLE = TokenBytes(BYTE_LEVEL)
VOCAB_SIZE, MAX_LEN = 50, 60
GARBAGE = 0xEE  # in every byte that a step doesn't write

ids = count()


def sequence(prompt: list[int], **params: Any) -> Sequence:
    of_row = SamplingParams(**params)
    return Sequence(
        id=next(ids),
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        params=of_row,
        seed=of_row.seed or 0,
        detokenizer=Detokenizer(TABLE),
        kind=sampling_kind(of_row),
    )


@dataclass
class Bench:
    """A cache, a scheduler and the builder, moved by hand as the engine moves them."""

    num_slots: int = 4
    num_blocks: int = 64
    block_size: int = 4
    prompt_budget: int = 24
    max_chunk: int = 24
    share_prefixes: bool = True
    running: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = PagedCache(
            self.num_slots,
            MAX_LEN,
            self.num_blocks,
            self.block_size,
            share_prefixes=self.share_prefixes,
        )
        self.scheduler = Scheduler(
            self.cache,
            prompt_budget=self.prompt_budget,
            max_chunk=self.max_chunk,
            cut=any_chunk,
            max_cells=None,
        )
        self.batch = PagedBatch(self.cache, self.prompt_budget, VOCAB_SIZE)
        self.memory = np.zeros(self.batch.largest.num_bytes, np.uint8)

    def add(self, prompt: list[int], **params: Any) -> Sequence:
        seq = sequence(prompt, **params)
        self.scheduler.add(seq)
        self.running.append(seq)
        return seq

    def build(self, chunks: list[Chunk]) -> tuple[PagedStep, dict[str, npt.NDArray[Any]]]:
        self.memory.fill(GARBAGE)
        step = self.batch.build(chunks, self.memory)
        return step, step.layout.views(self.memory)

    def launched(self, chunks: list[Chunk]) -> list[Sequence]:
        """Move on as after a launch; returns whose tokens are pending."""
        sampled = [chunk.seq for chunk in chunks if chunk.samples]
        for chunk in chunks:
            chunk.seq.num_pending += chunk.samples
            chunk.seq.cache_len += chunk.num_tokens
            self.cache.computed(chunk.seq)
        return sampled

    def collected(self, sampled: list[Sequence], token: int, *, ends: bool = False) -> None:
        for seq in sampled:
            seq.num_pending -= 1
            if seq.finish_reason is None:
                seq.append(token)
                if ends or seq.num_completion_tokens == seq.params.max_tokens:
                    seq.finish_reason = "length"
                    self.scheduler.remove(seq)


def reference(bench: Bench, chunks: list[Chunk]) -> dict[str, Any]:
    """What a step of these chunks must be, token by token, without padding."""
    cache = bench.cache
    arrays: dict[str, list[Any]] = {
        name: [] for name in ("given", "slot_mapping", "past_seqlens", "sampled", "scored")
    }
    begins, totals, following = [0], [], []
    for chunk in chunks:
        seq = chunk.seq
        assert seq.slot is not None
        arrays["past_seqlens"].append(seq.cache_len)
        for place in range(seq.cache_len, seq.cache_len + chunk.num_tokens):
            known = place < seq.num_tokens
            arrays["given"].append(seq.token_ids[place] if known else -1 - seq.slot)
            block = cache.table(seq)[place // cache.block_size]
            arrays["slot_mapping"].append(block * cache.block_size + place % cache.block_size)
            row = len(arrays["given"]) - 1
            if seq.params.prompt_logprobs and place + 1 < seq.num_prompt_tokens:
                arrays["scored"].append(row)
                following.append(seq.token_ids[place + 1])
            if place + 1 == seq.num_tokens + seq.num_pending:
                arrays["sampled"].append(row)
        begins.append(len(arrays["given"]))
        totals.append(seq.cache_len + chunk.num_tokens)
    sampling = [chunk.seq for chunk in chunks if chunk.samples]
    return {
        **arrays,
        "begins": begins,
        "totals": totals,
        "following": following,
        "sampling": sampling,
        "counts": [chunk.num_tokens for chunk in chunks],
    }


def agrees(bench: Bench, chunks: list[Chunk]) -> PagedStep:
    wanted = reference(bench, chunks)
    step, views = bench.build(chunks)
    layout, rows, num_tokens = step.layout, len(chunks), len(wanted["given"])
    assert step.chunks is chunks
    assert step.scored == wanted["following"]
    assert step.num_sampled == len(wanted["sampled"])
    assert bench.memory[layout.num_bytes :].tolist() == [GARBAGE] * (
        len(bench.memory) - layout.num_bytes
    )
    all_decode = all(chunk.num_tokens == 1 and chunk.samples for chunk in chunks)
    assert step.decodes == all_decode
    if all_decode:
        assert layout.num_rows == layout.num_tokens == layout.num_logits
        assert layout.num_rows == min(size for size in bench.batch.row_buckets if size >= rows)
    else:
        assert (layout.num_rows, layout.num_tokens) == (rows, num_tokens)
        assert layout.num_logits == max(1, len(wanted["sampled"]) + len(wanted["scored"]))
    padding = layout.num_rows - rows
    assert views["given"].tolist() == wanted["given"] + [0] * padding
    assert views["slot_mapping"].tolist() == wanted["slot_mapping"] + [-1] * padding
    assert views["past_seqlens"].tolist() == wanted["past_seqlens"] + [0] * padding
    begins = wanted["begins"] + [num_tokens + i + 1 for i in range(padding)]
    assert views["cumulative_sequence_length"].tolist() == begins
    read = wanted["sampled"] + wanted["scored"]
    read += [num_tokens + i for i in range(padding)]
    assert views["logits_rows"].tolist() == (read or [0])
    most = max(wanted["totals"])
    assert layout.num_columns == column_bucket(-(-most // bench.block_size))
    for row, chunk in enumerate(chunks):
        table = bench.cache.table(chunk.seq)
        table = table + [0] * layout.num_columns
        assert views["block_table"][row].tolist() == table[: layout.num_columns]
    assert not views["block_table"][rows:].any()
    for row, seq in zip(views["rows"], wanted["sampling"], strict=False):
        says(row, seq)
    assert (views["rows"]["slot"][len(wanted["sampling"]) :] == -1).all()
    bounds(step, wanted, bench)
    return step


def says(row: np.void, seq: Sequence) -> None:
    """A row of ``ROW`` tells how the next token of a sequence is drawn."""
    params = seq.params
    flags = (GREEDY if params.greedy else 0) | (EDITED if seq.edited else 0)
    flags |= FILTERED if params.filtered and not params.greedy else 0
    assert (row["slot"], row["flags"]) == (seq.slot, flags)
    if not params.greedy:
        inverse = min(1 / params.temperature, float(np.finfo(np.float32).max))
        assert row["inverse_temperature"] == np.float32(inverse)
    assert row["top_k"] == (min(params.top_k, VOCAB_SIZE) or VOCAB_SIZE)
    assert (row["top_p"], row["min_p"]) == (params.top_p, np.float32(params.min_p))
    assert row["repetition"] == np.float32(params.repetition_penalty)
    assert row["frequency"] == np.float32(params.frequency_penalty)
    assert row["presence"] == np.float32(params.presence_penalty)
    assert (row["seed"], row["sample"]) == (seq.seed, seq.sample)
    assert row["index"] == len(seq.token_ids) - seq.num_prompt_tokens + seq.num_pending


def bounds(step: PagedStep, wanted: dict[str, Any], bench: Bench) -> None:
    assert step.metadata.dtype == np.int32
    most_new, most, fewest = step.metadata.tolist()
    if step.decodes:  # they must hold for whatever has these sizes
        capacity = step.layout.num_columns * bench.block_size
        assert (most_new, most, fewest) == (1, capacity, 1)
        assert max(wanted["totals"]) <= capacity
    else:
        assert most_new == max(wanted["counts"])
        assert (most, fewest) == (max(wanted["totals"]), min(wanted["totals"]))


prompts = st.builds(
    # Few beginnings, so that some share blocks.
    lambda first, length: [(first + 7 * i) % VOCAB_SIZE for i in range(length)],
    st.integers(0, 2),
    st.integers(1, 40),
)
parameters = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 8),
        "temperature": st.sampled_from([0.0, 0.7, 1e-45, 100.0]),
        "top_k": st.sampled_from([0, 5, 2**31 - 1]),
        "top_p": st.sampled_from([0.8, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "frequency_penalty": st.sampled_from([0.0, 0.3]),
        "seed": st.sampled_from([0, 2**64 - 1]),
        "prompt_logprobs": st.booleans(),
    }
)


@given(st.data())
@settings(max_examples=120)
def test_every_step_of_a_schedule_is_what_the_contract_says(data: st.DataObject) -> None:
    bench = Bench(
        num_slots=data.draw(st.sampled_from([1, 3, 9])),
        num_blocks=data.draw(st.sampled_from([15, 40])),
        prompt_budget=data.draw(st.sampled_from([5, 24, 60])),
        share_prefixes=data.draw(st.booleans()),
    )
    if data.draw(st.booleans()):
        bench.scheduler.max_chunk = 7
    in_flight: list[Sequence] = []
    for prompt, params in data.draw(st.lists(st.tuples(prompts, parameters), max_size=12)):
        bench.add(prompt, **params)
    for number in range(60):
        chunks = bench.scheduler.schedule()
        if not chunks and not in_flight:
            break
        before, in_flight = in_flight, []
        if chunks:
            agrees(bench, chunks)
            in_flight = bench.launched(chunks)
        bench.collected(before, number % VOCAB_SIZE, ends=number % 7 == 6)
        bench.cache.check()


def test_a_pending_token_is_named_by_its_slot() -> None:
    bench = Bench()
    for length in (3, 5):
        bench.add([1] * length, max_tokens=4)
    chunks = bench.scheduler.schedule()
    agrees(bench, chunks)
    sampled = bench.launched(chunks)
    chunks = bench.scheduler.schedule()
    agrees(bench, chunks)
    assert bench.build(chunks)[1]["given"].tolist() == [-1, -2]
    bench.collected(sampled, 9)
    assert bench.build(chunks)[1]["given"].tolist() == [9, 9]


def test_a_step_of_prompts_mixes_ends_middles_and_scored_rows() -> None:
    bench = Bench(prompt_budget=24)
    bench.add([1, 2, 3], max_tokens=4)
    bench.add([4, 5, 6, 7], max_tokens=4, prompt_logprobs=True)
    bench.add([8] * 30, max_tokens=4)
    chunks = bench.scheduler.schedule()
    assert [chunk.num_tokens for chunk in chunks] == [3, 4, 17]
    step = agrees(bench, chunks)
    assert (step.decodes, step.num_sampled, step.scored) == (False, 2, [5, 6, 7])
    assert bench.build(chunks)[1]["logits_rows"].tolist() == [2, 6, 3, 4, 5]


def test_a_step_that_samples_nothing_still_has_a_row_of_logits() -> None:
    bench = Bench(prompt_budget=5)
    bench.add([1] * 9, max_tokens=4)
    chunks = bench.scheduler.schedule()
    step = agrees(bench, chunks)
    assert (step.num_sampled, step.scored, step.layout.num_logits) == (0, [], 1)


def test_one_token_of_a_long_prompt_is_no_step_that_decodes() -> None:
    bench = Bench(prompt_budget=1)
    bench.add([1, 2, 3], max_tokens=4)
    chunks = bench.scheduler.schedule()
    assert [chunk.num_tokens for chunk in chunks] == [1]
    assert not agrees(bench, chunks).decodes


def test_a_shared_prefix_is_read_where_it_lies() -> None:
    bench = Bench()
    first = bench.add([1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=4)
    bench.launched(bench.scheduler.schedule())
    second = bench.add([1, 2, 3, 4, 5, 6, 7, 8, 30], max_tokens=4)
    chunks = bench.scheduler.schedule()
    assert [chunk.seq for chunk in chunks] == [first, second]
    agrees(bench, chunks)  # the second has one token left, so both decode
    _, views = bench.build(chunks)
    assert views["past_seqlens"].tolist()[:2] == [9, 8]
    assert views["block_table"][0, :2].tolist() == views["block_table"][1, :2].tolist()
    assert views["given"].tolist()[:2] == [-1, 30]


def test_a_slot_tells_of_its_newest_owner() -> None:
    bench = Bench(num_slots=1, share_prefixes=False)
    for prompt in ([1] * 20, [2] * 3):
        bench.add(prompt, max_tokens=1, temperature=0.5, seed=prompt[0])
        chunks = bench.scheduler.schedule()
        agrees(bench, chunks)
        bench.collected(bench.launched(chunks), 5)


# --- layouts and sizes --------------------------------------------------------------------------

sizes = st.integers(1, 40)


@given(st.builds(Layout, sizes, sizes, sizes, sizes))
def test_arrays_are_aligned_and_lie_side_by_side(layout: Layout) -> None:
    owners = np.zeros(layout.num_bytes, np.int64)
    for number, (offset, dtype, shape) in enumerate(layout.arrays.values(), start=1):
        assert offset % ALIGNMENT == 0
        assert offset % dtype.itemsize == 0 or dtype is ROW
        place = owners[offset : offset + dtype.itemsize * int(np.prod(shape))]
        assert len(place) == dtype.itemsize * int(np.prod(shape))
        assert not place.any()
        place[:] = number
    # What is left over is less than it takes to align, between two arrays only.
    assert owners[-1] == len(layout.arrays)
    gaps = np.flatnonzero(owners == 0)
    assert all(owners[gap : gap + ALIGNMENT].any() for gap in gaps)


@given(st.builds(Layout, sizes, sizes, sizes, sizes))
def test_views_are_the_memory_itself(layout: Layout) -> None:
    memory = np.zeros(layout.num_bytes + 5, np.uint8)
    views = layout.views(memory)
    for name, view in views.items():
        offset, dtype, shape = layout.arrays[name]
        assert (view.dtype, view.shape) == (dtype, shape)
        assert view.__array_interface__["data"][0] == (
            memory.__array_interface__["data"][0] + offset
        )
        view.view(np.uint8)[...] = 1
    assert memory.sum() == sum(view.nbytes for view in views.values())
    assert not memory[layout.num_bytes :].any()


def test_the_arrays_are_those_of_the_contract() -> None:
    arrays = Layout(3, 7, 2, 4).arrays
    letters = {"B": 3, "B+1": 4, "N": 7, "R": 2, "P": 4}
    for spec in PAGED.inputs:
        if spec.name in arrays:  # the tokens are made on the device, the bounds stay here
            _, dtype, shape = arrays[spec.name]
            assert dtype == np.dtype(spec.dtype)
            assert shape == tuple(letters[axis] for axis in spec.axes)
    unbound = {spec.name for spec in PAGED.inputs} - arrays.keys()
    assert unbound == {"input_ids", "attention_metadata"}


@pytest.mark.parametrize("num_slots", [1, 2, 7, 8, 33, 64, 100])
@pytest.mark.parametrize("prompt_budget", [1, 64, 512])
def test_the_largest_layout_has_room_for_every_step(num_slots: int, prompt_budget: int) -> None:
    cache = PagedCache(num_slots, MAX_LEN, 16, 4)
    batch = PagedBatch(cache, prompt_budget, VOCAB_SIZE)
    most_columns = column_bucket(-(-MAX_LEN // 4))
    steps = [batch.decode_layout(rows, most_columns) for rows in range(1, num_slots + 1)]
    steps.append(Layout(num_slots, prompt_budget, max_logits_rows(num_slots), most_columns))
    assert all(step.num_bytes <= batch.largest.num_bytes for step in steps)
    assert all(step.num_tokens <= batch.largest.num_tokens for step in steps)
    assert all(step.num_logits <= batch.largest.num_logits for step in steps)


def test_rows_are_padded_by_less_than_half_of_them() -> None:
    for num_slots in range(1, 600):
        buckets = row_buckets(num_slots)
        assert buckets[0] == 1
        assert buckets[-1] == num_slots
        assert all(below < above for below, above in pairwise(buckets))
        # The most padded are one more than the bucket below has.
        assert all(2 * (above - below - 1) < above for below, above in pairwise(buckets))
        assert len(buckets) <= 2 * num_slots.bit_length() + 1


def test_large_steps_are_padded_by_less_than_128_rows() -> None:
    buckets = row_buckets(5000)
    assert all(above - below <= 128 for below, above in pairwise(buckets))


def test_columns_are_padded_to_powers_of_two() -> None:
    assert [column_bucket(i) for i in range(1, 10)] == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert all(n <= column_bucket(n) < 2 * n for n in range(1, 5000))


def test_steps_of_one_size_are_one_layout() -> None:
    batch = Bench(num_slots=32).batch
    assert batch.decode_layout(17, 4) is batch.decode_layout(24, 4)
    assert batch.decode_layout(17, 4) is not batch.decode_layout(17, 8)


def test_a_temperature_near_zero_leaves_a_finite_factor() -> None:
    bench = Bench()
    bench.add([1, 2], max_tokens=1, temperature=5e-324)
    _, views = bench.build(bench.scheduler.schedule())
    assert np.isfinite(views["rows"]["inverse_temperature"]).all()


def test_a_row_is_laid_out_as_the_kernels_read_it() -> None:
    source = (
        files("llama_runtime.backends").joinpath("kernels/sampler.cu").read_text(encoding="utf-8")
    )
    (body,) = re.findall(r"struct Row \{(.*?)\};", source, re.DOTALL)
    types = {"int": "i4", "float": "f4", "double": "f8", "u64": "u8"}
    fields, offset = [], 0
    for kind, names in re.findall(r"(\w+) ([\w, ]+);", re.sub(r"//.*", "", body)):
        dtype = np.dtype(types[kind])
        for name in names.split(","):
            offset = -(-offset // dtype.itemsize) * dtype.itemsize  # as C aligns it
            fields.append((name.strip(), dtype, offset))
            offset += dtype.itemsize
    assert ROW.names is not None
    assert ROW.fields is not None
    assert fields == [(name, *ROW.fields[name][:2]) for name in ROW.names]
    assert ROW.itemsize == 64 == -(-offset // 8) * 8
    defined = dict(re.findall(r"#define (GREEDY|FILTERED|EDITED) (\d+)", source))
    assert {name: int(value) for name, value in defined.items()} == {
        "GREEDY": GREEDY,
        "FILTERED": FILTERED,
        "EDITED": EDITED,
    }
