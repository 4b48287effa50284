"""A CUDA device without CUDA: work waits until somebody waits for it, and a wrong call fails.

Its memory is that of the host, at real addresses. What is queued runs when the stream or an event
is waited for, and not before: who forgets to wait, or writes too early into pinned memory that a
queued copy will read, gets other numbers than on paper.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from llama_runtime.backends.cuda_device import Device, Kernel
from llama_runtime.errors import BackendError
from tests.recording_kernels import KERNELS

STREAM = 0x57EA
PAGE = 256  # cudaMalloc aligns to it
Work = Callable[[], None]


class CudaContractError(AssertionError):
    """A call that CUDA or TensorRT forbids, or leaves undefined."""


@dataclass
class Event:
    """Passed once its newest record has run; one that was never recorded has passed."""

    recorded: int = 0
    run: int = 0


@dataclass(eq=False)
class RecordedGraph:
    """What was queued while it was captured; checks say whether that still holds."""

    work: list[Work] = field(default_factory=list)
    checks: list[Work] = field(default_factory=list)
    num_queued: int = 0


class RecordingDevice(Device):
    """See ``Device``.

    Attributes:
        violations: every contract that was broken, also where the error was caught.
        fails_capture: whether captures end without a graph.
        num_replayed: how often a captured graph was queued.
        closed: whether it was given back.
    """

    def __init__(self) -> None:  # Device's own would look for CUDA
        self.ordinal, self.name, self.capability = 0, "recording", (9, 0)
        self.stream: int | None = STREAM
        self.violations: list[str] = []
        self.fails_capture = False
        self.num_replayed = 0
        self.closed = False
        self.capturing: RecordedGraph | None = None
        self._broken = False  # whether the capture can't end well any more
        self._queue: deque[Work] = deque()
        self._starts: list[int] = []  # of regions of device memory, ascending
        self._regions: list[npt.NDArray[np.uint8]] = []
        self._hosts: list[npt.NDArray[np.uint8]] = []
        self._alive: list[RecordedGraph] = []

    def violate(self, message: str) -> NoReturn:
        """Record and raise."""
        self._broken = self.capturing is not None
        self.violations.append(message)
        raise CudaContractError(message)

    # --- memory ---------------------------------------------------------------------------------

    def use(self) -> None:
        self._check_open()

    def memory(self) -> tuple[int, int]:
        return 1 << 40, 1 << 40

    def allocate(self, num_bytes: int, *, zero: bool = True) -> int:
        self._check_open()
        size = max(num_bytes, 1)
        raw = np.full(size + 2 * PAGE, 0xFF, np.uint8)  # numbers that are none, until written
        # A page is left free behind it, so that no region continues where another ends.
        region = raw[-raw.ctypes.data % PAGE :][:size]
        place = bisect_right(self._starts, region.ctypes.data)
        self._starts.insert(place, region.ctypes.data)
        self._regions.insert(place, region)
        if zero:
            self.zero(region.ctypes.data, num_bytes)
        return int(region.ctypes.data)

    def view(self, address: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Device memory, all of which one allocation must hold."""
        place = bisect_right(self._starts, address) - 1
        if place >= 0:
            begin = address - self._starts[place]
            if begin + num_bytes <= self._regions[place].size:
                return self._regions[place][begin : begin + num_bytes]
        return self.violate(f"{num_bytes} bytes at {address:#x} are no memory of the device")

    def array(self, address: int, dtype: npt.DTypeLike, *shape: int) -> npt.NDArray[Any]:
        """Device memory as an array; writing to it writes there."""
        kind = np.dtype(dtype)
        return self.view(address, kind.itemsize * int(np.prod(shape))).view(kind).reshape(shape)

    def pinned(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        self._check_open()
        self._hosts.append(np.full(max(num_bytes, 1), 0xEE, np.uint8))
        return self._hosts[-1]

    def _is_pinned(self, array: npt.NDArray[Any]) -> bool:
        begin, end = np.lib.array_utils.byte_bounds(array)
        bounds = [np.lib.array_utils.byte_bounds(host) for host in self._hosts]
        return any(low <= begin and end <= high for low, high in bounds)

    # --- the stream -----------------------------------------------------------------------------

    def enqueue(self, work: Work) -> None:
        """Let something run later, or record it if a capture is under way."""
        self._check_open()
        if self._broken:
            raise BackendError("CUDA failed: the capture is broken")
        (self._queue if self.capturing is None else self.capturing.work).append(work)

    def zero(self, address: int, num_bytes: int) -> None:
        self.view(address, num_bytes)
        self.enqueue(lambda: self.view(address, num_bytes).fill(0))

    def upload(self, address: int, source: npt.NDArray[Any]) -> None:
        if not source.flags.c_contiguous:
            self.violate("a copy from memory with gaps")
        if not self._is_pinned(source):
            if self.capturing is not None:
                self.violate("a copy from pageable memory can't be captured")
            source = source.copy()  # CUDA has read it when the call returns
        self.view(address, source.nbytes)
        self.enqueue(
            lambda: self.view(address, source.nbytes).__setitem__(
                slice(None), source.reshape(-1).view(np.uint8)
            )
        )

    def download(self, target: npt.NDArray[Any], address: int) -> None:
        if not self._is_pinned(target) or not target.flags.c_contiguous:
            self.violate("a copy to memory that isn't pinned waits")
        self.view(address, target.nbytes)
        self.enqueue(
            lambda: target.view(np.uint8).__setitem__(
                slice(None), self.view(address, target.nbytes)
            )
        )

    def event(self) -> Event:
        return Event()

    def record(self, event: Event) -> None:
        self._refuse_in_capture("an event")
        event.recorded += 1
        number = event.recorded
        self.enqueue(lambda: setattr(event, "run", number))

    def passed(self, event: Event) -> bool:
        return event.run == event.recorded

    def wait(self, event: Event) -> None:
        self._refuse_in_capture("a wait")
        while not self.passed(event):
            if not self._queue:
                self.violate("an event that will never pass")
            self._queue.popleft()()

    def synchronize(self) -> None:
        self._check_open()
        self._refuse_in_capture("a wait")
        while self._queue:
            self._queue.popleft()()

    # --- graphs and kernels ---------------------------------------------------------------------

    @contextmanager
    def captured(self) -> Iterator[list[Any]]:
        self._refuse_in_capture("a capture")
        self.capturing, result = RecordedGraph(), list[Any]()
        try:
            yield result
            if self._broken or self.fails_capture:
                raise BackendError("CUDA failed: cudaStreamEndCapture says invalidated")
            self._alive.append(self.capturing)
            result.append(self.capturing)
        finally:
            self.capturing, self._broken = None, False

    def launch(self, graph: RecordedGraph) -> None:
        self._refuse_in_capture("a graph")
        if graph not in self._alive:
            self.violate("a graph that was given back")
        for check in graph.checks:
            check()
        self.num_replayed += 1
        graph.num_queued += 1
        for work in graph.work:
            self.enqueue(work)
        self.enqueue(lambda: setattr(graph, "num_queued", graph.num_queued - 1))

    def destroy(self, graph: RecordedGraph) -> None:
        if graph.num_queued:
            self.violate("a graph is given back while it runs")
        self._alive.remove(graph)

    def load(self, binary: bytes, names: Sequence[str]) -> list[Kernel]:  # noqa: ARG002
        return [RecordingKernel(self, KERNELS[name]) for name in names]

    def close(self) -> None:
        if self.closed:
            return
        self.synchronize()
        self.closed, self.stream = True, None
        self._starts, self._regions, self._hosts, self._alive = [], [], [], []

    def _check_open(self) -> None:
        if self.closed:
            self.violate("the device was given back")

    def _refuse_in_capture(self, what: str) -> None:
        if self.capturing is not None:
            self.violate(f"{what} can't be captured")


class RecordingKernel(Kernel):
    """See ``Kernel``: its arguments are read when it is launched, its work is done later."""

    def __init__(self, device: RecordingDevice, function: Callable[..., None]) -> None:
        self._recorder = device
        self._compute = function

    def launch(self, blocks: int, threads: int, *arguments: Any) -> None:
        if blocks < 1 or not 1 <= threads <= 1024:
            self._recorder.violate(f"a grid of {blocks} blocks of {threads} threads")
        values = [argument.value or 0 for argument in arguments]
        self._recorder.enqueue(lambda: self._compute(self._recorder.array, blocks, *values))
