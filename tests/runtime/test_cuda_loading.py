"""A bundle for CUDA: what is wrong is one sentence, and what runs goes through one queue."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_runtime import LLM, AsyncLLM, SamplingParams, cuda_loading
from llama_runtime.backends import cuda_device, ort_library
from llama_runtime.backends.cuda_device import Device
from llama_runtime.backends.fake_paged import FakePaged
from llama_runtime.backends.ort_cuda import open_cuda_session
from llama_runtime.bundle import Graph, open_bundle, write_manifest
from llama_runtime.chunk import any_chunk
from llama_runtime.cli import cli
from llama_runtime.contract import PAGED
from llama_runtime.cuda_plan import CudaPlan
from llama_runtime.engine import Engine
from llama_runtime.errors import (
    BackendError,
    BundleError,
    CapacityError,
    DependencyError,
    RequestError,
)
from llama_runtime.paged_cache import PagedCache
from llama_runtime.scheduler import Scheduler
from tests.runtime.conftest import write_fake_bundle

MEMORY = 80_000_000_000


class FakeDevice:
    """A device that only has a size, and remembers that it was closed."""

    closed: list[int] = []  # noqa: RUF012  every test has a list of its own
    free = MEMORY

    def __init__(self, ordinal: int) -> None:
        if ordinal > 1:
            raise BackendError(f"there is no CUDA device {ordinal}: this machine has 2")
        self.ordinal, self.name = ordinal, "Fake GPU"

    def memory(self) -> tuple[int, int]:
        return self.free, MEMORY

    def close(self) -> None:
        self.closed.append(self.ordinal)


@pytest.fixture
def cuda_bundle(tmp_path: Path) -> Path:
    bundle = write_fake_bundle(tmp_path / "cuda_bundle")
    manifest = open_bundle(bundle, verify="size").manifest
    graphs = (Graph("paged", "fp16", "decoder.onnx"), manifest.graphs[1])
    write_manifest(bundle, replace(manifest, graphs=graphs))
    return bundle


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two devices whose engines run on ``FakePaged``; the list says which were closed."""

    def make(
        graph: Path, geometry: Any, device: FakeDevice, table: Any, eos: Any, **given: Any
    ) -> Engine:
        blocks = min(given["num_blocks"], 64)  # a fake keeps them all in memory
        cache = PagedCache(given["max_batch"], given["max_len"], blocks, given["block_size"])
        scheduler = Scheduler(cache, prompt_budget=64, max_chunk=64, cut=any_chunk, max_cells=None)
        return Engine(
            FakePaged(cache, 64, geometry.vocab_size),
            scheduler,
            table,
            eos,
            vocab_size=geometry.vocab_size,
            max_len=given["max_len"],
            ids=given["ids"],
        )

    closed: list[int] = []
    monkeypatch.setattr(FakeDevice, "closed", closed)
    monkeypatch.setattr(cuda_loading, "Device", FakeDevice)
    monkeypatch.setattr(cuda_loading, "cuda_engine", make)
    return closed


def stub(monkeypatch: pytest.MonkeyPatch, **runtime: Callable[..., Any]) -> None:
    """Bindings of which only so much is there."""
    names = {name: staticmethod(function) for name, function in runtime.items()}
    modules = SimpleNamespace(), type("runtime", (), names), SimpleNamespace()
    monkeypatch.setattr(cuda_device, "import_cuda", lambda: modules)


def test_without_the_bindings_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(DependencyError, match=r"pip install 'llama-caravan\[gpu\]'"):
        Device(0)


def test_a_machine_without_a_driver_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    stub(monkeypatch, cudaDriverGetVersion=missing)
    with pytest.raises(BackendError, match=r"no CUDA driver on this machine: .*libcuda"):
        Device(0)
    stub(monkeypatch, cudaDriverGetVersion=lambda: (0, 0))
    with pytest.raises(BackendError, match="no CUDA device, or no driver"):
        Device(0)


def test_an_old_driver_is_named_with_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, cudaDriverGetVersion=lambda: (0, 12_040))
    with pytest.raises(BackendError, match=r"driver is of version 12\.4, and .* needs 13\.0"):
        Device(0)


def test_a_device_that_is_not_there_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, cudaDriverGetVersion=lambda: (0, 13_000), cudaGetDeviceCount=lambda: (0, 2))
    with pytest.raises(BackendError, match="no CUDA device 2: this machine has 2"):
        Device(2)


def test_an_error_of_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Code(int):
        name = "cudaErrorNoDevice"

    stub(
        monkeypatch,
        cudaDriverGetVersion=lambda: (0, 13_000),
        cudaGetDeviceCount=lambda: (Code(100), 0),
    )
    with pytest.raises(BackendError, match="cudaGetDeviceCount says cudaErrorNoDevice"):
        Device(0)


