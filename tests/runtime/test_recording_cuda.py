"""The stand-ins for CUDA and TensorRT refuse what those forbid, and defer what those defer."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llama_runtime.contract import Geometry
from llama_runtime.errors import BackendError
from llama_runtime.tensorrt.limits import DECODE, PROMPT, EngineLimits
from tests import recording_tensorrt
from tests.recording_cuda import CudaContractError, RecordingDevice
from tests.recording_tensorrt import DIALECT, RecordingContext, RecordingEngine

LIMITS = EngineLimits(max_batch=2, max_len=128)
GEOMETRY = Geometry(
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=4,
    hidden_size=4,
    intermediate_size=4,
    vocab_size=8,
    max_positions=128,
)
SHAPES = {"input_ids": (2,), "logits_rows": (2,), "unpack": (2, 1), "pack": (2,)}
SHAPES |= {"past_lengths": (2,)}
CACHE = {f"past_key_values.0.{part}": (2, 1, 128, 4) for part in ("key", "value")}


@pytest.fixture
def device() -> RecordingDevice:
    return RecordingDevice()


class Adding:
    """In place of a graph: logits are the tokens, and caches count the steps."""

    def run(
        self, _: list[str], feeds: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]
    ) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
        tokens = feeds["input_ids"].astype(np.float32)
        caches = [feeds[name].astype(np.float32) + 1 for name in CACHE]
        return [np.repeat(tokens[:, None], GEOMETRY.vocab_size, 1), *caches]


class Bound:
    """A context that is ready to run, and what it is bound to."""

    def __init__(self, device: RecordingDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recording_tensorrt, "cpu_session", lambda _: Adding())
        self.device = device
        self.engine = RecordingEngine(Path(), GEOMETRY, LIMITS, device)
        self.context = self.engine.create()
        self.memory = {name: device.allocate(1024) for name in SHAPES}
        for past in CACHE:
            self.memory[past] = device.allocate(2 * 128 * 4 * 4)
            self.memory[past.replace("past_key_values", "present")] = self.memory[past]
        self.memory["logits"] = device.allocate(4 * 2 * GEOMETRY.vocab_size)
        self.ready(self.context)

    def ready(self, context: RecordingContext) -> None:
        context.set_optimization_profile_async(DECODE, self.device.stream or 0)
        for name, shape in (SHAPES | CACHE).items():
            context.set_input_shape(name, shape)
        for name, address in self.memory.items():
            context.set_tensor_address(name, address)

    def run(self) -> None:
        self.context.execute_async_v3(self.device.stream or 0)

    def logits(self) -> list[float]:
        self.device.synchronize()
        rows = self.device.array(self.memory["logits"], "f4", 2, GEOMETRY.vocab_size)
        return [float(value) for value in rows[:, 0]]


@pytest.fixture
def bound(device: RecordingDevice, monkeypatch: pytest.MonkeyPatch) -> Bound:
    return Bound(device, monkeypatch)


def test_nothing_runs_until_it_is_waited_for(device: RecordingDevice) -> None:
    host, back = device.pinned(4), device.pinned(4)
    address = device.allocate(4)
    first, second = device.event(), device.event()
    host[:] = 1
    device.upload(address, host)
    device.record(first)
    device.download(back, address)
    device.record(second)
    host[:] = 2  # too early: the copy will read this
    assert not device.passed(first)
    device.wait(first)
    assert (device.passed(first), device.passed(second)) == (True, False)
    assert back.tolist() == [0xEE] * 4
    device.wait(second)
    assert back.tolist() == [2] * 4


def test_a_copy_from_ordinary_memory_has_been_read(device: RecordingDevice) -> None:
    address, host = device.allocate(4), np.ones(4, np.uint8)
    device.upload(address, host)
    host[:] = 2
    device.synchronize()
    assert device.view(address, 4).tolist() == [1] * 4


def test_memory_that_nobody_wrote_holds_no_numbers(device: RecordingDevice) -> None:
    assert np.isnan(device.array(device.allocate(8, zero=False), "f4", 2)).all()


def test_a_graph_does_again_what_was_queued_and_nothing_meanwhile(device: RecordingDevice) -> None:
    host, address = device.pinned(4), device.allocate(4)
    host[:] = 5
    with device.captured() as captured:
        device.upload(address, host)
    device.synchronize()
    assert device.view(address, 4).tolist() == [0] * 4
    device.launch(captured[0])
    device.synchronize()
    assert device.view(address, 4).tolist() == [5] * 4


def _broken(device: RecordingDevice) -> None:
    with device.captured():
        try:
            device.upload(device.allocate(4, zero=False), np.zeros(4, np.uint8))
        except CudaContractError:
            device.zero(device.allocate(4, zero=False), 4)


def test_a_broken_capture_takes_nothing_more_and_gives_no_graph(device: RecordingDevice) -> None:
    with pytest.raises(BackendError, match="the capture is broken"):
        _broken(device)
    device.zero(device.allocate(4), 4)  # and is over


def _capture(device: RecordingDevice, work: Callable[[], object]) -> None:
    with device.captured():
        work()


def _destroy_running(device: RecordingDevice) -> None:
    address = device.allocate(4)
    with device.captured() as captured:
        device.zero(address, 4)
    device.launch(captured[0])
    device.destroy(captured[0])


def _launch_destroyed(device: RecordingDevice) -> None:
    with device.captured() as captured:
        pass
    device.destroy(captured[0])
    device.launch(captured[0])


def _use_closed(device: RecordingDevice) -> None:
    device.close()
    device.close()
    device.allocate(4)


def _wait_in_vain(device: RecordingDevice) -> None:
    event = device.event()
    device.record(event)
    device._queue.clear()
    device.wait(event)


BROKEN_CUDA: dict[str, Callable[[RecordingDevice], object]] = {
    "no memory of the device": lambda d: d.zero(d.allocate(16) + 8, 16),
    "isn't pinned": lambda d: d.download(np.zeros(4, np.uint8), d.allocate(4)),
    "with gaps": lambda d: d.upload(d.allocate(4), d.pinned(8)[::2]),
    "pageable memory can't be captured": lambda d: _capture(
        d, lambda: d.upload(d._starts[0], np.zeros(4, np.uint8))
    ),
    "a wait can't be captured": lambda d: _capture(d, d.synchronize),
    "an event can't be captured": lambda d: _capture(d, lambda: d.record(d.event())),
    "given back while it runs": _destroy_running,
    "a graph that was given back": _launch_destroyed,
    "the device was given back": _use_closed,
    "an event that will never pass": _wait_in_vain,
    "a grid of 0 blocks": lambda d: d.load(b"", ["feed"])[0].launch(0, 32),
}


@pytest.mark.parametrize("message", BROKEN_CUDA)
def test_what_cuda_forbids_is_refused(device: RecordingDevice, message: str) -> None:
    device.allocate(64)
    with pytest.raises(CudaContractError, match=message):
        BROKEN_CUDA[message](device)
    assert len(device.violations) == 1


def test_a_context_computes_later_over_what_lies_there_then(bound: Bound) -> None:
    tokens = bound.device.array(bound.memory["input_ids"], "i8", 2)
    bound.run()
    bound.device.synchronize()
    with bound.device.captured() as captured:
        bound.run()
    bound.device.launch(captured[0])
    tokens[:] = [3, 4]
    assert bound.logits() == [3, 4]
    keys = bound.device.array(bound.memory["past_key_values.0.key"], "f4", 2, 128, 4)
    assert (keys == 2).all()  # past and present are one


def _set(bound: Bound, **places: int) -> None:
    for name, address in places.items():
        bound.context.set_tensor_address(name, address)
    bound.run()


def _shape(bound: Bound, name: str, *shape: int) -> None:
    bound.context.set_input_shape(name, shape)
    bound.run()


def _value(bound: Bound, name: str, value: int) -> None:
    bound.device.synchronize()
    bound.device.array(bound.memory[name], "i8", 2)[:] = value
    bound.run()
    bound.device.synchronize()


def _changed(bound: Bound) -> None:
    bound.run()
    with bound.device.captured() as captured:
        bound.run()
    bound.context.set_tensor_address("pack", bound.memory["unpack"])
    bound.device.launch(captured[0])


def _partly(bound: Bound, without: str) -> None:
    context = bound.engine.create()
    bound.ready(context)
    context._shapes.pop(without, None)
    context._addresses.pop(without, None)
    if without in SHAPES:
        context._addresses[without] = bound.memory[without]
    context.execute_async_v3(bound.device.stream or 0)


def _closed_first(bound: Bound) -> None:
    gc.collect()
    bound.engine.close()


def _run_closed(bound: Bound) -> None:
    bound.engine.closed = True
    bound.run()


BROKEN_TENSORRT: dict[str, Callable[[Bound], object]] = {
    "before there is a profile": lambda b: b.engine.create().set_input_shape("pack", (2,)),
    "there is no profile 2": lambda b: b.context.set_optimization_profile_async(2, 0x57EA),
    "logits is no input": lambda b: _shape(b, "logits", 2, 8),
    "outside": lambda b: _shape(b, "pack", 3),
    r"pack is \(2, 1\), outside": lambda b: _shape(b, "pack", 2, 1),
    "neither input nor output": lambda b: _set(b, nothing=256),
    "isn't aligned": lambda b: _set(b, pack=b.memory["pack"] + 8),
    "has no shape": lambda b: _partly(b, "past_lengths"),
    "has no address": lambda b: _partly(b, "logits"),
    "past_lengths has 1 of B, others 2": lambda b: _shape(b, "past_lengths", 1),
    "pack has 1 of N, others 2": lambda b: _shape(b, "pack", 1),
    "not at one address": lambda b: _set(b, **{"present.0.key": b.memory["present.0.value"]}),
    "no memory of the device": lambda b: _set(b, logits=b.memory["logits"] + 256),
    "is not the device's stream": lambda b: b.context.execute_async_v3(0),
    "haven't just run": lambda b: _capture(b.device, b.run),
    "changed after the capture": _changed,
    "past_lengths is": lambda b: _value(b, "past_lengths", 128),
    "input_ids is": lambda b: _value(b, "input_ids", 8),
    "logits_rows is": lambda b: _value(b, "logits_rows", 2),
    "before its contexts": _closed_first,
    "a step of an engine that was let go of": _run_closed,
}


@pytest.mark.parametrize("message", BROKEN_TENSORRT)
def test_what_tensorrt_forbids_is_refused(bound: Bound, message: str) -> None:
    with pytest.raises(CudaContractError, match=message):
        BROKEN_TENSORRT[message](bound)
    assert len(bound.device.violations) == 1


def test_another_profile_has_other_bounds(bound: Bound) -> None:
    context = bound.engine.create()
    context.set_optimization_profile_async(PROMPT, bound.device.stream or 0)
    assert context.set_input_shape("unpack", (1, 128))
    with pytest.raises(CudaContractError, match=r"outside \(1, 1\) to \(1, 128\)"):
        context.set_input_shape("unpack", (2, 1))


def test_the_inputs_are_those_of_the_dialect(bound: Bound) -> None:
    assert [*SHAPES, *CACHE] == list(bound.engine.inputs)
    assert DIALECT.logits_dtype == "float32"
