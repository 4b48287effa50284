"""What the steps of both GPU dialects share: arrays in one piece of memory, and rows to sample.

The arrays go to the device in a single copy, so where each lies in that piece is known here and
there alike. Shape letters are those of ``llama_runtime.contract``.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from llama_runtime.chunk import Chunk
from llama_runtime.sampling import sampling_kind
from llama_runtime.sequence import Sequence

Bytes = npt.NDArray[np.uint8]
Shapes = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]

ALIGNMENT = 16  # bytes, of each array

# Of a row of logits, as ``kernels/sampler.cu`` has it: which slot's, and how its token is drawn.
GREEDY, FILTERED, EDITED, MASKED = 1, 2, 4, 8
ROW = np.dtype(
    [
        ("slot", "i4"),  # -1: nobody's
        ("flags", "i4"),
        ("inverse_temperature", "f4"),
        ("top_k", "i4"),
        ("top_p", "f8"),
        ("min_p", "f4"),
        ("repetition", "f4"),
        ("frequency", "f4"),
        ("presence", "f4"),
        ("seed", "u8"),
        ("sample", "u8"),
        ("index", "u8"),
    ]
)
MAX_INVERSE_TEMPERATURE = np.finfo(np.float32).max  # times a distance of 0 it must stay 0


class StepArrays:
    """Where the arrays of a step lie in one piece of memory, for those who say which there are.

    ``given`` stands for ``input_ids``: a token id, or -1 - slot for the newest token of a slot,
    which only the device knows. ``rows`` says how each row of logits is sampled.
    """

    alignment: ClassVar[int] = ALIGNMENT

    @property
    def shapes(self) -> Shapes:
        """Type and shape of each array, by the contract's names, in the order they lie in."""
        raise NotImplementedError

    @cached_property
    def arrays(self) -> dict[str, tuple[int, np.dtype[Any], tuple[int, ...]]]:
        """Offset in bytes, type and shape of each array, by name."""
        places, offset = {}, 0
        for name, (dtype, shape) in self.shapes.items():
            places[name] = (offset, dtype, shape)
            size = dtype.itemsize * int(np.prod(shape))
            offset += -(-size // self.alignment) * self.alignment
        return places

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all arrays together."""
        *_, (offset, dtype, shape) = self.arrays.values()
        return offset + dtype.itemsize * int(np.prod(shape))

    def views(self, memory: Bytes) -> dict[str, npt.NDArray[Any]]:
        """The arrays in a piece of memory, by name."""
        return {
            name: memory[offset : offset + dtype.itemsize * int(np.prod(shape))]
            .view(dtype)
            .reshape(shape)
            for name, (offset, dtype, shape) in self.arrays.items()
        }


def row_of(seq: Sequence, vocab_size: int) -> npt.NDArray[np.void]:
    """How the tokens of a sequence are drawn, as ``ROW``; ``index`` is each step's own."""
    params = seq.params
    kind = sampling_kind(params)
    flags = (GREEDY if kind == 0 else 0) | (FILTERED if kind == 2 else 0)
    row = np.zeros((), ROW)
    row["slot"] = seq.slot
    row["flags"] = flags | (EDITED if seq.edited else 0) | (MASKED if seq.matcher else 0)
    if kind:
        inverse = min(1 / params.temperature, float(MAX_INVERSE_TEMPERATURE))
        row["inverse_temperature"] = inverse
    row["top_k"] = min(params.top_k or vocab_size, vocab_size)
    row["top_p"], row["min_p"] = params.top_p, params.min_p
    row["repetition"] = params.repetition_penalty
    row["frequency"], row["presence"] = params.frequency_penalty, params.presence_penalty
    row["seed"], row["sample"] = seq.seed, seq.sample
    return row


def row_buckets(num_slots: int) -> list[int]:
    """How many rows a step that decodes may be padded to, up to ``num_slots``.

    1, 2, 4, 8, and from there on by a half or a third more each: 16, 24, 32, 48, 64, 96, 128, and
    so on to 256. Larger steps are bound by arithmetic, padded rows included, so these are multiples
    of 128.
    """
    buckets, rows = [], 1
    while rows < num_slots:
        buckets.append(rows)
        rows += rows if rows < 8 else min(max(8, 1 << (rows.bit_length() - 2)), 128)
    return [*buckets, num_slots]


def given_tokens(chunk: Chunk) -> list[int]:
    """The tokens of a chunk; -1 - slot for one that only the device knows."""
    seq, start = chunk.seq, chunk.seq.cache_len
    known = seq.token_ids[start : start + chunk.num_tokens]
    return known if len(known) == chunk.num_tokens else [*known, -1 - (seq.slot or 0)]