def test_onnxruntime_for_the_cpu_is_not_enough(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ort = SimpleNamespace(
        __version__="1.32.0", get_available_providers=lambda: ["CPUExecutionProvider"]
    )
    module = sys.modules[open_cuda_session.__module__]
    monkeypatch.setattr(module, "import_library", lambda _: (ort, lambda _: ["schema"]))
    monkeypatch.setattr(module, "check_graph", lambda _: None)
    with pytest.raises(DependencyError, match=r"1\.32\.0 has no CUDA provider .*\[gpu\]"):
        open_cuda_session(tmp_path / "decoder.onnx", SimpleNamespace())  # type: ignore[arg-type]


def test_the_library_itself_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match=r"pip install 'llama-caravan\[gpu\]'"):
        ort_library.import_library("gpu")


def test_devices_are_not_for_a_bundle_built_for_the_cpu(fake_bundle: Path) -> None:
    for make in (LLM, LLM.plan, AsyncLLM):
        with pytest.raises(RequestError, match=r"built for the CPU.*--target cuda") as caught:
            make(fake_bundle, devices=[0])
        assert caught.value.param == "devices"


def test_threads_are_not_for_a_bundle_built_for_cuda(cuda_bundle: Path, devices: list[int]) -> None:
    with pytest.raises(RequestError, match="built for CUDA") as caught:
        LLM(cuda_bundle, threads=2)
    assert caught.value.param == "threads"


