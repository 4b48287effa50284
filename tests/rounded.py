"""A small model whose weights are rounded for the CPU, and its numpy reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tests.numpy_llama import Floats, NumpyLlama

if TYPE_CHECKING:
    from llama_decoder.config import LlamaConfig

ZERO_POINT = 128
NORM_STEP = float(np.float32(3.9 / 127))  # as the graph has it
BEHIND_NORMS = ("qkv_proj.weight", "gate_proj.weight", "up_proj.weight")
OFFSETS_SEED = 1  # with which some guesses of the law of company are right


class RowMatrix:
    """A matrix of signed bytes [N, K] that rows of unsigned bytes are multiplied with.

    Stands where ``NumpyLlama`` has an array: as ``x @ matrix.T``, and as a table of rows.

    Args:
        codes: of the matrix.
        scales: of its rows, [N].
        step: what a step of the activations stands for; None for a 127th of a row's largest.
        turn: what activations are multiplied with first, [K, K].
    """

    __array_ufunc__ = None  # so that numpy leaves x @ matrix to this class

    def __init__(
        self,
        codes: npt.NDArray[np.int8],
        scales: npt.NDArray[np.float32],
        step: float | None = None,
        turn: npt.NDArray[np.floating[Any]] | None = None,
    ) -> None:
        self._codes, self._scales = codes.astype(np.int64), scales.astype(np.float64)
        self._step, self._turn = step, turn

    @property
    def T(self) -> RowMatrix:  # noqa: N802  as numpy calls it
        """What a product reads."""
        return self

    def __getitem__(self, rows: Sequence[int]) -> Floats:
        return np.asarray(self._codes[rows] * self._scales[rows, None])

    def __rmatmul__(self, x: Floats) -> Floats:
        if self._turn is not None:
            x = x @ self._turn
        steps: Any = self._step or np.abs(x).max(axis=1, keepdims=True) / (ZERO_POINT - 1)
        codes = np.clip(np.rint(x / steps) + ZERO_POINT, 0, 255).astype(np.int64) - ZERO_POINT
        return np.asarray((codes @ self._codes.T) * steps * self._scales)


class BlockMatrix:
    """A matrix in blocks of codes, for which blocks of activations are rounded to signed bytes.

    Its blocks may have offsets, which are multiplied with activations that aren't rounded.
    """

    __array_ufunc__ = None

    def __init__(self, values: Floats, block: int, offsets: Floats | None = None) -> None:
        self._values, self._block, self._offsets = values, block, offsets

    @property
    def T(self) -> BlockMatrix:  # noqa: N802  as numpy calls it
        """What a product reads."""
        return self

    def __getitem__(self, rows: Sequence[int]) -> Floats:
        return np.asarray(self._values[rows])

    def __rmatmul__(self, x: Floats) -> Floats:
        blocks = x.reshape(len(x), -1, self._block)
        steps = np.abs(blocks).max(axis=2, keepdims=True) / 127
        steps[steps == 0] = 1
        product = (np.rint(blocks / steps) * steps).reshape(x.shape) @ self._values.T
        if self._offsets is not None:
            product = product + blocks.sum(axis=2) @ self._offsets.T
        return np.asarray(product)


@dataclass(frozen=True)
class Rounded:
    """What ``write_rounded`` made.

    Attributes:
        graph: the ONNX file.
        config: the model's numbers.
        reference: computes what the graph must.
        exact: the same model before it was rounded.
    """

    graph: Path
    config: LlamaConfig
    reference: NumpyLlama
    exact: NumpyLlama


def write_rounded(
    directory: Path,
    config: LlamaConfig,
    name: str,
    *,
    block: int | None = None,
    kv_cache: str = "same",
    offsets: bool = False,
    seed: int = 3,
    no_numbers: Sequence[int] = (),
) -> Rounded:
    """Write a graph of random weights, rounded to the nearest, and its weight file.

    Args:
        directory: an existing one.
        config: of the model.
        name: of the precision.
        block: see ``choose_precision``.
        kv_cache: see ``choose_precision``; the reference keeps a float cache.
        offsets: whether blocks of the layers have offsets, as those of GGUF's Q4_1.
        seed: of the weights.
        no_numbers: tokens whose embedding is NaN, where codes allow that.
    """
    from llama_decoder.decoder import rope_buffers
    from llama_decoder.tiny import random_weights
    from llama_decoder.weights import parameter_shapes
    from llama_export.host_pieces import host_pieces
    from llama_export.precision import PRODUCTS
    from llama_export.precisions import choose_precision
    from llama_export.trace import save_graph, trace_skeleton
    from llama_export.weight_file import weight_regions, write_weights
    from tests.int8_cache import huggingface_names

    precision = choose_precision("cpu", name, kv_cache, block)
    if offsets:
        layers = [n for n in parameter_shapes(config) if n.endswith(PRODUCTS)]
        precision = replace(precision, offset=frozenset(layers))
    weights = random_weights(config, seed)
    tables = [(table_name, table.numpy()) for table_name, table in rope_buffers(config)]
    layout = precision.layout(config)
    pieces = dict(host_pieces(config, precision, lambda: iter(weights.items()), tables, None))
    stored = precision.host_weights(config)
    generator = np.random.default_rng(OFFSETS_SEED)
    for parameter in sorted(precision.offset):  # the same numbers in every process
        place = f"{parameter}.offsets"
        pieces[place] = generator.normal(0, 0.02, layout[place].shape).astype(np.float32)
    if no_numbers and stored is not None:
        _, scales = stored.names("model.embed_tokens.weight")[:2]
        pieces[scales] = pieces[scales].copy()
        pieces[scales][list(no_numbers)] = np.nan
    path = directory / "model.safetensors"
    for _ in write_weights(path, layout, _finite(pieces, layout)):
        pass
    if no_numbers and stored is not None:
        _overwrite(path, weight_regions(layout)[scales].offset, pieces[scales])
    save_graph(
        trace_skeleton(config, precision),
        directory / "decoder.onnx",
        path.name,
        weight_regions(layout),
    )
    numbers = _matrices(weights, pieces, stored)
    named = huggingface_names(config)
    exact = {parameter: array.astype(np.float64) for parameter, array in weights.items()}
    return Rounded(
        directory / "decoder.onnx",
        config,
        NumpyLlama(named, numbers or exact),
        NumpyLlama(named, exact),
    )


def _matrices(weights: Mapping[str, Any], pieces: Mapping[str, Any], stored: Any) -> dict[str, Any]:
    """What stands where ``NumpyLlama`` has arrays; empty if nothing of the weights is rounded."""
    from llama_decoder.names import EMBEDDING
    from llama_export.host_weights import Int8Weights
    from llama_export.quantise.codes import unpack

    numbers: dict[str, Any] = {}
    for parameter, array in weights.items():
        if array.ndim == 1:
            numbers[parameter] = pieces.get(parameter, array).astype(np.float64)
        elif isinstance(stored, Int8Weights):
            codes_name, scales_name = stored.names(parameter)
            is_table = parameter == EMBEDDING
            codes = pieces[codes_name] if is_table else pieces[codes_name].T
            numbers[parameter] = RowMatrix(
                codes,
                pieces[scales_name],
                NORM_STEP if parameter.endswith(BEHIND_NORMS) else None,
                pieces.get("lm_head.turn") if is_table else _inner_turn(parameter, array.shape[1]),
            )
        elif stored is not None:
            packed, scales, zero_points = (pieces[part] for part in stored.names(parameter))
            product = unpack(packed, scales, zero_points, stored.bits(parameter), array.shape[1])
            added = pieces.get(f"{parameter}.offsets")
            numbers[parameter] = BlockMatrix(
                product.dequantise().astype(float),
                stored.block,
                None if added is None else added.T.astype(float),
            )
    return {} if stored is None else numbers


def _inner_turn(parameter: str, columns: int) -> Floats | None:
    """What rows that go into down are multiplied with, each 64 of them or fewer."""
    if not parameter.endswith("down_proj.weight"):
        return None
    size = min(64, columns & -columns)
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return np.kron(np.eye(columns // size), np.array(signs) / np.sqrt(size))


def _finite(pieces: Mapping[str, Any], layout: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """What the writer takes: it refuses what isn't a number."""
    for name in layout:
        piece = pieces[name]
        yield name, np.nan_to_num(piece) if piece.dtype == np.float32 else piece


def _overwrite(path: Path, offset: int, values: npt.NDArray[np.float32]) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(values.tobytes())
