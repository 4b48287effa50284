"""Whole generations through the TensorRT runner, on stand-ins that refuse a wrong call.

The graph is the one that TensorRT gets, in float32 on ONNX Runtime; what it should come to is
computed in numpy, without cache, engine or neighbours.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llama_runtime.backends.tensorrt_context import BoundContext, TensorRtEngine
from llama_runtime.chunk import Chunk
from llama_runtime.contract import TensorSpec
from llama_runtime.errors import BackendError
from llama_runtime.grammars import GrammarCompiler
from llama_runtime.params import SamplingParams
from llama_runtime.tensorrt.kept import load_kept
from llama_runtime.tensorrt.library import Library, import_tensorrt
from llama_runtime.tensorrt.limits import DECODE, EngineLimits
from llama_runtime.tensorrt_engine import tensorrt_engine
from tests.recorded_engine import END_TOKENS, MAX_LEN, TABLE, VOCAB_SIZE, Model, Recorded
from tests.recording_cuda import RecordingDevice
from tests.tiny_model import byte_level_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("tensorrt"))


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(10, VOCAB_SIZE), k=length)


def random_params(rng: random.Random) -> dict[str, Any]:
    params: dict[str, Any] = {"max_tokens": rng.randint(1, 12)}
    if rng.random() < 0.6:
        params |= {"temperature": rng.choice([0.5, 1.0]), "seed": rng.randrange(1 << 64)}
        filters: list[dict[str, Any]] = [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}]
        params |= rng.choice(filters)
    if rng.random() < 0.3:
        params |= {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    if rng.random() < 0.2:
        params |= {"logit_bias": {20: 5.0, 30: -5.0}, "min_tokens": min(3, params["max_tokens"])}
    if rng.random() < 0.3:
        params |= {"logprobs": True, "top_logprobs": rng.choice([0, 1, 20])}
    if rng.random() < 0.2:
        params |= {"prompt_logprobs": True, "top_logprobs": 2}
    return params


@pytest.mark.parametrize("fails_capture", [False, True], ids=["captured", "uncaptured"])
@pytest.mark.parametrize("case", range(6))
def test_every_sequence_of_a_ragged_mix_is_told_what_it_is_alone(
    model: Model, case: int, fails_capture: bool
) -> None:
    rng = random.Random(case)
    recorded = Recorded(
        model, max_batch=rng.choice([1, 3, 4, 6]), prompt_budget=rng.choice([None, 5, 40])
    )
    recorded.device.fails_capture = fails_capture
    for _ in range(60):
        if len(recorded.asked) < 16 and rng.random() < 0.4:
            recorded.add(prompt(rng.choice([1, 2, 5, 30, 90]), case), **random_params(rng))
        if recorded.asked and rng.random() < 0.05:
            recorded.engine.abort(rng.choice(list(recorded.asked)))
        recorded.step()
    recorded.drain()
    assert (recorded.device.num_replayed == 0) is fails_capture
    recorded.engine.close()


def test_a_slot_that_is_idle_or_reads_its_prompt_leaves_its_neighbours_alone(model: Model) -> None:
    recorded = Recorded(model, prompt_budget=8, end_tokens=frozenset())
    recorded.add(prompt(3), max_tokens=2)
    recorded.add(prompt(90), max_tokens=30)
    recorded.add(prompt(4), max_tokens=40)
    recorded.step(20)
    assert [seq.slot for seq in recorded.engine._scheduler.running] == [1, 2]
    recorded.add(prompt(50, 1), max_tokens=30)  # into slot 0, below two that run
    recorded.add(prompt(1), max_tokens=3)
    recorded.drain()
    decoding = [s["unpack"] for s in recorded.contexts.shapes if s["unpack"][1] == 1]
    assert {rows for rows, _ in decoding} <= {1, 2, 4}


def test_completions_held_to_a_grammar_keep_to_it_beside_free_ones(
    model: Model, tmp_path: Path
) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    ends = frozenset({2})
    grammars = GrammarCompiler(tmp_path / "tokenizer.json", VOCAB_SIZE, ends)
    recorded = Recorded(model, end_tokens=ends, grammars=grammars)
    several: list[dict[str, Any]] = [
        {"regex": "([a-c]{2}[0-9])*x", "logprobs": True},
        {"max_tokens": 12, "ignore_eos": True},
        {"choice": ["red", "green", "blue"], "logit_bias": {123: 5.0}},
        {"json_schema": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}},
    ]
    for i in range(8):
        options = {"max_tokens": 9, "temperature": float(i % 4 != 1), "seed": i, **several[i % 4]}
        recorded.add(prompt((1, 9, 40)[i % 3], i), **options)
        recorded.step(i % 3)
    recorded.drain()
    recorded.engine.close()


def test_a_freed_slot_is_used_again_and_holds_nothing_of_before(model: Model) -> None:
    recorded = Recorded(model, max_batch=2, end_tokens=frozenset())
    for number in range(6):
        recorded.add(prompt(60 - 9 * number), max_tokens=3 + number, temperature=1.0, seed=number)
    recorded.drain()


@pytest.mark.parametrize("after", [1, 2, 3])
def test_the_late_row_of_one_that_stopped_harms_nobody(model: Model, after: int) -> None:
    tokens = model.alone(prompt(9), _greedy(after), frozenset()).token_ids
    recorded = Recorded(model, max_batch=2, end_tokens=frozenset(tokens[-1:]))
    recorded.add(prompt(9), max_tokens=20)
    recorded.add(prompt(17), max_tokens=9, ignore_eos=True)
    recorded.add(prompt(11), max_tokens=9, ignore_eos=True)  # takes the slot of the first
    recorded.drain()
    assert recorded.asked[0].seq.finish_reason == "stop"


def _greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens)


def test_one_that_is_aborted_at_any_time_harms_nobody(model: Model) -> None:
    for steps in range(1, 9):
        recorded = Recorded(model, max_batch=3, prompt_budget=16, end_tokens=frozenset())
        gone = recorded.add(prompt(40), max_tokens=20)
        recorded.add(prompt(7), max_tokens=8)
        recorded.step(steps)
        recorded.engine.abort(gone.id)
        recorded.add(prompt(21), max_tokens=5)
        recorded.drain()


def test_a_prompt_longer_than_a_chunk_is_read_in_several_steps_of_one_slot(model: Model) -> None:
    recorded = Recorded(model, prompt_budget=16)
    recorded.add(prompt(40), max_tokens=3)
    recorded.add(prompt(33), max_tokens=3)
    recorded.drain()
    chunks = [s["unpack"] for s in recorded.contexts.shapes if s["unpack"][1] > 1]
    assert sorted(chunks) == sorted([(1, 16), (1, 16), (1, 8), (1, 16), (1, 16)])  # and one of one


@pytest.mark.parametrize("length", [1, 100, 127])
def test_a_sequence_may_fill_its_slot_to_the_last_cell(model: Model, length: int) -> None:
    recorded = Recorded(model, max_batch=2, end_tokens=frozenset())
    recorded.add(prompt(length), max_tokens=MAX_LEN - length)
    recorded.add(prompt(20), max_tokens=108)
    recorded.drain()


def test_what_does_not_fit_is_refused_before_it_is_launched(model: Model) -> None:
    recorded = Recorded(model, end_tokens=frozenset())
    seqs = [recorded.add(prompt(5, number), max_tokens=20) for number in range(3)]
    recorded.step(6)
    recorded.device.synchronize()
    num_run = len(recorded.contexts.shapes)
    seqs[1].cache_len = MAX_LEN  # as no engine has it
    ahead, beside, prompts = Chunk(seqs[1], 1), Chunk(seqs[2], 1), Chunk(seqs[1], 2)
    ahead.num_sampled = beside.num_sampled = 1
    for chunk in (ahead, beside, prompts):
        with pytest.raises(BackendError, match=r"slot 1 has 128 cells, .* fill 1(29|30)"):
            recorded.runner.launch([chunk])
    recorded.device.synchronize()
    assert len(recorded.contexts.shapes) == num_run


def test_steps_are_replayed_from_the_second_of_a_size_on(model: Model) -> None:
    recorded = Recorded(model, end_tokens=frozenset())
    for number in range(3):
        recorded.add(prompt(4, number), max_tokens=30)
    recorded.drain()
    rows = [s["unpack"][0] for s in recorded.contexts.shapes if s["unpack"][1] == 1]
    assert recorded.runner.num_graphs == len(set(rows))
    assert recorded.device.num_replayed >= len(rows) - len(set(rows)) > 20


def test_a_size_that_cannot_be_captured_is_tried_once(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    recorded = Recorded(model, max_batch=1, end_tokens=frozenset())
    recorded.device.fails_capture = True
    with caplog.at_level(logging.WARNING):
        recorded.add(prompt(4), max_tokens=9)
        recorded.drain()
    assert [record.getMessage() for record in caplog.records] == [
        "steps of 1 rows run without a captured graph: "
        "CUDA failed: cudaStreamEndCapture says invalidated"
    ]
    assert len(recorded.contexts.contexts) == 2  # of prompts, and of this size


def test_steps_overlap(model: Model) -> None:
    """The second step is queued before the first has run."""
    recorded = Recorded(model, end_tokens=frozenset())
    recorded.add(prompt(4), max_tokens=9)
    recorded.step()
    assert recorded.engine.launch()
    assert recorded.contexts.shapes == []
    recorded.engine.collect()
    assert len(recorded.contexts.shapes) == 1


def test_scores_of_a_prompt_come_in_as_many_rows_as_the_engine_has(model: Model) -> None:
    recorded = Recorded(model, max_batch=40)
    asked = {"prompt_logprobs": True, "logprobs": True, "top_logprobs": 3}
    for number in range(3):
        recorded.add(prompt(100, number), max_tokens=3, **asked)
    recorded.add(prompt(1), max_tokens=2, **asked)
    recorded.drain()
    prompts = [s for s in recorded.contexts.shapes if s["unpack"][1] > 1]
    assert max(s["logits_rows"][0] for s in prompts) == recorded.limits.max_logits


@pytest.mark.parametrize("pool", range(4))
def test_a_row_that_is_no_number_ends_alone_and_its_slot_is_cleaned(
    model: Model, pool: int
) -> None:
    recorded = Recorded(model, max_batch=3, end_tokens=frozenset())
    seqs = [recorded.add(prompt(9, number), max_tokens=25) for number in range(3)]
    recorded.step(8)
    recorded.device.synchronize()
    recorded.slot(pool, 1)[0, 2] = np.nan
    while seqs[1].finish_reason is None:
        recorded.step()
    recorded.step(2)
    recorded.device.synchronize()
    # But for the cell of an idle row.
    assert all((recorded.slot(p, 1)[:, 1:] == 0).all() for p in range(4))
    assert np.isfinite(recorded.slot(pool, 1)).all()
    spoilt = recorded.asked.pop(seqs[1].id)
    assert spoilt.events[-1].finish_reason == "error"
    recorded.add(prompt(5), max_tokens=9)
    recorded.drain()


def test_a_launch_that_fails_ends_whoever_is_to_blame(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(model, end_tokens=frozenset())
    seqs = [recorded.add(prompt(5, number), max_tokens=9) for number in range(2)]
    launch = recorded.runner.launch

    def fails(chunks: Any) -> Any:
        if any(chunk.seq is seqs[1] and chunk.seq.cache_len == 8 for chunk in chunks):
            raise BackendError("told to")
        return launch(chunks)

    monkeypatch.setattr(recorded.runner, "launch", fails)
    while recorded.engine.has_work:
        recorded.step()
    assert seqs[1].finish_reason == "error"
    del recorded.asked[seqs[1].id]
    recorded.drain()


def test_closing_gives_everything_back_in_order(model: Model) -> None:
    recorded = Recorded(model)
    recorded.add(prompt(9), max_tokens=20)
    recorded.step(5)
    recorded.engine.close()
    assert recorded.device.closed
    assert recorded.contexts.closed
    recorded.engine.close()
    assert recorded.device.violations == []


def test_slots_that_tensorrt_cannot_read_are_refused(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EngineLimits, "capacity", 129)
    narrow: Any = SimpleNamespace(
        graph=model.graph, geometry=replace(model.geometry, num_kv_heads=1, head_dim=2)
    )
    with pytest.raises(ValueError, match="no multiple of 256"):
        Recorded(narrow)


# --- the library itself ------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [b"", b"no plan at all", bytes(4096)], ids=len)
def test_a_plan_that_is_damaged_is_refused_and_the_device_given_back(
    model: Model, plan: bytes
) -> None:
    pytest.importorskip("tensorrt_rtx")
    recorded = Recorded(model)
    device = RecordingDevice()
    with pytest.raises(BackendError, match=r"the TensorRT engine can't be loaded: ."):
        tensorrt_engine(
            import_tensorrt("tensorrt_rtx"),
            plan,
            model.geometry,
            recorded.limits,
            device,
            TABLE,
            END_TOKENS,
            dtype="float16",
        )
    assert device.closed


class _Context:
    """An execution context that refuses one thing."""

    def __init__(self, refused: str) -> None:
        self._refused = refused

    def __getattr__(self, name: str) -> Callable[..., bool]:
        return lambda *_: name != self._refused


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ("set_optimization_profile_async", "profile 0"),
        ("set_input_shape", r"pack of the shape \[3\]"),
        ("set_tensor_address", "address of pack"),
        ("execute_async_v3", "can't run the step"),
    ],
)
def test_what_tensorrt_refuses_is_an_error(refused: str, message: str) -> None:
    def use() -> None:
        context = BoundContext(_Context(refused), DECODE, RecordingDevice())
        context.shape("pack", (3,))
        context.bind("pack", 256)
        context.run()

    with pytest.raises(BackendError, match=message):
        use()


def _library(**engine: Any) -> Library:
    """A library whose engine has one input of float16 [?, 3] and one output."""
    inputs, shapes = {"a": True, "b": False}, {"a": (-1, 3), "b": (-1,)}
    made = {
        "device_memory_size_v2": 1000,
        "num_io_tensors": 2,
        "num_optimization_profiles": 2,
        "get_tensor_name": lambda i: "ab"[i],
        "get_tensor_mode": lambda name: inputs[name],
        "get_tensor_dtype": lambda _: SimpleNamespace(name="HALF"),
        "get_tensor_shape": lambda name: shapes[name],
        "create_execution_context": lambda _: None,
    }

    class Logger:
        pass

    module = SimpleNamespace(
        ILogger=Logger,
        TensorIOMode=SimpleNamespace(INPUT=True),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=1),
        Runtime=lambda _: SimpleNamespace(
            deserialize_cuda_engine=lambda _: SimpleNamespace(**{**made, **engine})
        ),
    )
    return Library("tensorrt", "11.0", _Hashable(module))


class _Compiled:
    """A runtime cache of TensorRT-RTX: what it was given, and one kernel more."""

    def __init__(self, accepts: bool) -> None:
        self._accepts, self._kernels = accepts, b""

    def deserialize(self, kernels: bytes) -> bool:
        self._kernels = kernels if self._accepts else b""
        return self._accepts

    def serialize(self) -> bytes:
        return self._kernels or b"kernels"


@pytest.mark.parametrize("accepts", [True, False])
def test_what_tensorrt_rtx_compiles_is_kept_for_the_next_time(
    accepts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given: list[Any] = []

    def run(before: bytes) -> None:
        compiled = _Compiled(accepts)
        config = SimpleNamespace(
            create_runtime_cache=lambda: compiled,
            set_runtime_cache=given.append,
            set_execution_context_allocation_strategy=given.append,
        )
        context = SimpleNamespace(set_device_memory=lambda *_: None)
        made = {
            "create_runtime_config": lambda: config,
            "create_execution_context": lambda by: context if by is config else None,
        }
        library = replace(_library(**made), name="tensorrt_rtx")
        engine = TensorRtEngine(library, b"", RecordingDevice())
        assert compiled._kernels == (before if accepts else b"")
        assert engine.create() is context
        assert given[-2:] == [1, compiled]  # USER_MANAGED
        engine.close()
        device = RecordingDevice()
        about = "{}, {}.{}".format(device.name, *device.capability)
        assert load_kept("runtime", library, about) == b"kernels"

    run(b"")
    run(b"kernels")


class _Hashable:
    """A module, which unlike a namespace can be the key of a cache."""

    def __init__(self, module: Any) -> None:
        self.__dict__.update(vars(module))


def test_an_engine_of_another_graph_is_refused() -> None:
    first = TensorSpec("a", "float16", ("N", "K"), "")
    second = TensorSpec("b", "float16", ("N",), "")
    engine = TensorRtEngine(_library(), b"", RecordingDevice())
    engine.check([first], [second], {"K": 3}, 2)
    for inputs, outputs, sizes, profiles, message in (
        ([first], [second], {"K": 4}, 2, "'a' is"),
        ([first], [], {"K": 3}, 2, "'b' is .* must be None"),
        ([second], [first], {"K": 3}, 2, "'a' is"),
        ([first], [second], {"K": 3}, 1, "2 optimization profiles and must have 1"),
    ):
        with pytest.raises(BackendError, match=message):
            engine.check(inputs, outputs, sizes, profiles)
    with pytest.raises(BackendError, match="no execution context: it gives no reason"):
        engine.create()


def test_contexts_share_the_memory_of_what_they_compute_meanwhile() -> None:
    given: list[tuple[int, int]] = []
    context = SimpleNamespace(set_device_memory=lambda *memory: given.append(memory))
    library = _library(create_execution_context=lambda _: context)
    engine = TensorRtEngine(library, b"", RecordingDevice())
    engine.create(), engine.create()
    assert given[0] == given[1]
    assert given[0][1] == 1000
