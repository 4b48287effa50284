"""Keys and values in 8 bits at run time: a quarter of the memory, by the name of the precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_runtime.backends.ort_cpu import OrtCpu, open_session
from llama_runtime.bundle import Graph, open_bundle, write_manifest
from llama_runtime.contract import CHUNK_MULTIPLE, cache_capacity
from llama_runtime.errors import BackendError, BundleError
from llama_runtime.kv_cache import cache_buffers
from llama_runtime.llm import LLM
from llama_runtime.memory_plan import MemoryPlan, describe
from tests.int8_cache import Int8Cached
from tests.runtime.conftest import FAKE_GEOMETRY

KEPT = 32


def named(bundle: Path, precision: str) -> Path:
    """The bundle, its decoder of that precision."""
    manifest = open_bundle(bundle, verify="size").manifest
    graphs = (Graph("slots", precision, "decoder.onnx"), manifest.graphs[1])
    write_manifest(bundle, replace(manifest, graphs=graphs))
    return bundle


def planned(bundle: Path) -> MemoryPlan:
    return LLM.plan(bundle, max_batch=3, max_len=200, prefix_tokens=KEPT)


def test_buffers_of_int8_are_zero_and_a_quarter() -> None:
    whole, small = (cache_buffers(FAKE_GEOMETRY, 3, 40, kind) for kind in ("float32", "int8"))
    assert len(small) == len(whole)
    for buffer, wide in zip(small, whole, strict=True):
        assert buffer.dtype == np.int8
        assert buffer.shape == wide.shape
        assert 4 * buffer.nbytes == wide.nbytes
        assert buffer.flags.writeable
        assert not buffer.any()


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
def test_the_plan_counts_a_quarter_where_the_manifest_says_so(
    weights: str, fake_bundle: Path
) -> None:
    whole, small = (planned(named(fake_bundle, weights + cache)) for cache in ("", "+int8kv"))
    assert (whole.cache_dtype, small.cache_dtype) == ("float32", "int8")
    assert (4 * small.cache, 4 * small.prefixes) == (whole.cache, whole.prefixes)
    assert small.workspace == whole.workspace
    buffers = cache_buffers(FAKE_GEOMETRY, 3, cache_capacity(200, 128), small.cache_dtype)
    assert small.cache == sum(buffer.nbytes for buffer in buffers)
    blocks = cache_buffers(FAKE_GEOMETRY, KEPT // CHUNK_MULTIPLE, CHUNK_MULTIPLE, "int8")
    assert small.prefixes == sum(buffer.nbytes for buffer in blocks)


def test_the_page_and_the_json_say_the_type(fake_bundle: Path) -> None:
    for precision, kind in (("fp32", "float32"), ("fp32+int8kv", "int8")):
        plan = planned(named(fake_bundle, precision))
        (line,) = [line for line in describe(plan).splitlines() if line.startswith("cache")]
        assert line.endswith(f" MB  {kind}")
        assert plan.to_dict()["cache_dtype"] == kind
        assert ("in int8" in plan.summary()) == (kind == "int8")


@pytest.mark.parametrize(
    "name", ["fp32+int4kv", "fp32+fp8kv", "int8kv", "fp32+", "fp16", "+int8kv"]
)
def test_a_precision_of_a_later_version_is_refused(name: str, fake_bundle: Path) -> None:
    named(fake_bundle, name)
    for use in (LLM, LLM.plan):
        with pytest.raises(BundleError, match=r"precision .* runs fp32, .*, int4\+int8kv: upgrade"):
            use(fake_bundle)


# --- over a graph -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(int8_cached: Int8Cached) -> Any:
    return open_session(int8_cached.graph, threads=1)


def test_a_graph_that_is_not_what_the_manifest_says_is_refused(
    session: Any, int8_cached: Int8Cached
) -> None:
    with pytest.raises(BackendError, match=r"tensor\(int8\) .* and must be tensor\(float\)"):
        OrtCpu(
            session,
            int8_cached.config.geometry,
            num_slots=1,
            capacity=8,
            cache_dtype="float32",
        )


def test_what_is_kept_and_cleaned_is_int8(session: Any, int8_cached: Int8Cached) -> None:
    backend = OrtCpu(
        session, int8_cached.config.geometry, num_slots=3, capacity=96, num_prefix_blocks=2
    )
    choose = np.random.default_rng(0)
    for buffer in (*backend._cache, *backend._blocks):
        assert buffer.dtype == np.int8
        buffer[:] = choose.integers(-128, 128, buffer.shape)
    before = [buffer.copy() for buffer in backend._cache]
    backend.save_block(slot=1, start=32, block=1)
    backend.clean(slot=1, num_tokens=64)
    backend.load_block(slot=2, start=64, block=1)
    for buffer, old in zip(backend._cache, before, strict=True):
        assert np.array_equal(buffer[2, :, 64:96], old[1, :, 32:64])
        assert np.array_equal(buffer[2, :, :64], old[2, :, :64])
        assert not buffer[1, :, :64].any()
        assert np.array_equal(buffer[1, :, 64:], old[1, :, 64:])
        assert np.array_equal(buffer[0], old[0])
