"""The one-row probe finds out how many rows a kernel needs to give each of them the same bits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llama_runtime.backends.ort_cpu import OrtCpu, import_onnxruntime, open_session
from llama_runtime.backends.row_probe import (
    PROBE_CAPACITY,
    PROBE_SLOTS,
    first_tokens,
    least_row_multiple,
)
from llama_runtime.bundle import Bundle, open_bundle
from llama_runtime.contract import MAX_ROW_MULTIPLE, SLOTS
from llama_runtime.step_batch import Step

VOCAB_SIZE = 32
Odd = Callable[[int, int], bool]


def kernel(odd: Odd) -> Callable[[Step], npt.NDArray[np.float32]]:
    """Rows of logits, where row i of n has other bits if ``odd(i, n)``."""

    def run(step: Step) -> npt.NDArray[np.float32]:
        num_rows = len(step.logits_rows)
        logits = np.sqrt(np.arange(1, VOCAB_SIZE + 1) + step.input_ids[:, None])
        result: npt.NDArray[np.float32] = logits.astype(np.float32)
        for i in range(num_rows):
            if odd(i, num_rows):
                result[i, 3] = np.nextafter(result[i, 3], np.float32(np.inf))
        return result

    return run


@pytest.mark.parametrize(
    ("odd", "multiple"),
    [
        (lambda _, n: n < 0, 1),
        (lambda _, n: n == 1, 2),  # another kernel for one row
        (lambda i, n: n % 2 == 1 and i == n - 1, 2),  # rows in pairs, and an odd last one
        (lambda i, n: n == 13 and i == 12, 2),  # one row left by a kernel that takes twelve
        (lambda i, n: i >= n // 4 * 4, 4),  # rows in fours
        (lambda _, n: n < 4, 4),
    ],
    ids=["never", "one", "odd last", "thirteenth", "fours", "few"],
)
def test_the_multiple_is_the_least_that_keeps_the_bits(odd: Odd, multiple: int) -> None:
    assert least_row_multiple(kernel(odd), VOCAB_SIZE) == multiple


def test_a_machine_where_company_shows_all_the_same_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert least_row_multiple(kernel(lambda _, n: n < 16), VOCAB_SIZE) == MAX_ROW_MULTIPLE
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "bits of a row depend on how many rows run beside it" in record.message


def test_a_step_of_the_probe_speaks_the_contract() -> None:
    step = first_tokens(3, VOCAB_SIZE)
    sizes = {"B": PROBE_SLOTS, "N": 3, "R": 3, "S": 1}
    for spec in SLOTS.inputs:
        array = getattr(step, spec.name)
        assert array.dtype == spec.dtype, spec.name
        assert array.shape == tuple(sizes[axis] for axis in spec.axes), spec.name
    assert len(set(step.input_ids.tolist())) == 3


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


def session_without_prepacking(graph: Path) -> Any:
    """Where ONNX Runtime packs no weights, it has a kernel of its own for a single row."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("prepacked", [True, False])
def test_padded_to_what_the_probe_found_rows_of_a_real_graph_keep_their_bits(
    bundle: Bundle, prepacked: bool
) -> None:
    graph, geometry = bundle.graph_path(SLOTS.name), bundle.manifest.geometry
    session = open_session(graph, threads=1) if prepacked else session_without_prepacking(graph)
    backend = OrtCpu(session, geometry, num_slots=PROBE_SLOTS, capacity=PROBE_CAPACITY)
    if not prepacked:
        assert backend.row_multiple > 1, "one row alone has other bits here"
    many = backend.run(first_tokens(PROBE_SLOTS, geometry.vocab_size)).copy()
    for n in range(backend.row_multiple, PROBE_SLOTS, backend.row_multiple):
        few = backend.run(first_tokens(n, geometry.vocab_size))
        assert few[:n].tobytes() == many[:n].tobytes(), n