def test_on_cuda_what_is_kept_for_others_is_all_or_nothing(
    cuda_bundle: Path, devices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[bool] = []
    make = vars(cuda_loading)["cuda_engine"]

    def watched(*args: Any, **given: Any) -> Any:
        shared.append(given["share_prefixes"])
        return make(*args, **given)

    monkeypatch.setattr(cuda_loading, "cuda_engine", watched)
    for prefix_tokens in (None, 0):
        LLM(cuda_bundle, prefix_tokens=prefix_tokens).close()
        assert LLM.plan(cuda_bundle, prefix_tokens=prefix_tokens).prefixes == 0
    assert shared == [True, False]
    for use in (LLM, LLM.plan, AsyncLLM):
        with pytest.raises(RequestError, match=r"on CUDA the whole cache keeps") as caught:
            use(cuda_bundle, prefix_tokens=4096)
        assert caught.value.param == "prefix_tokens"


@pytest.mark.parametrize("wrong", [[], [0, 0], [-1], ["0"], [True], 0, "0", [0.5]])
def test_devices_must_be_different_numbers(
    wrong: object, cuda_bundle: Path, devices: list[int]
) -> None:
    with pytest.raises(RequestError, match="different numbers of CUDA devices") as caught:
        LLM(cuda_bundle, devices=wrong)  # type: ignore[arg-type]
    assert caught.value.param == "devices"


def test_a_device_that_fails_closes_those_before_it(cuda_bundle: Path, devices: list[int]) -> None:
    with pytest.raises(BackendError, match="no CUDA device 2"):
        LLM(cuda_bundle, devices=[0, 1, 2])
    assert devices == [0, 1]


def test_what_does_not_fit_is_refused_with_the_numbers(
    cuda_bundle: Path, devices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeDevice, "free", 100_000_000)
    with pytest.raises(CapacityError, match="GPU 0, Fake GPU"):
        LLM(cuda_bundle)
    assert devices == [0]
    plan = LLM.plan(cuda_bundle)
    assert not plan.fits
    assert devices == [0, 0]


def test_the_plan_is_about_the_fullest_device(
    cuda_bundle: Path, devices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {0: 70_000_000_000, 1: 30_000_000_000}
    monkeypatch.setattr(FakeDevice, "memory", lambda self: (free[self.ordinal], MEMORY))
    for numbers in ([0, 1], [1, 0]):
        available = LLM.plan(cuda_bundle, devices=numbers).available
        assert available.bound == "GPU 1, Fake GPU"
        assert available.num_bytes < free[1]


def test_a_precision_of_a_later_version_is_refused(cuda_bundle: Path, devices: list[int]) -> None:
    manifest = open_bundle(cuda_bundle, verify="size").manifest
    graphs = (Graph("paged", "fp4", "decoder.onnx"), manifest.graphs[1])
    write_manifest(cuda_bundle, replace(manifest, graphs=graphs))
    with pytest.raises(BundleError, match="precision 'fp4', and this Caravan runs fp16, bf16"):
        LLM(cuda_bundle)
    assert devices == [0]


def named(bundle: Path, precision: str) -> Path:
    """The bundle, its decoder of that precision."""
    manifest = open_bundle(bundle, verify="size").manifest
    graphs = (Graph("paged", precision, "decoder.onnx"), manifest.graphs[1])
    write_manifest(bundle, replace(manifest, graphs=graphs))
    return bundle


@pytest.mark.parametrize("name", ["fp16+fp4kv", "fp32+fp8kv", "fp8kv", "fp16+", "+fp8kv"])
def test_a_cache_of_a_later_version_is_refused(
    name: str, cuda_bundle: Path, devices: list[int]
) -> None:
    for use in (LLM, LLM.plan):
        with pytest.raises(BundleError, match=r"and this Caravan runs fp16, .*, bf16\+fp8kv"):
            use(named(cuda_bundle, name))
    assert devices == [0, 0]


@pytest.mark.parametrize("cache", ["", "+fp8kv"])
@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16"), ("int4", "float16")]
)
def test_a_precision_names_the_types_of_activations_and_cache(
    name: str,
    dtype: str,
    cache: str,
    cuda_bundle: Path,
    devices: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine gets both, and the plan counts with blocks of the size that these make."""
    given: dict[str, Any] = {}
    make = vars(cuda_loading)["cuda_engine"]

    def spied(*arguments: Any, **options: Any) -> Engine:
        given.update(options)
        engine: Engine = make(*arguments, **options)
        return engine

    monkeypatch.setattr(cuda_loading, "cuda_engine", spied)
    whole = LLM.plan(named(cuda_bundle, "fp16"), max_len=64)
    with LLM(named(cuda_bundle, name + cache), max_len=64):
        plan = LLM.plan(cuda_bundle, max_len=64)
    assert (given["dtype"], given["cache_dtype"]) == (dtype, "float8e4m3fn" if cache else dtype)
    assert isinstance(plan, CudaPlan)
    assert isinstance(whole, CudaPlan)
    assert whole.block_bytes == plan.block_bytes * (2 if cache else 1)


def test_the_contract_types_the_cache_apart_from_the_activations() -> None:
    typed = PAGED.typed("bfloat16", "float8e4m3fn")
    assert {spec.dtype for spec in typed.cache_inputs(2)} == {"float8e4m3fn"}
    assert {spec.dtype for spec in typed.cache_outputs(2)} == {"float8e4m3fn"}
    assert typed.logits.dtype == "bfloat16"
    assert PAGED.typed("bfloat16").cache_dtype == "bfloat16"


def test_one_device_and_two_give_what_the_cpu_gives(
    cuda_bundle: Path, fake_llm: LLM, devices: list[int]
) -> None:
    prompts = [f"prompt number {i}" * (i % 4 + 1) for i in range(12)]
    params = [
        SamplingParams(max_tokens=5 + i, seed=i, temperature=0.5 * (i % 3)) for i in range(12)
    ]
    wanted = [done.token_ids for done in fake_llm.generate(prompts, params)]
    for numbers in ([0], [0, 1], [1, 0]):
        with LLM(cuda_bundle, devices=numbers, max_batch=3, max_len=256) as llm:
            assert llm.threads is None
            assert [done.token_ids for done in llm.generate(prompts, params)] == wanted
            assert llm.stats().finished == len(prompts)
            llm._engine._engine.check()


async def _answer(bundle: Path) -> list[list[int]]:
    async with await AsyncLLM.load(bundle, devices=[0, 1], max_batch=2, max_len=256) as llm:
        done = await llm.generate(["one", "two", "three"], SamplingParams(max_tokens=6))
        return [one.token_ids for one in done]


def test_async_services_have_them_too(cuda_bundle: Path, fake_llm: LLM, devices: list[int]) -> None:
    import asyncio

    wanted = fake_llm.generate(["one", "two", "three"], SamplingParams(max_tokens=6))
    assert asyncio.run(_answer(cuda_bundle)) == [one.token_ids for one in wanted]


def test_the_commands_take_devices(
    cuda_bundle: Path, devices: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\nthree\n")
    run = CliRunner().invoke
    options = ["--bundle", str(cuda_bundle), "--devices", "0,1"]
    done = run(cli, ["batch", str(prompts), *options, "--max-tokens", "4"])
    assert done.exit_code == 0, done.output
    assert "devices 0, 1" in done.output
    lines = (tmp_path / "prompts.results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    assert len(rows) == 3
    planned = run(cli, ["plan", *options, "--json"])
    assert planned.exit_code == 0
    assert re.match(r"GPU \d, Fake GPU", json.loads(planned.output)["bound"])
    assert json.loads(planned.output)["max_batch"] == cuda_loading.CUDA_MAX_BATCH
    wrong = run(cli, ["plan", "--bundle", str(cuda_bundle), "--devices", "zero"])
    assert wrong.exit_code == 2
    assert "must be numbers such as 0 or 0,1" in wrong.output
