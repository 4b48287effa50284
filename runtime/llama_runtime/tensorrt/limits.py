"""What an engine is built for: the sizes that its optimization profiles hold.

There are two profiles. Decoding runs one token of each of the lowest slots; a prompt runs one chunk
of one sequence, whose slot is bound at its own address. Shape letters are those of
``llama_runtime.contract``.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama_runtime.contract import MIN_CHUNK, TENSORRT, Geometry

DECODE, PROMPT = 0, 1  # the profiles, by index

# With less, TensorRT-RTX 1.7.1 can't build graphs in bf16: an internal error about two operators of
# one name. With 128 and more all of some fifty combinations were built.
LEAST_CAPACITY = 128
MAX_PROMPT_CHUNK = 512
CAPACITY_MULTIPLE = 16

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # least, usual and largest shape


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The sizes of an engine.

    Attributes:
        max_batch: B, sequences that run at once.
        max_len: the most tokens of one sequence, prompt and completion.
    """

    max_batch: int
    max_len: int

    @property
    def capacity(self) -> int:
        """C, which is fixed in an engine; such that every slot begins where TensorRT can read."""
        return max(-(-self.max_len // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE, LEAST_CAPACITY)

    @property
    def max_chunk(self) -> int:
        """S, the most prompt tokens of a step."""
        return min(self.capacity, MAX_PROMPT_CHUNK)

    @property
    def max_logits(self) -> int:
        """R in a step of a prompt, of which some rows may be scored."""
        return MIN_CHUNK

    def profiles(self, geometry: Geometry) -> tuple[dict[str, Range], dict[str, Range]]:
        """The shapes of every input, for decoding and for a prompt."""
        batch, chunk = self.max_batch, self.max_chunk
        usual = max(1, batch // 2)
        decode = {
            **dict.fromkeys(("N", "R", "B"), (1, usual, batch)),
            "S": (1, 1, 1),
        }
        prompt = {
            "N": (1, chunk // 2, chunk),
            "R": (1, 1, self.max_logits),
            "B": (1, 1, 1),
            "S": (1, chunk // 2, chunk),
        }
        fixed = {"K": geometry.num_kv_heads, "C": self.capacity, "D": geometry.head_dim}
        inputs = (*TENSORRT.inputs, *TENSORRT.cache_inputs(geometry.num_layers))
        profiles = []
        for sizes in (decode, prompt):
            sizes |= {axis: (size,) * 3 for axis, size in fixed.items()}
            profiles.append(
                {
                    spec.name: tuple(tuple(sizes[axis][i] for axis in spec.axes) for i in range(3))
                    for spec in inputs
                }
            )
        return profiles[DECODE], profiles[PROMPT]  # type: ignore[return-value]
