"""Does ONNX Runtime multiply unsigned with signed bytes rightly on this processor?

On x86 without VNNI its kernels add two products up in 16 bits, which are too few, and say nothing.
``session.x64quantprecision`` lets them take the signed bytes for unsigned ones, which is exact. But
it does so on every x86 processor, and where there is VNNI products take twice as long for nothing.
So they are tried out once: that needs no list of processors, and is true under emulation as well.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from llama_runtime.backends.ort_library import import_library

TERMS = 8
# MatMulInteger of x, uint8 [2, 8], and constants, int8 [8, 4], which are all 127.
MODEL = (
    b"\x08\x07:t"
    b'\n\x18\n\x01x\n\x01w\x12\x01y"\rMatMulInteger'
    b"\x12\x01g"
    b"*+\x08\x08\x08\x04\x10\x03B\x01wJ "
    + b"\x7f"
    * 32
    + b"Z\x13\n\x01x\x12\x0e\n\x0c\x08\x02\x12\x08\n\x02\x08\x02\n\x02\x08\x08"
    b"b\x13\n\x01y\x12\x0e\n\x0c\x08\x06\x12\x08\n\x02\x08\x02\n\x02\x08\x04"
    b"B\x04\n\x00\x10\n"
)


@cache
def bytes_are_exact() -> bool:
    """Whether the largest products come out as they are, without that option.

    Raises:
        DependencyError: onnxruntime is missing or installed twice.
    """
    ort, _ = import_library("cpu")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"x": np.full((2, TERMS), 255, np.uint8)})
    return bool((sums == TERMS * 255 * 127).all())
