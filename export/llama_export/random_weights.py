"""Made-up weights in the shape of a published model: for measuring speed without a download.

Every block of rows has a generator of its own, so the bytes are the same whatever the number of
threads that fill the blocks, and nothing is in memory but the blocks in work.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llama_decoder.config import LlamaConfig
from llama_decoder.shapes import SHAPES
from llama_decoder.weights import parameter_shapes
from llama_export.errors import ExportError
from llama_export.precision import row_blocks
from llama_export.source_tokenizer import SourceTokenizer
from llama_runtime.machine import default_threads

END = "<|end|>"
RECIPE = "Caravan random weights 1: PCG64 by (seed, parameter, block), norms 1 + 0.1 z, z/sqrt(K)"
MAX_SEED = 2**63 - 1
_LOOK_AHEAD = 2  # blocks a thread that are made before they are asked for

Result = TypeVar("Result")


def random_shape(name: str) -> LlamaConfig:
    """The configuration of a published model.

    Raises:
        ExportError: there is none of that name; lists those that there are.
    """
    if name not in SHAPES:
        raise ExportError(
            f"there is no shape {name!r:.80}; random weights can have that of {', '.join(SHAPES)}"
        )
    return SHAPES[name]


def describe_random(config: LlamaConfig, seed: int) -> str:
    """A text that is the same for the same weights and no others."""
    return f"{RECIPE}\n{json.dumps(asdict(config), sort_keys=True)}\nseed {seed}\n"


def random_blocks(
    config: LlamaConfig,
    seed: int,
    use: Callable[[str, NDArray[np.float32]], Result],
    num_threads: int | None = None,
) -> Iterator[tuple[str, Result]]:
    """Make every parameter, block by block, and let ``use`` turn each block into something else.

    Norms are near 1; a matrix has the standard deviation 1/sqrt(columns), so that activations keep
    their size, and the embedding too.

    Args:
        config: the shape.
        seed: 0 or more; the same seed gives the same weights.
        use: gets a parameter's name and some of its rows, float32, on one of the threads.
        num_threads: how many work; all that the process may use by default.

    Yields:
        The parameter's name and what ``use`` made of its next block, in the decoder's order.
    """
    threads = num_threads or default_threads()

    def make(name: str, index: int, block: int, shape: tuple[int, ...]) -> Result:
        return use(name, _random_rows(np.random.default_rng((seed, index, block)), shape))

    waiting: deque[tuple[str, Future[Result]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="random-weights") as pool:
        try:
            for index, (name, shape) in enumerate(parameter_shapes(config).items()):
                for block, (_, rows) in enumerate(row_blocks(shape)):
                    waiting.append(
                        (name, pool.submit(make, name, index, block, (rows, *shape[1:])))
                    )
                    if len(waiting) > _LOOK_AHEAD * threads:
                        yield _first(waiting)
            while waiting:
                yield _first(waiting)
        finally:
            pool.shutdown(cancel_futures=True)


def random_parameters(config: LlamaConfig, seed: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every parameter in float32 and whole, for the decoder."""
    shapes = parameter_shapes(config)
    blocks = random_blocks(config, seed, lambda _, rows: rows)
    for name, shape in shapes.items():
        value = np.empty(shape, np.float32)
        for start, count in row_blocks(shape):
            value[start : start + count] = next(blocks)[1]
        yield name, value


def random_tokenizer(vocab_size: int) -> SourceTokenizer:
    """A tokenizer of bytes that knows every id: bytes, fillers and the end.

    Args:
        vocab_size: V, more than 256.

    Returns:
        Ids 0 to 255 are bytes, V - 1 ends a text, and those between are texts that nothing encodes
        to, such as ``<|filler_300|>``.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"<|filler_{i}|>" for i in range(len(alphabet), vocab_size - 1)]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *fillers, END])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return SourceTokenizer(
        tokenizer_json=tokenizer.to_str().encode(),
        generation_config={"eos_token_id": [vocab_size - 1]},
        chat_template=None,
        special_tokens={"eos_token": END},
    )


def _random_rows(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    values = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        values *= np.float32(0.1)
        values += np.float32(1)
    else:
        values *= np.float32(1 / np.sqrt(shape[-1]))
    return values


def _first(waiting: deque[tuple[str, Future[Result]]]) -> tuple[str, Result]:
    name, future = waiting.popleft()
    return name, future.result()
