"""One CUDA device through NVIDIA's own bindings: memory, a stream, events, graphs and kernels.

ONNX Runtime's bindings can't copy without waiting, nor say when a step is over, so what overlaps
goes through ``cuda-bindings``; sessions run on the same stream.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_runtime.errors import BackendError, DependencyError

INSTALL = "pip install 'llama-caravan[gpu]'"
LEAST_DRIVER = 13_000  # CUDA 13.0, which onnxruntime-gpu is built for


def import_cuda() -> tuple[Any, Any, Any]:
    """The modules driver, runtime and nvrtc of ``cuda.bindings``.

    Raises:
        DependencyError: they aren't installed.
    """
    try:
        from cuda.bindings import driver, nvrtc, runtime
    except ImportError as error:
        raise DependencyError(f"CUDA needs cuda-bindings ({error}): {INSTALL}") from error
    return driver, runtime, nvrtc


class Device:
    """A device, and one stream on which everything of an engine runs in order.

    Args:
        ordinal: which device, from 0.

    Attributes:
        name: as NVIDIA calls it.
        capability: its compute capability, major and minor.
        stream: the stream's handle.

    Raises:
        DependencyError: the bindings aren't installed.
        BackendError: there is no such device, or its driver is too old.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self._driver, self._runtime, _ = import_cuda()
        self.ordinal = ordinal
        self._check_driver()
        count = self._call("cudaGetDeviceCount")
        if not 0 <= ordinal < count:
            raise BackendError(f"there is no CUDA device {ordinal}: this machine has {count}")
        self.use()
        properties = self._call("cudaGetDeviceProperties", ordinal)
        self.name = properties.name.decode(errors="replace")
        self.capability = (properties.major, properties.minor)
        stream = self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)
        self.stream: int | None = int(stream)
        self._memory: list[int] = []
        self._pinned: list[int] = []
        self._modules: list[Any] = []
        self._graphs: list[Any] = []
        self._events: list[Any] = []

    def _check_driver(self) -> None:
        try:
            error, version = self._runtime.cudaDriverGetVersion()
        except RuntimeError as missing:  # the driver's library itself
            raise BackendError(f"there is no CUDA driver on this machine: {missing}") from missing
        if int(error) or not version:
            raise BackendError("there is no CUDA device, or no driver for it, on this machine")
        if version < LEAST_DRIVER:
            raise BackendError(
                f"the CUDA driver is of version {version // 1000}.{version % 1000 // 10}, and "
                f"onnxruntime-gpu needs {LEAST_DRIVER // 1000}.{LEAST_DRIVER % 1000 // 10}: "
                "update the driver"
            )

    def use(self) -> None:
        """Make this the calling thread's device."""
        self._call("cudaSetDevice", self.ordinal)

    def memory(self) -> tuple[int, int]:
        """Bytes of device memory that are free, and all there are."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def allocate(self, num_bytes: int, *, zero: bool = True) -> int:
        """Device memory, which is given back by ``close``.

        Returns:
            Its address.

        Raises:
            BackendError: there isn't as much.
        """
        address = int(self._call("cudaMalloc", max(num_bytes, 1)))
        self._memory.append(address)
        if zero:
            self.zero(address, num_bytes)
        return address

    def pinned(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Host memory that copies don't have to wait for, until ``close``."""
        address = int(self._call("cudaMallocHost", max(num_bytes, 1)))
        self._pinned.append(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * max(num_bytes, 1)).from_address(address))

    def zero(self, address: int, num_bytes: int) -> None:
        """Queue that memory becomes zero."""
        self._call("cudaMemsetAsync", address, 0, num_bytes, self.stream)

    def upload(self, address: int, source: npt.NDArray[Any]) -> None:
        """Queue a copy to the device; the source must stay as it is until it has run."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, source.ctypes.data, source.nbytes, kind, self.stream)

    def download(self, target: npt.NDArray[Any], address: int) -> None:
        """Queue a copy from the device."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, address, target.nbytes, kind, self.stream)

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Queue a copy on the device."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", target, source, num_bytes, kind, self.stream)

    def event(self) -> Any:
        """A new event, without times, until ``close``."""
        event = self._call("cudaEventCreateWithFlags", self._runtime.cudaEventDisableTiming)
        self._events.append(event)
        return event

    def record(self, event: Any) -> None:
        """Queue an event."""
        self._call("cudaEventRecord", event, self.stream)

    def passed(self, event: Any) -> bool:
        """Whether what was queued before an event has run."""
        (error,) = self._runtime.cudaEventQuery(event)  # of a broken device ``wait`` will tell
        return bool(error != self._runtime.cudaError_t.cudaErrorNotReady)

    def wait(self, event: Any) -> None:
        """Wait until an event has passed."""
        self._call("cudaEventSynchronize", event)

    def synchronize(self) -> None:
        """Wait until all that is queued has run."""
        self._call("cudaStreamSynchronize", self.stream)

    @contextmanager
    def captured(self) -> Iterator[list[Any]]:
        """Record what is queued instead of running it.

        Yields:
            A list, which holds the executable graph afterwards; ``launch`` queues that.
        """
        result: list[Any] = []
        # Relaxed, so that an allocation by the session's arena doesn't break it off.
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            yield result
        except BaseException:
            self._runtime.cudaStreamEndCapture(self.stream)
            raise
        graph = self._call("cudaStreamEndCapture", self.stream)
        try:
            executable = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)
        self._graphs.append(executable)
        result.append(executable)

    def launch(self, graph: Any) -> None:
        """Queue a captured graph."""
        self._call("cudaGraphLaunch", graph, self.stream)

    def destroy(self, graph: Any) -> None:
        """Give a captured graph back, once it isn't running."""
        self._graphs.remove(graph)
        self._call("cudaGraphExecDestroy", graph)

    def load(self, binary: bytes, names: Sequence[str]) -> list[Kernel]:
        """Load machine code of ``cuda_compiler``.

        Args:
            binary: compiled for this device.
            names: its kernels, declared ``extern "C"``.
        """
        module = self._call("cuModuleLoadData", binary)
        self._modules.append(module)
        return [
            Kernel(self, self._call("cuModuleGetFunction", module, name.encode())) for name in names
        ]

    def close(self) -> None:
        """Wait, and give back everything; a second call does nothing."""
        if self.stream is None:
            return
        self._runtime.cudaStreamSynchronize(self.stream)  # whatever it says: this is the end
        for graph in self._graphs:
            self._runtime.cudaGraphExecDestroy(graph)
        for event in self._events:
            self._runtime.cudaEventDestroy(event)
        for module in self._modules:
            self._driver.cuModuleUnload(module)
        for address in self._memory:
            self._runtime.cudaFree(address)
        for address in self._pinned:
            self._runtime.cudaFreeHost(address)
        self._runtime.cudaStreamDestroy(self.stream)
        self.stream = None

    def _call(self, name: str, *arguments: Any) -> Any:
        """A function of the driver or the runtime, its status checked."""
        module = self._driver if name.startswith("cu") and name[2].isupper() else self._runtime
        error, *values = getattr(module, name)(*arguments)
        self._check(error, name)
        return values[0] if len(values) == 1 else values

    def _check(self, error: Any, name: str) -> None:
        if int(error):
            raise BackendError(f"CUDA failed: {name} says {error.name}")


class Kernel:
    """A compiled kernel.

    Args:
        device: where it was compiled.
        function: its handle.
    """

    def __init__(self, device: Device, function: Any) -> None:
        self._device = device
        self._function = function

    def launch(self, blocks: int, threads: int, *arguments: Any) -> None:
        """Queue it.

        Args:
            blocks: of the grid.
            threads: of a block.
            arguments: ctypes values, as its signature has them.
        """
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        grid, block = (blocks, 1, 1), (threads, 1, 1)
        device = self._device
        device._call(
            "cuLaunchKernel",
            self._function,
            *grid,
            *block,
            0,
            device.stream,
            ctypes.addressof(pointers),
            0,
        )
