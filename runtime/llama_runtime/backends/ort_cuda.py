"""ONNX Runtime on a CUDA device: the ``paged`` dialect, steps queued one behind the other.

A step is a copy to the device, the decoder's kernels and the sampler's, and a copy back, all on one
stream. The next one takes its tokens from where the sampler left them, so it is queued before the
host has seen them. Steps that decode come in few sizes, and from the second time on the decoder of
each is one launch of a captured graph; the sampler's kernels follow it.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_runtime.backends.captured_graphs import CapturedGraphs
from llama_runtime.backends.cuda_device import INSTALL, Device
from llama_runtime.backends.cuda_masks import CudaMasks
from llama_runtime.backends.cuda_sampler import CudaSampler
from llama_runtime.backends.cuda_scores import CudaScores
from llama_runtime.backends.cuda_stage import STAGES, InFlight, Stage
from llama_runtime.backends.ort_library import check_signature, import_library
from llama_runtime.chunk import Chunk
from llama_runtime.contract import CACHE_ITEM_BYTES, PAGED, DType, Geometry
from llama_runtime.errors import BackendError, DependencyError
from llama_runtime.graph_file import check_graph
from llama_runtime.paged_batch import Layout, PagedBatch
from llama_runtime.paged_cache import PagedCache
from llama_runtime.sequence import Sequence

_ONNX_TYPES = {"float16": 10, "bfloat16": 16, "float8e4m3fn": 17, "int64": 7, "int32": 6}
_ITEM_BYTES = 2  # of activations


def open_cuda_session(graph: Path, device: Device) -> Any:
    """Load a graph and its weights onto a device.

    Args:
        graph: an ONNX file in the ``paged`` dialect.
        device: its stream is the session's.

    Returns:
        An ``onnxruntime.InferenceSession``.

    Raises:
        DependencyError: onnxruntime is missing, installed twice, or has no CUDA provider.
        BackendError: the graph can't be loaded, or breaks a rule of ``graph_file``.
    """
    check_graph(graph)
    return cuda_session(graph, device)


def cuda_session(model: Path | bytes, device: Device) -> Any:
    """Load any graph onto a device; see ``open_cuda_session``."""
    ort, schemas = import_library("gpu")
    if "CUDAExecutionProvider" not in ort.get_available_providers() or not schemas(
        "PagedAttention"
    ):
        raise DependencyError(
            f"onnxruntime {ort.__version__} has no CUDA provider with PagedAttention: "
            f"pip uninstall onnxruntime, then {INSTALL}"
        )
    with suppress(Exception):  # CUDA's libraries may be on the loader's path already
        ort.preload_dlls()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised; its own lines would say it twice
    # Products of int4 weights in one kernel, not by writing the weights out first.
    options.add_session_config_entry("ep.cuda.fpa_intb_gemm", "1")
    provider = {
        "device_id": str(device.ordinal),
        "user_compute_stream": str(device.stream),
        "arena_extend_strategy": "kSameAsRequested",
    }
    try:
        session = ort.InferenceSession(
            model, options, providers=[("CUDAExecutionProvider", provider)]
        )
    except Exception as error:  # ONNX Runtime raises many types that share no base of its own
        name = model if isinstance(model, Path) else "a graph"
        raise BackendError(f"{name} can't be loaded: {error}") from error
    if "CUDAExecutionProvider" not in session.get_providers():
        raise DependencyError(
            f"onnxruntime can't load its CUDA provider, for want of a library of CUDA: {INSTALL}"
        )
    return session


class OrtCuda:
    """See ``Runner``.

    Args:
        graph: an ONNX file in the ``paged`` dialect.
        geometry: the model's numbers.
        device: this owns and closes it.
        cache: who holds which block; its pool is allocated here.
        dtype: of activations.
        cache_dtype: of keys and values; None is that of activations.
        prompt_budget: the most prompt tokens of a step.
        eos_token_ids: every end token of the model.

    Raises:
        BackendError: the graph can't be loaded, or isn't that of the dialect and the geometry.
    """

    overlaps = True
    verifies = False

    def __init__(
        self,
        graph: Path,
        geometry: Geometry,
        device: Device,
        cache: PagedCache,
        *,
        dtype: DType,
        cache_dtype: DType | None = None,
        prompt_budget: int,
        eos_token_ids: Collection[int],
    ) -> None:
        device.use()
        self._device = device
        self._cache = cache
        self._batch = PagedBatch(cache, prompt_budget, geometry.vocab_size)
        self._dialect = PAGED.typed(dtype, cache_dtype)
        self._session = open_cuda_session(graph, device)
        sizes = {"K": geometry.num_kv_heads, "D": geometry.head_dim, "V": geometry.vocab_size}
        inputs = (*PAGED.inputs, *self._dialect.cache_inputs(geometry.num_layers))
        outputs = (self._dialect.logits, *self._dialect.cache_outputs(geometry.num_layers))
        check_signature(self._session, inputs, outputs, {**sizes, "3": 3})

        largest = self._batch.largest
        self._inputs = device.allocate(largest.num_bytes)
        self._input_ids = device.allocate(8 * largest.num_tokens)
        self._vocab_size = geometry.vocab_size
        self._logits = device.allocate(_ITEM_BYTES * largest.num_logits * geometry.vocab_size)
        self._sampler = CudaSampler(
            device,
            dtype,
            vocab_size=geometry.vocab_size,
            num_slots=cache.num_slots,
            max_rows=largest.num_logits,
            eos_token_ids=eos_token_ids,
        )
        self._masks = CudaMasks(device, geometry.vocab_size, largest.num_logits)
        self._scores = CudaScores(device, self._sampler, self._logits, largest.num_logits)
        self._stages = [Stage(device, largest) for _ in range(STAGES)]
        self._cells = (cache.num_blocks, cache.block_size, geometry.num_kv_heads, geometry.head_dim)
        item_bytes = CACHE_ITEM_BYTES[self._dialect.cache_dtype]
        self._block_bytes = item_bytes * int(np.prod(self._cells[1:]))
        self._pools = [
            device.allocate(cache.num_blocks * self._block_bytes)
            for _ in range(2 * geometry.num_layers)
        ]
        self._num_layers = geometry.num_layers
        self._ort, _ = import_library("gpu")
        self._options = self._ort.RunOptions()  # not to wait at the end of a run
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._loose = self._binding(np.zeros(3, np.int32))
        self._graphs = CapturedGraphs[Layout](device)
        self._num_launched = 0
        device.synchronize()

    @property
    def num_graphs(self) -> int:
        """How many sizes of steps have been captured so far."""
        return self._graphs.num_captured

    def launch(self, chunks: Seq[Chunk]) -> InFlight:
        """See ``Runner.launch``."""
        self._device.use()
        stage = self._stages[self._num_launched % STAGES]
        self._num_launched += 1
        step = self._batch.build(chunks, stage.memory)
        self._sampler.prepare([chunk.seq for chunk in chunks if chunk.seq.edited and chunk.samples])
        self._device.upload(self._inputs, stage.memory[: step.layout.num_bytes])
        if step.decodes:
            self._decode(step.layout, step.metadata)
        else:
            self._run(self._loose, step.layout, step.metadata)
        if step.num_sampled:
            self._masks.queue(chunks)  # while the graph runs
            rows = self._inputs + step.layout.arrays["rows"][0]
            self._sampler.sample(self._logits, rows, self._masks.address, step.num_sampled)
        self._device.download(stage.tokens[: step.num_sampled], self._sampler.tokens)
        is_scored = any(chunk.seq.scored for chunk in chunks)
        num_top = self._scores.queue(step, stage) if is_scored else 0
        self._device.record(stage.event)
        return InFlight(self._device, stage, step, num_top, is_scored=is_scored)

    def clean(self, seq: Sequence) -> None:
        """See ``Runner.clean``; blocks that others share are theirs."""
        self._device.use()
        for block in self._cache.own_blocks(seq):
            for pool in self._pools:
                self._device.zero(pool + block * self._block_bytes, self._block_bytes)

    def close(self) -> None:
        """See ``Runner.close``."""
        self._device.use()
        with suppress(BackendError):
            self._device.synchronize()
        del self._loose, self._session
        self._device.close()

    def _decode(self, layout: Layout, metadata: npt.NDArray[np.int32]) -> None:
        """Launch the graph of a size; the first time it runs as it is, and is captured after."""
        if self._graphs.launch(layout):
            return
        # A captured binding is its graph's own; a size that can't be captured needs none.
        binding = self._loose if self._graphs.refused(layout) else self._binding(metadata)
        queue = partial(self._run, binding, layout, metadata)
        queue()
        self._graphs.capture(layout, queue, layout.num_rows)

    def _run(self, binding: _Binding, layout: Layout, metadata: npt.NDArray[np.int32]) -> None:
        """Queue the kernels of a step whose arrays are on the device."""
        binding.metadata[:] = metadata
        places = {name: self._inputs + place[0] for name, place in layout.arrays.items()}
        places["input_ids"] = self._input_ids
        self._sampler.feed(places["given"], self._input_ids, layout.num_tokens)
        shapes = {name: place[2] for name, place in layout.arrays.items()}
        shapes["input_ids"] = shapes["given"]
        ordinal, io = self._device.ordinal, binding.io
        for spec in PAGED.inputs[:-1]:
            kind = _ONNX_TYPES[spec.dtype]
            io.bind_input(spec.name, "cuda", ordinal, kind, shapes[spec.name], places[spec.name])
        kind = _ONNX_TYPES[self._dialect.logits_dtype]
        shape = (layout.num_logits, self._vocab_size)
        io.bind_output(self._dialect.logits.name, "cuda", ordinal, kind, shape, self._logits)
        try:
            self._session._sess.run_with_iobinding(io._iobinding, self._options)
        except Exception as error:
            raise BackendError(f"the graph failed: {error}") from error

    def _binding(self, metadata: npt.NDArray[np.int32]) -> _Binding:
        """A binding whose cache is bound; the rest is bound when it runs."""
        io, ordinal = self._session.io_binding(), self._device.ordinal
        kind = _ONNX_TYPES[self._dialect.cache_dtype]
        inputs = self._dialect.cache_inputs(self._num_layers)
        outputs = self._dialect.cache_outputs(self._num_layers)
        for pool, past, present in zip(self._pools, inputs, outputs, strict=True):
            io.bind_input(past.name, "cuda", ordinal, kind, self._cells, pool)
            io.bind_output(present.name, "cuda", ordinal, kind, self._cells, pool)
        own = metadata.copy()
        value = self._ort.OrtValue.ortvalue_from_numpy(own)  # shares the array's memory
        io.bind_ortvalue_input(PAGED.inputs[-1].name, value)
        return _Binding(io, own, value)


@dataclass(frozen=True, slots=True)
class _Binding:
    """An IO binding, and the array behind its one input in CPU memory."""

    io: Any
    metadata: npt.NDArray[np.int32]
    value: Any
