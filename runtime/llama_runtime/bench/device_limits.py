"""How fast a CUDA device reads its memory and how fast it multiplies; see ``limits``.

A copy on the device reads and writes; ONNX Runtime multiplies, in float16, as for all precisions of
a bundle for CUDA.
"""

from __future__ import annotations

import numpy as np

from llama_runtime.backends.cuda_device import Device
from llama_runtime.backends.ort_cuda import cuda_session
from llama_runtime.bench.limits import Limits, fastest
from llama_runtime.bench.onnx_bytes import half_product

COPY_BYTES = 2**30  # far larger than the caches
COPIES = 8  # in a row, so that it doesn't matter how long it takes to ask for one
SHAPE = (4096, 8192, 8192)  # rows, K and N of the product


def measure_device(ordinal: int) -> Limits:
    """Measure a device, in some seconds.

    Raises:
        DependencyError: onnxruntime has no CUDA provider.
        BackendError: there is no such device, or not enough memory on it.
    """
    device = Device(ordinal)
    try:
        return Limits(bandwidth=_bandwidth(device), rates={"float16": _rate(device)})
    finally:
        device.close()


def _bandwidth(device: Device) -> float:
    source, target = device.allocate(COPY_BYTES), device.allocate(COPY_BYTES)

    def copy() -> None:
        for _ in range(COPIES):
            device.copy(target, source, COPY_BYTES)
        device.synchronize()

    return 2 * COPIES * COPY_BYTES / fastest(copy)


def _rate(device: Device) -> float:
    rows, depth, columns = SHAPE
    numbers = np.random.default_rng(0)  # zeros would take less power, and run faster
    right = numbers.random((depth, columns), np.float32).astype(np.float16)
    left = numbers.random((rows, depth), np.float32).astype(np.float16)
    session = cuda_session(half_product(rows, right), device)
    places = device.allocate(left.nbytes), device.allocate(2 * rows * columns)
    device.upload(places[0], left)
    device.synchronize()
    binding = session.io_binding()
    binding.bind_input("a", "cuda", device.ordinal, np.float16, left.shape, places[0])
    binding.bind_output("y", "cuda", device.ordinal, np.float16, (rows, columns), places[1])

    def multiply() -> None:
        session.run_with_iobinding(binding)
        device.synchronize()

    return 2 * rows * depth * columns / fastest(multiply)
