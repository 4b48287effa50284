"""ONNX Runtime itself: how it is imported, and whether a graph is the one that was meant."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from llama_runtime.contract import TensorSpec
from llama_runtime.errors import BackendError, DependencyError

# Distributions that bring the package onnxruntime.
DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-training",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
)
_TYPES = {
    "float32": "tensor(float)",
    "float64": "tensor(double)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "float8e4m3fn": "tensor(float8e4m3fn)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "int8": "tensor(int8)",
    "bool": "tensor(bool)",
}


def import_library(extra: str) -> tuple[Any, Callable[[str], list[Any]]]:
    """The onnxruntime module, its telemetry off, and a function from an operator to its schemas.

    Args:
        extra: of this distribution, which brings the library.

    Raises:
        DependencyError: it is missing or installed twice.
    """
    check_installed_once()
    before = os.environ.get("ORT_DISABLE_TELEMETRY")
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read once, while the library loads
    try:
        import onnxruntime as ort
        from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema
    except ImportError as error:
        raise DependencyError(
            f"onnxruntime can't be imported ({error}): pip install 'llama-caravan[{extra}]'"
        ) from error
    finally:
        if before is None:
            del os.environ["ORT_DISABLE_TELEMETRY"]
        else:
            os.environ["ORT_DISABLE_TELEMETRY"] = before
    ort.disable_telemetry_events()
    return ort, lambda name: [one for one in get_all_operator_schema() if one.name == name]


def check_installed_once() -> None:
    """Refuse two distributions of one package, without importing it.

    Raises:
        DependencyError: each of them has overwritten files of the other.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    found = []
    for name in DISTRIBUTIONS:
        with contextlib.suppress(PackageNotFoundError):
            distribution(name)
            found.append(name)
    if len(found) > 1:
        raise DependencyError(
            f"{' and '.join(found)} are both installed, and each has overwritten files of the "
            f"other: pip uninstall {' '.join(found)}, then pip install the one you want, such as "
            "'llama-caravan[cpu]'"
        )


def check_signature(
    session: Any, inputs: Seq[TensorSpec], outputs: Seq[TensorSpec], sizes: Mapping[str, int]
) -> None:
    """Compare what a graph takes and gives with the contract, before anything is allocated.

    Args:
        session: of ``open_session``.
        inputs: what it must take.
        outputs: what it must give.
        sizes: of the axes that have one, by letter.

    Raises:
        BackendError: it is another graph.
    """
    for values, specs in ((session.get_inputs(), inputs), (session.get_outputs(), outputs)):
        has = {
            value.name: (value.type, [n if isinstance(n, int) else None for n in value.shape])
            for value in values
        }
        needs = {
            spec.name: (_TYPES[spec.dtype], [sizes.get(axis) for axis in spec.axes])
            for spec in specs
        }
        for name in sorted(has.keys() | needs.keys()):
            if has.get(name) != needs.get(name):
                raise BackendError(
                    f"the graph doesn't fit its manifest: {name!r:.80} is {_shown(has.get(name))} "
                    f"and must be {_shown(needs.get(name))}: rebuild it with llama-export build"
                )


def _shown(value: tuple[str, list[int | None]] | None) -> str:
    if value is None:
        return "absent"
    kind, shape = value
    return f"{kind} [{', '.join('?' if size is None else str(size) for size in shape)}]"
