"""Execution contexts without TensorRT: they compute on ONNX Runtime, and a wrong call fails.

The graph is the one that TensorRT would build an engine from, in fp32, over the addresses that are
bound; what TensorRT asks of its callers is checked on the way.
"""

from __future__ import annotations

import weakref
from functools import cache
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnxruntime

from llama_runtime.contract import TENSORRT, Geometry
from llama_runtime.slot_batch import ALIGNMENT
from llama_runtime.tensorrt.limits import EngineLimits
from tests.recording_cuda import RecordingDevice

DIALECT = TENSORRT.typed("float32")


@cache
def cpu_session(graph: Path) -> onnxruntime.InferenceSession:
    """The graph on the CPU; tests share it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns at each step that a cache isn't updated in place
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class RecordingEngine:
    """See ``Contexts``.

    Attributes:
        contexts: those that are still there.
        shapes: of the inputs of every step that has run, captured ones too.
        closed: whether it was given back.
    """

    def __init__(
        self, graph: Path, geometry: Geometry, limits: EngineLimits, device: RecordingDevice
    ) -> None:
        self.device = device
        self.session = cpu_session(graph)
        self.capacity = limits.capacity
        self.vocab_size = geometry.vocab_size
        self.profiles = limits.profiles(geometry)
        pasts, presents = (
            DIALECT.cache_inputs(geometry.num_layers),
            DIALECT.cache_outputs(geometry.num_layers),
        )
        self.inputs = {spec.name: spec for spec in (*DIALECT.inputs, *pasts)}
        self.pairs = [(a.name, b.name) for a, b in zip(pasts, presents, strict=True)]
        self.contexts: weakref.WeakSet[RecordingContext] = weakref.WeakSet()
        self.shapes: list[dict[str, tuple[int, ...]]] = []
        self.closed = False

    def create(self) -> RecordingContext:
        context = RecordingContext(self)
        self.contexts.add(context)
        return context

    def close(self) -> None:
        if self.contexts:
            self.device.violate("an engine was let go of before its contexts")
        self.closed = True

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        """Run the graph over memory: what the queued kernels do."""
        self.shapes.append(shapes)
        feeds = {
            name: self.device.array(addresses[name], spec.dtype, *shapes[name]).copy()
            for name, spec in self.inputs.items()
        }
        self._check_values(feeds)
        logits, *caches = self.session.run(
            [DIALECT.logits.name, *(b for _, b in self.pairs)], feeds
        )
        self.device.array(addresses[DIALECT.logits.name], "f4", *logits.shape)[:] = logits
        for (_, present), values in zip(self.pairs, caches, strict=True):
            self.device.array(addresses[present], "f4", *values.shape)[:] = values

    def _check_values(self, feeds: dict[str, npt.NDArray[Any]]) -> None:
        """What TensorRT doesn't check: it reads elsewhere, or drops what doesn't fit."""
        unpack = feeds["unpack"]
        limits = {
            "input_ids": self.vocab_size,
            "logits_rows": len(feeds["input_ids"]),
            "unpack": len(feeds["input_ids"]),
            "pack": unpack.size,
            "past_lengths": self.capacity - unpack.shape[1] + 1,
        }
        for name, limit in limits.items():
            if feeds[name].min() < 0 or feeds[name].max() >= limit:
                self.device.violate(f"{name} is {feeds[name].tolist()}, not all below {limit}")


class RecordingContext:
    """See ``ExecutionContext``."""

    def __init__(self, engine: RecordingEngine) -> None:
        self._engine = engine
        self._device = engine.device
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._ran: list[dict[str, tuple[int, ...]]] = []  # shapes that ran and weren't captured
        self._changes = [0]  # how often; a list, so that a graph can look without holding this

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._check_stream(stream_handle)
        if not 0 <= profile_index < len(self._engine.profiles):
            self._device.violate(f"there is no profile {profile_index}")
        self._profile = profile_index
        self._shapes = {}
        self._changes[0] += 1
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._profile is None:
            self._device.violate(f"{name} has a shape before there is a profile")
        if name not in self._engine.inputs:
            self._device.violate(f"{name} is no input")
        least, _, most = self._engine.profiles[self._profile][name]
        fits = all(a <= n <= b for a, n, b in zip(least, shape, most, strict=False))
        if len(shape) != len(least) or not fits:
            self._device.violate(f"{name} is {shape}, outside {least} to {most}")
        if self._shapes.get(name) != shape:
            self._shapes = {**self._shapes, name: shape}
            self._changes[0] += 1
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        outputs = {DIALECT.logits.name, *(present for _, present in self._engine.pairs)}
        if name not in {*self._engine.inputs, *outputs}:
            self._device.violate(f"{name} is neither input nor output")
        if memory % ALIGNMENT:
            self._device.violate(f"{name} lies at {memory:#x}, which isn't aligned")
        if self._addresses.get(name) != memory:
            self._addresses = {**self._addresses, name: memory}
            self._changes[0] += 1
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        self._check_stream(stream_handle)
        if self._engine.closed:
            self._device.violate("a step of an engine that was let go of")
        self._check_shapes()
        self._check_addresses()
        shapes, addresses, engine = self._shapes, self._addresses, self._engine
        capturing = self._device.capturing
        if capturing is None:
            self._ran.append(shapes)
        else:
            if shapes not in self._ran[-1:]:
                self._device.violate("a capture of shapes that haven't just run as they are")
            changes, then, device = self._changes, self._changes[0], self._device

            def unchanged() -> None:
                if changes[0] != then:
                    device.violate("a graph runs whose context was changed after the capture")

            capturing.checks.append(unchanged)
        self._device.enqueue(lambda: engine.compute(shapes, addresses))
        return True

    def _check_stream(self, stream_handle: int) -> None:
        if stream_handle != self._device.stream:
            self._device.violate(f"{stream_handle} is not the device's stream")

    def _check_shapes(self) -> None:
        sizes: dict[str, int] = {}
        for name, spec in self._engine.inputs.items():
            if name not in self._shapes:
                self._device.violate(f"{name} has no shape")
            for axis, size in zip(spec.axes, self._shapes[name], strict=True):
                if sizes.setdefault(axis, size) != size:
                    self._device.violate(f"{name} has {size} of {axis}, others {sizes[axis]}")

    def _check_addresses(self) -> None:
        engine = self._engine
        sizes = {name: self._shapes[name] for name in engine.inputs}
        sizes |= {present: self._shapes[past] for past, present in engine.pairs}
        sizes[DIALECT.logits.name] = (*self._shapes["logits_rows"], engine.vocab_size)
        for name, shape in sizes.items():
            if name not in self._addresses:
                self._device.violate(f"{name} has no address")
            spec = engine.inputs.get(name)
            dtype = "float32" if spec is None else spec.dtype
            self._device.array(self._addresses[name], dtype, *shape)  # which must be there
        for past, present in engine.pairs:
            if self._addresses[past] != self._addresses[present]:
                self._device.violate(f"{past} and {present} are not at one address")
