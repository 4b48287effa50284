"""TensorRT on a CUDA device: the ``tensorrt`` dialect, steps queued one behind the other.

As in ``ort_cuda``, a step is a copy to the device, the engine's kernels and the sampler's, and a
copy back, all on one stream, and the next one takes its tokens from where the sampler left them.
Steps that decode run over the lowest slots and are captured by size; a step that reads a prompt
runs over one slot, at that slot's own address.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import suppress
from functools import partial

from llama_runtime.backends.captured_graphs import CapturedGraphs
from llama_runtime.backends.cuda_device import Device
from llama_runtime.backends.cuda_masks import CudaMasks
from llama_runtime.backends.cuda_sampler import CudaSampler
from llama_runtime.backends.cuda_scores import CudaScores
from llama_runtime.backends.cuda_stage import STAGES, InFlight, Stage
from llama_runtime.backends.tensorrt_context import BoundContext, Contexts
from llama_runtime.chunk import Chunk
from llama_runtime.contract import TENSORRT, DType, Geometry
from llama_runtime.errors import BackendError
from llama_runtime.sequence import Sequence
from llama_runtime.slot_batch import ALIGNMENT, SlotBatch, SlotLayout
from llama_runtime.tensorrt.limits import DECODE, PROMPT, EngineLimits

ITEM_BYTES: dict[DType, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


class TensorRtRunner:
    """See ``Runner``.

    Args:
        contexts: of the engine; this owns and closes them.
        geometry: the model's numbers.
        limits: what the engine was built for.
        device: this owns and closes it.
        sampler: on that device, for as many rows as ``max_rows`` says.
        dtype: of activations, and of keys and values.

    Raises:
        BackendError: device memory is short.
        ValueError: the slots of a cache of this shape don't lie where TensorRT can read them.
    """

    overlaps = True
    verifies = False

    def __init__(
        self,
        contexts: Contexts,
        geometry: Geometry,
        limits: EngineLimits,
        device: Device,
        sampler: CudaSampler,
        *,
        dtype: DType,
    ) -> None:
        device.use()
        self._device = device
        self._contexts = contexts
        self._sampler = sampler
        self._dialect = TENSORRT.typed(dtype)
        self._batch = batch = SlotBatch(
            num_slots=limits.max_batch,
            capacity=limits.capacity,
            max_chunk=limits.max_chunk,
            max_logits=limits.max_logits,
            vocab_size=geometry.vocab_size,
        )
        self._slot_shape = (geometry.num_kv_heads, limits.capacity, geometry.head_dim)
        cells = geometry.num_kv_heads * limits.capacity * geometry.head_dim
        self._slot_bytes = cells * ITEM_BYTES[dtype]
        if self._slot_bytes % ALIGNMENT:
            raise ValueError(
                f"a slot of {self._slot_bytes} bytes is no multiple of {ALIGNMENT}: "
                "round the capacity up"
            )
        self._inputs = device.allocate(batch.num_bytes)
        self._input_ids = device.allocate(8 * batch.num_tokens)
        self._logits = device.allocate(ITEM_BYTES[dtype] * batch.num_logits * geometry.vocab_size)
        self._masks = CudaMasks(device, geometry.vocab_size, batch.num_logits)
        self._scores = CudaScores(device, sampler, self._logits, batch.num_logits)
        self._stages = [Stage(device, batch) for _ in range(STAGES)]
        # Zero, because attention multiplies by 0 what lies behind a slot's tokens.
        self._pools = [
            device.allocate(limits.max_batch * self._slot_bytes)
            for _ in range(2 * geometry.num_layers)
        ]
        past = [spec.name for spec in self._dialect.cache_inputs(geometry.num_layers)]
        present = [spec.name for spec in self._dialect.cache_outputs(geometry.num_layers)]
        self._cache = list(zip(past, present, self._pools, strict=True))
        self._prompt = self._context(PROMPT)
        # A graph holds what its context had when it was captured, and TensorRT leaves it open what
        # becomes of it if the context is used for other shapes: so each size has one of its own.
        self._decoding: dict[SlotLayout, BoundContext] = {}
        self._graphs = CapturedGraphs[SlotLayout](device)
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
        step = self._batch.build(chunks, stage.memory)
        self._num_launched += 1
        self._sampler.prepare([chunk.seq for chunk in chunks if chunk.seq.edited and chunk.samples])
        self._device.upload(self._inputs, stage.memory[: step.layout.num_bytes])
        if step.slot is None:
            self._decode(step.layout)
        else:
            self._run(self._prompt, step.layout, step.slot)
        if step.num_sampled:
            self._masks.queue(chunks)  # while the engine runs
            rows = self._inputs + step.layout.arrays["rows"][0]
            self._sampler.sample(self._logits, rows, self._masks.address, step.num_sampled)
        self._device.download(stage.tokens[: step.num_sampled], self._sampler.tokens)
        is_scored = any(chunk.seq.scored for chunk in chunks)
        num_top = self._scores.queue(step, stage) if is_scored else 0
        self._device.record(stage.event)
        return InFlight(self._device, stage, step, num_top, is_scored=is_scored)

    def clean(self, seq: Sequence) -> None:
        """See ``Runner.clean``."""
        if seq.slot is None:
            raise RuntimeError(f"sequence {seq.id} has no slot to clean")
        self._device.use()
        for pool in self._pools:
            self._device.zero(pool + seq.slot * self._slot_bytes, self._slot_bytes)

    def close(self) -> None:
        """See ``Runner.close``."""
        self._device.use()
        with suppress(BackendError):
            self._device.synchronize()
        for context in (self._prompt, *self._decoding.values()):
            context.close()  # before their engine, as TensorRT asks
        self._contexts.close()
        self._device.close()

    def _decode(self, layout: SlotLayout) -> None:
        """Launch the graph of a size; the first time it runs as it is, and is captured after."""
        if self._graphs.launch(layout):
            return
        if layout not in self._decoding:
            self._decoding[layout] = self._context(DECODE)
        context = self._decoding[layout]
        queue = partial(self._run, context, layout, 0)
        queue()
        self._graphs.capture(layout, queue, layout.num_rows)

    def _run(self, context: BoundContext, layout: SlotLayout, slot: int) -> None:
        """Queue the kernels of a step whose arrays are on the device.

        Args:
            context: of the step's profile.
            layout: the step's sizes.
            slot: the first one of its rows.
        """
        places = {name: self._inputs + place[0] for name, place in layout.arrays.items()}
        places["input_ids"] = self._input_ids
        shapes = {name: place[2] for name, place in layout.arrays.items()}
        shapes["input_ids"] = shapes["given"]
        self._sampler.feed(places["given"], self._input_ids, layout.num_tokens)
        for spec in self._dialect.inputs:
            context.shape(spec.name, shapes[spec.name])
            context.bind(spec.name, places[spec.name])
        for past, present, pool in self._cache:
            context.shape(past, (layout.num_rows, *self._slot_shape))
            context.bind(past, pool + slot * self._slot_bytes)
            context.bind(present, pool + slot * self._slot_bytes)
        context.run()

    def _context(self, profile: int) -> BoundContext:
        """A context whose logits are bound; the rest is bound when it runs."""
        context = BoundContext(self._contexts.create(), profile, self._device)
        context.bind(self._dialect.logits.name, self._logits)
        return context


def max_rows(limits: EngineLimits) -> int:
    """The most rows of logits of a step."""
    return max(limits.max_batch, limits.max_logits)
