"""How fast this machine reads memory, and how fast it multiplies bytes.

Only numpy and ONNX Runtime are asked, so a limit is what the best of a few ways of theirs reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from llama_runtime.backends.ort_cpu import import_onnxruntime
from scripts.bench_clock import seconds

READ_BYTES = 2**29  # far larger than the caches
REPEATS = 3  # of each way in a round; the fastest counts, since others only disturb
GEMV_ROWS = 2048
# Rows, K and N' of the products that are tried: those of a batch of 32 in the shape of
# Llama-3.2-1B, the same for prompts, and the sizes between them that suit the kernel.
SHAPES = (
    (32, 2048, 8192),
    (32, 8192, 2048),
    (128, 2048, 8192),
    (512, 2048, 8192),
    (512, 2048, 2048),
)
FLOAT_SHAPE = (512, 2048, 2048)
# Of the operations of an instruction that multiplies bytes (four products and their sum for each
# 32-bit lane) to those of one that multiplies floats, on processors that begin as many a cycle.
VNNI_TO_FLOAT = 4

Way = Callable[[], float]  # one round of it: bytes or operations a second


def readers(threads: int) -> dict[str, Way]:
    """Ways of reading memory, by name; each returns bytes a second."""
    whole = np.ones(READ_BYTES // 4, np.float32)
    parts = np.split(whole, [len(whole) * i // threads for i in range(1, threads)])
    pool = ThreadPoolExecutor(threads)

    def numpy_way(read: Callable[[npt.NDArray[Any]], object]) -> None:
        list(pool.map(read, parts))

    rows = whole.reshape(32 * threads, -1) if len(whole) % (32 * threads) == 0 else whole[None]
    largest = _session(_reduce_max(), threads)
    product = _session(_float_product(), threads)
    one_row = np.ones((1, GEMV_ROWS), np.float32)
    matrix = whole[: len(whole) // GEMV_ROWS * GEMV_ROWS].reshape(GEMV_ROWS, -1)
    works: dict[str, tuple[Callable[[], object], int]] = {
        "numpy max": (partial(numpy_way, np.max), whole.nbytes),
        "numpy or": (
            partial(numpy_way, lambda part: np.bitwise_or.reduce(part.view(np.uint32))),
            whole.nbytes,
        ),
        "ReduceMax": (partial(largest.run, None, {"x": rows}), rows.nbytes),
        "MatMul": (partial(product.run, None, {"a": one_row, "b": matrix}), matrix.nbytes),
    }
    return {name: partial(_rate, work, size) for name, (work, size) in works.items()}


def multipliers(threads: int) -> dict[str, Way]:
    """Products of unsigned bytes with constant signed ones, by shape; operations a second.

    A multiply-add is two operations, as everywhere.
    """
    ways: dict[str, Way] = {}
    numbers = np.random.default_rng(0)
    for rows, k, n in SHAPES:
        matrix = numbers.integers(-127, 128, (k, n), np.int8)
        codes = numbers.integers(0, 256, (rows, k), np.uint8)
        session = _session(_byte_product(matrix), threads)
        work = partial(session.run, None, {"a": codes})
        ways[f"{rows} x {k} x {n}"] = partial(_rate, work, 2 * rows * k * n)
    return ways


def float_product(threads: int) -> Way:
    """A product of float32, which tells the rate that the processor's vector units allow."""
    rows, k, n = FLOAT_SHAPE
    session = _session(_float_product(np.ones((k, n), np.float32)), threads)
    work = partial(session.run, None, {"a": np.ones((rows, k), np.float32)})
    return partial(_rate, work, 2 * rows * k * n)


def _rate(work: Callable[[], object], amount: int) -> float:
    return amount / min(seconds(work) for _ in range(REPEATS))


def _session(graph: onnx.GraphProto, threads: int) -> Any:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Else the threads of one way go on spinning while the next one works.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model_bytes = model.SerializeToString()
    return ort.InferenceSession(model_bytes, options, providers=["CPUExecutionProvider"])


def _reduce_max() -> onnx.GraphProto:
    axis = helper.make_tensor("axis", onnx.TensorProto.INT64, [1], [1])
    node = helper.make_node("ReduceMax", ["x", "axis"], ["y"], keepdims=0)
    return helper.make_graph(
        [node],
        "largest",
        [_value("x", onnx.TensorProto.FLOAT, 2)],
        [_value("y", onnx.TensorProto.FLOAT, 1)],
        [axis],
    )


def _float_product(matrix: npt.NDArray[np.float32] | None = None) -> onnx.GraphProto:
    """A product with a constant matrix, which is packed for the kernels, or with an input."""
    inputs = [_value("a", onnx.TensorProto.FLOAT, 2)]
    constants = []
    if matrix is None:
        inputs.append(_value("b", onnx.TensorProto.FLOAT, 2))
    else:
        constants.append(onnx.numpy_helper.from_array(matrix, "b"))
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    outputs = [_value("y", onnx.TensorProto.FLOAT, 2)]
    return helper.make_graph([node], "product", inputs, outputs, constants)


def _byte_product(matrix: npt.NDArray[np.int8]) -> onnx.GraphProto:
    zero = helper.make_tensor("zero", onnx.TensorProto.UINT8, [], [128])
    return helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b", "zero"], ["y"])],
        "product",
        [_value("a", onnx.TensorProto.UINT8, 2)],
        [_value("y", onnx.TensorProto.INT32, 2)],
        [onnx.numpy_helper.from_array(matrix, "b"), zero],
    )


def _value(name: str, dtype: int, dimensions: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, [f"{name}{i}" for i in range(dimensions)])
