"""Sampling on the device: rows of logits become tokens where they lie, for the next step too."""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from collections.abc import Sequence as Seq
from importlib.resources import files

import numpy as np
import numpy.typing as npt

from llama_runtime.backends.cuda_compiler import machine_code
from llama_runtime.backends.cuda_device import Device, Kernel
from llama_runtime.contract import DType
from llama_runtime.sequence import Sequence
from llama_runtime.stopping import end_token_ids

THREADS = 1024  # of a block, as sampler.cu has it
IN_PROMPT = 0x8000  # of a count, likewise
COUNT_BYTES, BIAS_BYTES = 2, 4  # of each token of the vocabulary, for each slot
_DEFINES = {"float16": ["FLOAT16"], "bfloat16": ["BFLOAT16"], "float32": []}
_KERNELS = ("sample", "score", "feed", "scatter_bias", "scatter_counts")


class CudaSampler:
    """The kernels of ``sampler.cu`` and the memory that they keep from step to step.

    For each slot there are its newest token, how often each token is in its prompt and completion,
    and what is added to each logit; the last two are read only for sequences that ask for it.

    Args:
        device: where the logits are.
        dtype: of the logits.
        vocab_size: V.
        num_slots: B.
        max_rows: the most rows of logits of a step.
        eos_token_ids: every end token of the model.

    Attributes:
        tokens: address of the sampled tokens, int32 [max_rows].
    """

    def __init__(
        self,
        device: Device,
        dtype: DType,
        *,
        vocab_size: int,
        num_slots: int,
        max_rows: int,
        eos_token_ids: Collection[int],
    ) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        source = files("llama_runtime.backends").joinpath("kernels/sampler.cu").read_text("utf-8")
        # The sum of all weights must fit 64 bits, whatever the vocabulary.
        defines = [*_DEFINES[dtype], f"SCALE_BITS={62 - vocab_size.bit_length()}"]
        binary = machine_code(source, device.capability, defines)
        self._sample, self._score, self._feed, self._scatter_bias, self._scatter_counts = (
            device.load(binary, _KERNELS)
        )
        self.tokens = device.allocate(4 * max_rows)
        self._next = device.allocate(4 * num_slots)
        self._counts = device.allocate(COUNT_BYTES * num_slots * vocab_size)
        self._bias = device.allocate(BIAS_BYTES * num_slots * vocab_size)
        self._scratch = device.allocate(8 * vocab_size, zero=False)  # ids, then values
        self._edited: dict[int, Sequence] = {}  # by slot
        self._masked: dict[Sequence, list[int]] = {}  # end tokens that may not come yet

    def prepare(self, seqs: Seq[Sequence]) -> None:
        """Queue what the kernels must know of sequences whose logits are changed.

        Source copies are of ordinary memory, which CUDA has read when the call returns.
        """
        for seq in seqs:
            if not seq.edited or seq.slot is None:
                continue
            if self._edited.get(seq.slot) is not seq:
                self._begin(seq, seq.slot)
            if seq in self._masked and seq.draw_index >= seq.params.min_tokens:
                bias, ids = seq.params.logit_bias or {}, self._masked.pop(seq)
                self._write_bias(seq.slot, ids, [bias.get(i, 0.0) for i in ids])

    def feed(self, given: int, input_ids: int, size: int) -> None:
        """Queue that int32 ``given`` becomes int64 ``input_ids``, newest tokens put in."""
        blocks = -(-size // THREADS)
        self._feed.launch(
            blocks, THREADS, _pointer(given), _pointer(self._next), _pointer(input_ids), _int(size)
        )

    def sample(self, logits: int, rows: int, masks: int, num_rows: int) -> None:
        """Queue that each row of logits becomes a token, as ``rows`` says (``step_arrays.ROW``).

        Args:
            logits: their address.
            rows: address of the ``ROW`` of each.
            masks: address of uint32 [num_rows, ceil(V / 32)], the tokens that may come next; read
                for masked rows only.
            num_rows: how many.
        """
        self._sample.launch(
            num_rows,
            THREADS,
            _pointer(logits),
            _pointer(rows),
            _pointer(masks),
            _pointer(self._bias),
            _pointer(self._counts),
            _int(self._vocab_size),
            _pointer(self._next),
            _pointer(self.tokens),
        )

    def score(
        self, logits: int, rows: int, wanted: int, num_rows: int, num_top: int, to: Seq[int]
    ) -> None:
        """Queue log-probabilities of one token of some rows, and of the likeliest beside it.

        Args:
            logits: their address.
            rows: address of int32 [num_rows], which ones.
            wanted: address of int32 [num_rows], the token of each; -1 for the sampled one.
            num_rows: how many.
            num_top: how many of the likeliest.
            to: addresses of float64 [num_rows], int32 [num_rows, num_top] and float64 of the same.
        """
        self._score.launch(
            num_rows,
            THREADS,
            _pointer(logits),
            _pointer(rows),
            _pointer(wanted),
            _pointer(self.tokens),
            _int(self._vocab_size),
            _int(num_top),
            *(_pointer(address) for address in to),
        )

    def _begin(self, seq: Sequence, slot: int) -> None:
        """Fill the tables of a slot for a sequence that begins to sample there."""
        size, params = self._vocab_size, seq.params
        self._device.zero(self._counts + COUNT_BYTES * size * slot, COUNT_BYTES * size)
        self._device.zero(self._bias + BIAS_BYTES * size * slot, BIAS_BYTES * size)
        previous = self._edited.get(slot)
        if previous is not None:
            self._masked.pop(previous, None)
        self._edited[slot] = seq
        if seq.counts is not None:
            ids = seq.counts.token_ids
            in_prompt = np.isin(ids, seq.token_ids[: seq.num_prompt_tokens])
            values = (in_prompt * IN_PROMPT + seq.counts.in_completion).astype(np.int32)
            self._upload(ids.astype(np.int32), values)
            table = self._counts + COUNT_BYTES * size * slot
            self._scatter(self._scatter_counts, table, len(ids))
        if params.logit_bias:
            self._write_bias(slot, list(params.logit_bias), list(params.logit_bias.values()))
        if seq.draw_index < params.min_tokens:
            ends = [i for i in end_token_ids(seq, self._eos_token_ids) if i < size]
            self._masked[seq] = ends
            self._write_bias(slot, ends, [-np.inf] * len(ends))

    def _write_bias(self, slot: int, ids: Seq[int], values: Seq[float]) -> None:
        if ids:
            self._upload(np.array(ids, np.int32), np.array(values, np.float32))
            table = self._bias + BIAS_BYTES * self._vocab_size * slot
            self._scatter(self._scatter_bias, table, len(ids))

    def _upload(self, ids: npt.NDArray[np.int32], values: npt.NDArray[np.generic]) -> None:
        self._device.upload(self._scratch, ids)
        self._device.upload(self._scratch + 4 * self._vocab_size, values)

    def _scatter(self, kernel: Kernel, table: int, size: int) -> None:
        values = self._scratch + 4 * self._vocab_size
        kernel.launch(
            -(-size // THREADS),
            THREADS,
            _pointer(table),
            _pointer(self._scratch),
            _pointer(values),
            _int(size),
        )


def _pointer(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)


def _int(value: int) -> ctypes.c_int:
    return ctypes.c_int(value)
