"""ONNX Runtime on the CPU, over a real graph: a cache in place, errors as sentences, no traces."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tokenizers

from llama_runtime.backends.ort_cpu import OrtCpu, import_onnxruntime, open_session
from llama_runtime.bundle import Bundle, open_bundle
from llama_runtime.chunk import Chunk
from llama_runtime.detokenizer import Detokenizer, TokenBytes
from llama_runtime.errors import BackendError, DependencyError
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence
from llama_runtime.step_batch import Step, StepBatch

NUM_SLOTS, CAPACITY = 5, 96
MIB = 2**20


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def session(bundle: Bundle) -> Any:
    return open_session(bundle.graph_path("slots"), threads=1)


@pytest.fixture
def backend(bundle: Bundle, session: Any) -> OrtCpu:
    return OrtCpu(session, bundle.manifest.geometry, num_slots=NUM_SLOTS, capacity=CAPACITY)


class Runner:
    """Runs tokens in slots, keeping what each slot holds."""

    def __init__(self, backend: OrtCpu, tokenizer: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._table = TokenBytes(tokenizer)
        self._step_batch = StepBatch(NUM_SLOTS, prompt_budget=64)
        self._seqs: dict[int, Sequence] = {}

    def step(self, tokens: dict[int, list[int]]) -> Step:
        """The step that adds tokens to slots."""
        chunks = []
        for slot, new in tokens.items():
            seq = self._seqs.setdefault(slot, self._sequence(slot))
            seq.token_ids += new
            chunks.append(Chunk(seq, len(new)))
        return self._step_batch.build(chunks)

    def run(self, tokens: dict[int, list[int]]) -> npt.NDArray[np.float32]:
        """Logits [slots, V] after the new tokens of each."""
        logits = self._backend.run(self.step(tokens))[: len(tokens)].copy()
        for slot, new in tokens.items():
            self._seqs[slot].cache_len += len(new)
        return logits

    def _sequence(self, slot: int) -> Sequence:
        return Sequence(slot, [], 0, SamplingParams(), 0, Detokenizer(self._table), slot=slot)


@pytest.fixture
def runner(backend: OrtCpu, byte_tokenizer: tokenizers.Tokenizer) -> Runner:
    return Runner(backend, byte_tokenizer)


# --- the cache ----------------------------------------------------------------------------------


def test_a_step_writes_its_tokens_into_the_cache_and_touches_nothing_else(
    backend: OrtCpu, runner: Runner
) -> None:
    runner.run({0: [5, 6, 7], 3: [8]})
    before = [buffer.copy() for buffer in backend._cache]
    runner.run({1: [9, 10], 3: [11]})
    written = {(1, 0), (1, 1), (3, 1)}
    for buffer, old in zip(backend._cache, before, strict=True):
        changed = np.argwhere((buffer != old).any(axis=(1, 3)))  # [B, C]
        assert {(int(slot), int(place)) for slot, place in changed} == written


def test_what_is_read_is_the_cache_in_place(backend: OrtCpu, runner: Runner) -> None:
    tokens = [5, 6, 7]
    runner.run({0: tokens})
    expected = runner.run({0: [8]})[0]
    runner.run({1: tokens})
    for buffer in backend._cache:
        buffer[1, :, 1] += 1  # somebody else's key and value
    assert not np.array_equal(runner.run({1: [8]})[0], expected)
    runner.run({2: tokens})
    assert np.array_equal(runner.run({2: [8]})[0], expected)


def test_a_kept_block_is_the_same_in_another_slot(bundle: Bundle, session: Any) -> None:
    backend = OrtCpu(
        session, bundle.manifest.geometry, num_slots=3, capacity=CAPACITY, num_prefix_blocks=2
    )
    choose = np.random.default_rng(0)
    for buffer in backend._cache:
        buffer[:] = choose.standard_normal(buffer.shape)
    before = [buffer.copy() for buffer in backend._cache]
    backend.save_block(slot=1, start=32, block=1)
    for buffer in backend._cache:
        buffer[1] = 0  # its slot has changed hands
    backend.load_block(slot=2, start=64, block=1)
    for buffer, old in zip(backend._cache, before, strict=True):
        assert np.array_equal(buffer[2, :, 64:96], old[1, :, 32:64])
        assert np.array_equal(buffer[2, :, :64], old[2, :, :64])
        assert np.array_equal(buffer[0], old[0])


def test_dummy_rows_write_no_cache(backend: OrtCpu, runner: Runner) -> None:
    runner.run({2: [5]})  # one real row of four
    for buffer in backend._cache:
        assert np.argwhere(buffer.any(axis=(1, 3))).tolist() == [[2, 0]]


def test_steps_give_the_same_logits_whole_in_chunks_and_beside_others(runner: Runner) -> None:
    tokens = [(7 * i) % 256 for i in range(40)]
    whole = runner.run({0: tokens})[0]
    runner.run({1: tokens[:32], 3: [9]})
    chunks = runner.run({1: tokens[32:], 4: [1, 2, 3]})[0]
    np.testing.assert_allclose(chunks, whole, atol=1e-4)
    assert whole.std() > 0.1


def test_a_step_without_samples_runs(backend: OrtCpu, runner: Runner) -> None:
    tokens = [(7 * i) % 256 for i in range(40)]
    whole = runner.run({0: tokens})[0]
    step = runner.step({1: tokens})
    step = StepBatch(NUM_SLOTS, 64).build([Chunk(step.chunks[0].seq, 32)])
    assert backend.run(step).shape == (0, whole.size)
    assert np.count_nonzero(backend._cache[0][1].any(axis=(0, 2))) == 32


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_steps_nor_by_copies_of_the_cache(
    bundle: Bundle, session: Any, byte_tokenizer: tokenizers.Tokenizer
) -> None:
    geometry = bundle.manifest.geometry
    backend = OrtCpu(session, geometry, num_slots=NUM_SLOTS, capacity=20_000)
    assert min(buffer.nbytes for buffer in backend._cache) > 24 * MIB
    runner = Runner(backend, byte_tokenizer)
    slots = range(NUM_SLOTS)
    for _ in range(20):
        runner.run({slot: [5] for slot in slots})
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(200):
        runner.run({slot: [5] for slot in slots})
    # 200 tokens in 5 slots, keys and values of each layer, and some air
    assert status("VmHWM") - before < 4 * NUM_SLOTS * 220 * 2 * 32 * 4 + 2 * MIB


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


# --- errors -------------------------------------------------------------------------------------


def test_a_step_that_the_graph_refuses_is_an_error_of_the_backend(
    backend: OrtCpu, runner: Runner, capfd: pytest.CaptureFixture[str]
) -> None:
    step = runner.step({0: [5, 6]})
    step.input_ids[0] = 10**9
    with pytest.raises(BackendError, match="the graph failed: "):
        backend.run(step)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [None, b"", b"not a graph"])
def test_a_graph_that_cannot_be_loaded_is_named(tmp_path: Path, content: bytes | None) -> None:
    graph = tmp_path / "decoder.onnx"
    if content is not None:
        graph.write_bytes(content)
    with pytest.raises(BackendError, match=r"decoder\.onnx can't be loaded: "):
        open_session(graph, threads=1)


def test_a_missing_onnxruntime_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match=r"pip install 'llama-caravan\[cpu\]'"):
        import_onnxruntime()


@pytest.mark.parametrize("second", ["onnxruntime-gpu", "onnxruntime-directml"])
def test_two_distributions_of_onnxruntime_are_refused_without_importing_either(
    second: str, tmp_path: Path
) -> None:
    """Each has overwritten files of the other, and which one works is a matter of luck."""
    for name in ("onnxruntime", second):
        folder = tmp_path / f"{name.replace('-', '_')}-1.32.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.32.0\n")
    code = (
        "import sys\nfrom llama_runtime.errors import DependencyError\n"
        "from llama_runtime.backends.ort_cpu import import_onnxruntime\n"
        "try:\n    import_onnxruntime()\n"
        "except DependencyError as error:\n    print(error, 'onnxruntime' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert f"onnxruntime and {second} are both installed" in run.stdout
    assert f"pip uninstall onnxruntime {second}" in run.stdout
    assert run.stdout.endswith(" False\n")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 3}, "'past_key_values.2.key' is absent and must be"),
        ({"num_layers": 1}, r"'past_key_values.1.key' is tensor\(float\).* and must be absent"),
        ({"num_kv_heads": 4}, r"\[\?, 2, \?, 32\] and must be tensor\(float\) \[\?, 4, \?, 32\]"),
        ({"head_dim": 64}, r"must be tensor\(float\) \[\?, 2, \?, 64\]"),
        ({"vocab_size": 10**7}, r"'logits' is tensor\(float\) \[\?, 512\] and must be .*10000000"),
    ],
)
def test_a_geometry_that_is_not_the_graphs_is_refused_before_anything_is_allocated(
    bundle: Bundle, session: Any, changes: dict[str, int], words: str
) -> None:
    geometry = dataclasses.replace(bundle.manifest.geometry, **changes)
    with pytest.raises(BackendError, match=words):
        OrtCpu(session, geometry, num_slots=10**6, capacity=10**6)


def test_an_onnxruntime_without_ragged_attention_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    others = [schema for schema in state.get_all_operator_schema() if schema.name == "Gather"]
    monkeypatch.setattr(state, "get_all_operator_schema", lambda: others)
    with pytest.raises(DependencyError, match=r"pip install 'onnxruntime>=1\.32'"):
        import_onnxruntime()


# --- telemetry ----------------------------------------------------------------------------------

IMPORT = "from llama_runtime.backends.ort_cpu import import_onnxruntime as f; f()"


@pytest.mark.skipif(sys.platform == "win32", reason="HOME is not where Windows keeps caches")
@pytest.mark.parametrize("before", [None, "0", "1"])
def test_importing_onnxruntime_leaves_no_trace_at_home_nor_in_the_environment(
    tmp_path: Path, before: str | None
) -> None:
    name = "ORT_DISABLE_TELEMETRY"
    environment = {k: v for k, v in os.environ.items() if k not in (name, "XDG_CACHE_HOME")}
    environment["HOME"] = str(tmp_path)
    if before is not None:
        environment[name] = before
    script = f"{IMPORT}; import os; print(os.environ.get({name!r}))"
    process = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert process.stdout == f"{before}\n"
    assert list(tmp_path.rglob("*")) == []
