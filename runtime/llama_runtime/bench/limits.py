"""How fast this machine reads memory and how fast it multiplies.

What the best of a few simple ways reaches: numpy reads, ONNX Runtime multiplies. So a share of them
is a share of what was seen here, now, with as many threads, and not of a data sheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_runtime.backends.byte_probe import bytes_are_exact
from llama_runtime.backends.ort_library import import_library
from llama_runtime.bench.onnx_bytes import byte_product, float_product

READ_BYTES = 2**28  # far larger than the caches
REPEATS = 3  # the fastest counts, since others only disturb
SHAPES = ((32, 2048, 8192), (512, 2048, 2048))  # rows, K and N of the products that are tried


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine, or a device of it, was seen to reach.

    Attributes:
        bandwidth: bytes read of memory a second; on a GPU also those written, by a copy.
        rates: operations a second of products of "float32", "bytes" or "float16"; a multiply-add
            is two.
        threads: that did it; None on a GPU.
    """

    bandwidth: float
    rates: dict[str, float]
    threads: int | None = None

    def kind_of(self, precision: str) -> str:
        """Of what the products are that weights of a precision run in.

        On the CPU int8 and int4 run in kernels for bytes, on a GPU all in 16 bits.
        """
        if "float16" in self.rates:
            return "float16"
        return "bytes" if precision.startswith("int") else "float32"


def measure(threads: int) -> Limits:
    """Measure them, in a second or two.

    Raises:
        DependencyError: onnxruntime is missing or installed twice.
    """
    return Limits(
        bandwidth=_bandwidth(threads),
        rates={
            "float32": max(_rates(threads, of_bytes=False)),
            "bytes": max(_rates(threads, of_bytes=True)),
        },
        threads=threads,
    )


def _bandwidth(threads: int) -> float:
    whole = np.ones(READ_BYTES // 4, np.float32)
    parts = np.array_split(whole, threads)

    def largest(part: npt.NDArray[np.float32]) -> object:
        return np.max(part)

    def union(part: npt.NDArray[np.float32]) -> object:
        return np.bitwise_or.reduce(part.view(np.uint32))

    with ThreadPoolExecutor(threads) as pool:
        return max(
            whole.nbytes / fastest(lambda read=read: list(pool.map(read, parts)))  # type: ignore[misc]
            for read in (largest, union)
        )


def _rates(threads: int, *, of_bytes: bool) -> Iterator[float]:
    """Operations a second of each product that is tried."""
    for rows, depth, columns in SHAPES:
        if of_bytes:
            model = byte_product(rows, np.full((depth, columns), 3, np.int8))
            left: npt.NDArray[Any] = np.full((rows, depth), 5, np.uint8)
        else:
            model = float_product(rows, np.full((depth, columns), 0.5, np.float32))
            left = np.ones((rows, depth), np.float32)
        session = _session(model, threads)
        yield 2 * rows * depth * columns / fastest(lambda s=session, a=left: s.run(None, {"a": a}))  # type: ignore[misc]


def _session(model: bytes, threads: int) -> Any:
    ort, _ = import_library("cpu")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not bytes_are_exact():  # as for the decoder's graph
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 4
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls, after one that touches all memory."""
    work()
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return max(min(found), 1e-9)
