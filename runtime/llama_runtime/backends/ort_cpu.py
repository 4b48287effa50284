"""ONNX Runtime on the CPU: the ``slots`` dialect, its cache bound in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_runtime.backends.byte_probe import bytes_are_exact
from llama_runtime.backends.ort_library import check_signature, import_library
from llama_runtime.backends.row_probe import PROBE_CAPACITY, PROBE_SLOTS, least_row_multiple
from llama_runtime.contract import (
    CHUNK_MULTIPLE,
    MAX_ROW_MULTIPLE,
    SLOTS,
    Dialect,
    DType,
    Geometry,
    max_logits_rows,
)
from llama_runtime.errors import BackendError, DependencyError
from llama_runtime.graph_file import check_graph
from llama_runtime.kv_cache import cache_buffers
from llama_runtime.machine import default_threads
from llama_runtime.step_batch import Step, padded


class OrtCpu:
    """One session with one set of buffers; ``run`` allocates nothing that grows with the cache.

    Args:
        session: of ``open_session``, over a graph in the ``slots`` dialect. Weights are packed
            for the kernels once a session, so share one rather than opening another.
        geometry: the model's numbers.
        num_slots: B.
        capacity: C.
        row_multiple: see ``Backend``; None asks the one-row probe.
        num_prefix_blocks: blocks that are kept outside the slots.
        cache_dtype: of keys and values, ``float32`` or ``int8``; None takes the graph's own.

    Raises:
        BackendError: the graph's inputs and outputs are not those of the dialect and the geometry.
    """

    def __init__(
        self,
        session: Any,
        geometry: Geometry,
        *,
        num_slots: int,
        capacity: int,
        row_multiple: int | None = None,
        num_prefix_blocks: int = 0,
        cache_dtype: DType | None = None,
    ) -> None:
        dialect = SLOTS.typed(SLOTS.logits_dtype, cache_dtype or _cache_dtype(session))
        _check_contract(session, geometry, dialect)
        self.row_multiple = row_multiple or _probe(session, geometry)
        self._session = session
        self._binding = self._session.io_binding()
        self._bound_slots: tuple[int, int] | None = None
        rows = padded(max_logits_rows(num_slots), MAX_ROW_MULTIPLE)
        self._logits = np.zeros((rows, geometry.vocab_size), np.float32)
        self._cache = cache_buffers(geometry, num_slots, capacity, dialect.cache_dtype)
        self._blocks: list[npt.NDArray[Any]] = []
        if num_prefix_blocks:
            self._blocks = cache_buffers(
                geometry, num_prefix_blocks, CHUNK_MULTIPLE, dialect.cache_dtype
            )
        inputs = dialect.cache_inputs(geometry.num_layers)
        outputs = dialect.cache_outputs(geometry.num_layers)
        self._cache_names = [(i.name, o.name) for i, o in zip(inputs, outputs, strict=True)]

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        """See ``Backend.run``."""
        self._bind_cache(step.first_slot, step.first_slot + len(step.query_seqlens))
        for spec in SLOTS.inputs:
            _bind(self._binding.bind_input, spec.name, getattr(step, spec.name))
        logits = self._logits[: len(step.logits_rows)]
        _bind(self._binding.bind_output, SLOTS.logits.name, logits)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise BackendError(f"the graph failed: {error}") from error
        return logits

    def _bind_cache(self, first: int, end: int) -> None:
        """Let the graph see these slots of the cache: past and present are the same memory."""
        if self._bound_slots != (first, end):
            for (past, present), buffer in zip(self._cache_names, self._cache, strict=True):
                _bind(self._binding.bind_input, past, buffer[first:end])
                _bind(self._binding.bind_output, present, buffer[first:end])
            self._bound_slots = (first, end)

    def clean(self, slot: int, num_tokens: int) -> None:
        """See ``Backend.clean``."""
        for buffer in self._cache:
            buffer[slot, :, :num_tokens] = 0

    def save_block(self, slot: int, start: int, block: int) -> None:
        """See ``Backend.save_block``."""
        for cells, kept in zip(self._cache, self._blocks, strict=True):
            kept[block] = cells[slot, :, start : start + CHUNK_MULTIPLE]

    def load_block(self, slot: int, start: int, block: int) -> None:
        """See ``Backend.load_block``."""
        for cells, kept in zip(self._cache, self._blocks, strict=True):
            cells[slot, :, start : start + CHUNK_MULTIPLE] = kept[block]

    def close(self) -> None:
        """See ``Backend.close``."""
        del self._binding, self._session, self._cache, self._blocks


def open_session(graph: Path, threads: int) -> Any:
    """Load a graph and its weights.

    Args:
        graph: an ONNX file.
        threads: threads of the kernels; on one machine the bits of a step depend on the step and
            this number alone.

    Returns:
        An ``onnxruntime.InferenceSession``.

    Raises:
        DependencyError: onnxruntime is missing, too old or installed twice.
        BackendError: the graph can't be loaded, or breaks a rule of ``graph_file``.
    """
    check_graph(graph)
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if threads > default_threads():  # waiting threads that spin would take the working ones' time
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Else the decoder's threads go on spinning while those of the sampler work: on 2 processors a
    # sampled step takes 1.75 times as long.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # A plan of memory for each combination of shapes would be kept for ever: 38 KB each for 30
    # layers, and a server that runs for a week meets tens of thousands.
    options.enable_mem_pattern = False
    if not bytes_are_exact():  # the signed ones become unsigned, and products slower
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 4  # what goes wrong is raised; its own lines would say it twice
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises many types that share no base of its own
        raise BackendError(f"{graph} can't be loaded: {error}") from error


def _cache_dtype(session: Any) -> DType:
    """The type of a graph's keys and values; float32 if it has none that the dialect knows."""
    name = SLOTS.cache_inputs(1)[0].name
    types = {value.name: value.type for value in session.get_inputs()}
    return "int8" if types.get(name) == "tensor(int8)" else "float32"


def _check_contract(session: Any, geometry: Geometry, dialect: Dialect) -> None:
    sizes = {"K": geometry.num_kv_heads, "D": geometry.head_dim, "V": geometry.vocab_size}
    inputs = (*dialect.inputs, *dialect.cache_inputs(geometry.num_layers))
    outputs = (dialect.logits, *dialect.cache_outputs(geometry.num_layers))
    check_signature(session, inputs, outputs, sizes)


def _probe(session: Any, geometry: Geometry) -> int:
    backend = OrtCpu(
        session,
        geometry,
        num_slots=PROBE_SLOTS,
        capacity=PROBE_CAPACITY,
        row_multiple=MAX_ROW_MULTIPLE,
    )
    return least_row_multiple(backend.run, geometry.vocab_size)


def _bind(bind: Any, name: str, array: npt.NDArray[Any]) -> None:
    """Bind an array where it lies: no copy on the way in or out."""
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def import_onnxruntime() -> Any:
    """The onnxruntime module, sure to have what the graph needs.

    Raises:
        DependencyError: it is missing, installed twice, or lacks the attention operator's ragged
            form.
    """
    ort, schemas = import_library("cpu")
    inputs = [entry.name for schema in schemas("GroupQueryAttention") for entry in schema.inputs]
    if "query_seqlens" in inputs:
        return ort
    raise DependencyError(
        f"onnxruntime {ort.__version__} has no ragged GroupQueryAttention, which came with 1.32: "
        "pip install 'onnxruntime>=1.32'"
    )
