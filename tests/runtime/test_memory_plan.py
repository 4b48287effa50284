"""The memory plan: its arithmetic, what it proposes, and how it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from llama_runtime import loading
from llama_runtime.async_llm import AsyncLLM
from llama_runtime.contract import CHUNK_MULTIPLE, PROMPT_CHUNK, Geometry, cache_capacity
from llama_runtime.errors import BundleError, CapacityError, RequestError
from llama_runtime.kv_cache import cache_buffers
from llama_runtime.llm import LLM
from llama_runtime.machine import Memory
from llama_runtime.manifest import Manifest
from llama_runtime.memory_plan import MemoryPlan, describe, weight_bytes
from llama_runtime.params import SamplingParams
from tests.runtime.conftest import FAKE_GEOMETRY

SMOLLM2 = Geometry(
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    hidden_size=576,
    intermediate_size=1536,
    vocab_size=49152,
    max_positions=8192,
)
GB = 10**9


def plan(available: int, *, max_batch: int = 32, max_len: int = 4096, **model: int) -> MemoryPlan:
    return MemoryPlan(
        geometry=replace(SMOLLM2, **model),
        weights=541_000_000,
        available=Memory(available, "container"),
        max_batch=max_batch,
        max_len=max_len,
        prompt_budget=256,
    )


@pytest.mark.parametrize(("max_batch", "max_len"), [(1, 2), (3, 40), (5, 500)])
def test_the_cache_is_as_large_as_its_buffers(max_batch: int, max_len: int) -> None:
    buffers = cache_buffers(FAKE_GEOMETRY, max_batch, cache_capacity(max_len, 128))
    planned = replace(plan(0, max_batch=max_batch, max_len=max_len), geometry=FAKE_GEOMETRY)
    assert planned.cache == sum(buffer.nbytes for buffer in buffers)


def test_the_cache_of_a_known_model() -> None:
    # Bytes of a token, by hand; the last chunk of 4,095 tokens starts at 4,064.
    assert plan(0, max_batch=1).cache == 46_080 * (4064 + 128)


def test_the_total_is_the_sum_and_fits_to_the_byte() -> None:
    one = plan(8 * GB)
    assert one.total == one.weights + one.cache + one.workspace
    more = replace(one, prefix_tokens=4096)
    assert more.total - one.total == more.prefixes == 46_080 * 4096
    assert plan(one.total).fits
    assert not plan(one.total - 1).fits


def test_the_workspace_grows_with_everything_that_a_step_holds() -> None:
    base = plan(0).workspace
    assert 100_000_000 < base < 250_000_000
    for more in (
        plan(0, max_batch=300),
        plan(0, num_heads=12),
        plan(0, num_kv_heads=9),
        plan(0, intermediate_size=3072),
        plan(0, hidden_size=1152),
        plan(0, vocab_size=128_256),
        replace(plan(0), prompt_budget=300),
    ):
        assert more.workspace > base
    assert plan(0, max_len=8192).workspace == base  # attention holds no more for a longer past


@pytest.mark.parametrize("available", [GB, 2 * GB, 5 * GB, 12 * GB, 30 * GB])
@pytest.mark.parametrize(("max_batch", "max_len"), [(1, 8192), (32, 4096), (200, 300), (1024, 90)])
def test_the_largest_settings_fit_and_larger_ones_do_not(
    available: int, max_batch: int, max_len: int
) -> None:
    here = plan(available, max_batch=max_batch, max_len=max_len)
    if batch := here.largest_max_batch:
        assert replace(here, max_batch=batch).fits
        assert batch == 1024 or not replace(here, max_batch=batch + 1).fits
    else:
        assert not replace(here, max_batch=1).fits
    if length := here.largest_max_len:
        assert replace(here, max_len=length).fits
        if length < 8192:
            assert not replace(here, max_len=length + (1 if length < 64 else 64)).fits
            assert length < 64 or length % 64 == 0
    else:
        assert not replace(here, max_len=2).fits
    assert here.fits == (here.largest_max_batch >= max_batch)


def test_the_models_limit_is_proposed_as_it_is() -> None:
    assert plan(90 * GB, max_positions=1000).largest_max_len == 1000


def test_a_refusal_names_the_numbers_and_what_fits() -> None:
    here = plan(3 * GB)
    with pytest.raises(CapacityError) as refusal:
        here.check()
    assert str(refusal.value) == (
        "max_batch 32 and max_len 4096 need 6,933 MB: weights 541 MB, cache 6,181 MB, workspace "
        "210 MB; 3,000 MB are available (container): set max_batch 11, or max_len 1408"
    )
    assert refusal.value.param == "max_batch"
    replace(here, max_batch=11).check()
    replace(here, max_len=1344).check()


def test_kept_prompts_are_as_large_as_their_buffers() -> None:
    here = replace(plan(0), geometry=FAKE_GEOMETRY, prefix_tokens=96)
    buffers = cache_buffers(FAKE_GEOMETRY, here.num_prefix_blocks, CHUNK_MULTIPLE)
    assert here.num_prefix_blocks == 3
    assert here.prefixes == sum(buffer.nbytes for buffer in buffers)


def test_as_many_prompts_as_fit_can_be_kept() -> None:
    bare, block = plan(0, max_batch=4), 46_080 * 32
    for room, expected in ((-1, 0), (0, 0), (block - 1, 0), (block, 32), (9 * block, 128)):
        here = replace(plan(bare.total + room, max_batch=4), prefix_tokens=128)
        assert here.largest_prefix_tokens == expected
        assert replace(here, prefix_tokens=expected).fits == (room >= 0)


def test_kept_prompts_are_shown_where_there_are_some() -> None:
    bare, some = plan(24 * GB), replace(plan(24 * GB), prefix_tokens=4096)
    assert "prefixes up to 189 MB, workspace" in some.summary()
    assert "prefixes      189 MB\n" in describe(some)
    assert (some.to_dict()["prefix_tokens"], some.to_dict()["prefixes"]) == (4096, 46_080 * 4096)
    assert "prefixes" not in bare.summary() + describe(bare)
    assert max(map(len, describe(some).splitlines())) <= 40


def test_a_refusal_says_how_many_prompts_can_be_kept() -> None:
    here = replace(plan(7 * GB), prefix_tokens=10**6)
    with pytest.raises(CapacityError, match=r"cache 6,181 MB, prefixes 46,080 MB, .*") as refusal:
        here.check()
    assert str(refusal.value).endswith(": set prefix_tokens 1440")
    assert refusal.value.param == "prefix_tokens"
    replace(here, prefix_tokens=1440).check()


def test_a_refusal_names_the_one_option_that_helps() -> None:
    with pytest.raises(CapacityError, match=r": set max_len \d+$") as refusal:
        plan(GB, max_batch=1, max_len=8192).check()
    assert refusal.value.param == "max_len"
    few = plan(1_500_000_000, max_batch=1024, max_len=200)
    with pytest.raises(CapacityError, match=r": set max_batch \d+$") as refusal:
        few.check()
    assert refusal.value.param == "max_batch"


def test_a_refusal_names_both_options_where_neither_helps_alone() -> None:
    here = plan(800_000_000, max_batch=1024, max_len=8192)
    assert (here.largest_max_batch, here.largest_max_len) == (0, 0)
    with pytest.raises(CapacityError, match=r": set max_batch 1 and max_len (\d+)$") as refusal:
        here.check()
    length = int(str(refusal.value).rsplit(" ", 1)[1])
    replace(here, max_batch=1, max_len=length).check()
    assert refusal.value.param == "max_batch"


def test_a_model_that_never_fits_is_said_so() -> None:
    with pytest.raises(CapacityError, match="the model itself doesn't fit") as refusal:
        plan(620_000_000).check()
    assert refusal.value.param == "bundle"


def test_the_page_fits_a_narrow_terminal() -> None:
    for here in (
        plan(24 * GB),
        plan(620_000_000),
        plan(24 * GB, max_batch=1024, max_len=131_072, max_positions=131_072),
    ):
        page = describe(here)
        assert max(map(len, page.splitlines())) <= 40
        assert page.endswith("\n")
        ends = {line.index(" MB") for line in page.splitlines() if " MB" in line}
        assert len(ends) == 1, "the figures are aligned"
        assert ("does not fit" in page) != here.fits


def test_weights_are_the_graph_and_what_it_points_into(fake_bundle: Path) -> None:
    manifest = Manifest.from_json((fake_bundle / "manifest.json").read_bytes())
    some = manifest.files["tokenizer.json"]
    files = {
        "decoder.onnx": replace(some, size=3),
        "other.onnx": replace(some, size=50),
        "model.safetensors": replace(some, size=100),
        "tokenizer.json": some,
    }
    assert weight_bytes(replace(manifest, files=files), "slots") == 103


# --- in the library -----------------------------------------------------------------------------

# The fake model's cache takes 64 bytes a token; this is what all else of one slot takes.
REST = replace(plan(0, max_batch=1, max_len=512), geometry=FAKE_GEOMETRY, weights=0).workspace


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that are available, to be changed."""
    bytes_left = [GB]

    def available_memory(mapped_bytes: int) -> Memory:
        return Memory(bytes_left[0] - mapped_bytes, "container")

    monkeypatch.setattr(loading, "available_memory", available_memory)
    return bytes_left


def test_it_is_refused_before_anything_is_loaded(
    fake_bundle: Path, memory: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(loading, "open_session", lambda *_: opened.append(1))
    memory[0] = REST + 64 * cache_capacity(400, PROMPT_CHUNK)
    with pytest.raises(CapacityError, match=r"max_batch 1 and max_len 500 .* set max_len 384$"):
        LLM(fake_bundle, max_batch=1, max_len=500, threads=1)
    assert opened == []


@pytest.mark.usefixtures("fake_backend")
def test_by_default_max_len_is_what_the_plan_allows(
    fake_bundle: Path, memory: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "LEAST_DEFAULT_LEN", 256)
    for room, expected in ((512, 512), (470, 448), (256, 256)):
        memory[0] = REST + 64 * cache_capacity(room, PROMPT_CHUNK)
        assert LLM.plan(fake_bundle, max_batch=1).max_len == expected
        with LLM(fake_bundle, max_batch=1, threads=1) as loaded:
            assert loaded.max_len == expected == loaded.memory_plan.max_len
    memory[0] = REST + 64 * cache_capacity(225, PROMPT_CHUNK)  # less is not chosen for anybody
    with pytest.raises(CapacityError, match=r"max_len 512 need .* set max_len 192$"):
        LLM(fake_bundle, max_batch=1, threads=1)


@pytest.mark.usefixtures("fake_backend")
def test_by_default_so_many_prompts_are_kept_as_fit(fake_bundle: Path, memory: list[int]) -> None:
    slots = 64 * cache_capacity(512, PROMPT_CHUNK)
    for room, expected in ((4096 + 100, 4096), (4095, 4064), (40, 32), (31, 0)):
        memory[0] = REST + slots + 64 * room
        plan = LLM.plan(fake_bundle, max_batch=1)
        assert (plan.prefix_tokens, plan.max_len, plan.fits) == (expected, 512, True)
        with LLM(fake_bundle, max_batch=1, threads=1) as loaded:
            assert loaded.memory_plan.prefix_tokens == expected
    memory[0] -= 64 * 100  # then a shorter max_len comes before any kept prompt
    plan = LLM.plan(fake_bundle, max_batch=1, max_len=512)
    assert (plan.prefix_tokens, plan.fits) == (0, False)


@pytest.mark.usefixtures("fake_backend")
def test_a_number_of_kept_tokens_is_rounded_up_to_blocks_and_not_reduced(
    fake_bundle: Path, memory: list[int]
) -> None:
    for wanted, expected in ((0, 0), (1, 32), (32, 32), (33, 64)):
        assert LLM.plan(fake_bundle, prefix_tokens=wanted).prefix_tokens == expected
    memory[0] = REST + 64 * cache_capacity(512, PROMPT_CHUNK)
    with pytest.raises(CapacityError, match=r"set max_len 448, or prefix_tokens 0$"):
        LLM(fake_bundle, max_batch=1, max_len=512, prefix_tokens=32, threads=1)
    for wrong in (-1, 1.5, True, "1", 10**10):
        for make in (LLM, LLM.plan, AsyncLLM):
            with pytest.raises(RequestError, match="prefix_tokens") as refusal:
                make(fake_bundle, prefix_tokens=wrong)  # type: ignore[arg-type]
            assert refusal.value.param == "prefix_tokens"


@pytest.mark.usefixtures("fake_backend")
def test_the_switch_is_that_of_the_engine(fake_bundle: Path) -> None:
    prompt, params = [7] * 200, SamplingParams(max_tokens=3, ignore_eos=True)
    texts = []
    for tokens, spared in ((None, 192), (64, 64), (0, 0)):
        with LLM(fake_bundle, max_batch=2, threads=1, prefix_tokens=tokens) as loaded:
            texts += loaded.generate([prompt, prompt], params)
            assert loaded.stats().reused_tokens == spared
    assert len({completion.text for completion in texts}) == 1


def test_a_plan_can_be_had_without_loading(
    fake_bundle: Path, memory: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "open_session", None)  # so that loading would fail
    memory[0] = 1
    found = LLM.plan(fake_bundle, max_batch=7, max_len=100)
    assert (found.max_batch, found.max_len, found.fits) == (7, 100, False)
    assert found.weights == 0  # the fake graph is empty
    assert json.loads(json.dumps(found.to_dict()))["available"] == 1
    for wrong, name in (({"max_batch": 0}, "max_batch"), ({"max_len": 513}, "max_len")):
        with pytest.raises(RequestError) as refusal:
            LLM.plan(fake_bundle, **wrong)  # type: ignore[arg-type]
        assert refusal.value.param == name
    with pytest.raises(BundleError, match="nowhere"):
        LLM.plan(fake_bundle / "nowhere")


@pytest.mark.parametrize("max_batch", [3, 200])
def test_the_plan_is_that_of_the_engine(
    max_batch: int, fake_backend: None, fake_bundle: Path
) -> None:
    """The chunk and the budget that it counts are those that run."""
    with LLM(fake_bundle, max_batch=max_batch, max_len=300, threads=1) as loaded:
        engine = loaded._engine._engine
        scheduler = engine._scheduler  # type: ignore[attr-defined]
        found = loaded.memory_plan
        assert scheduler.max_chunk == PROMPT_CHUNK
        assert scheduler.prompt_budget == found.prompt_budget
        cells = prod(engine._runner._backend._cache.shape)  # type: ignore[attr-defined]
        assert found.cache == 64 * cells
