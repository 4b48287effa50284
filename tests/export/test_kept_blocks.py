"""What a GGUF file holds in blocks goes into the bundle as it is, to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llama_decoder.checkpoint import open_checkpoint
from llama_decoder.decoder import rope_buffers
from llama_decoder.errors import CheckpointError
from llama_decoder.names import EMBEDDING, HEAD
from llama_export.host_pieces import host_pieces
from llama_export.host_weights import BlockWeights
from llama_export.precision import Precision
from llama_export.precisions import choose_precision
from llama_export.quantise.codes import unpack
from llama_export.sources import CheckpointSource
from llama_export.trace import save_graph, trace_skeleton
from llama_export.weight_file import weight_regions, write_weights
from llama_runtime.backends.ort_cpu import OrtCpu, open_session
from tests.decoder.test_gguf import CONFIG, converted, stored, write
from tests.export.test_host_passes import prompt
from tests.int8_cache import huggingface_names
from tests.numpy_llama import NumpyLlama
from tests.rounded import BlockMatrix

MIXES = {
    "Q4_0": {},
    "Q8_0": {},
    "Q4_0, tables in Q6_K": {"token_embd.weight": "Q6_K", "output.weight": "Q6_K"},
    "Q4_0, tables in Q8_0": {"token_embd.weight": "Q8_0", "output.weight": "Q8_0"},
    "Q4_0, one in Q8_0": {"blk.0.ffn_down.weight": "Q8_0"},
    "Q4_1": {},
    "Q4_1, tables in Q8_0": {"token_embd.weight": "Q8_0", "output.weight": "Q8_0"},
    "Q8_0, one in Q4_1": {"blk.0.ffn_down.weight": "Q4_1"},
}
ROUNDED = {
    "Q5_0": {},
    "Q4_0, one in Q6_K": {"blk.0.ffn_down.weight": "Q6_K"},
    "Q4_0, v in Q8_0": {"blk.0.attn_v.weight": "Q8_0"},  # one matrix with q and k here
}


def source_of(path: Path, mix: str, others: dict[str, str]) -> CheckpointSource:
    tensors = converted(CONFIG, 1)
    held = stored(tensors, mix.partition(",")[0])
    for name, kind in others.items():
        held |= stored({name: tensors[name]}, kind)
    return CheckpointSource(open_checkpoint(write(path / "tiny.gguf", CONFIG, held)))


def read_back(source: CheckpointSource, precision: Precision) -> dict[str, np.ndarray]:
    """The float32 matrices that the weight file's bytes stand for."""
    pieces = dict(host_pieces(CONFIG, precision, source.weights, (), None, source.kept(precision)))
    weights = precision.host_weights(CONFIG)
    assert isinstance(weights, BlockWeights)
    assert {name: piece.shape for name, piece in pieces.items()} == {
        name: entry.shape for name, entry in weights.layout.items()
    }
    found = {}
    for name, shape in weights.shapes.items():
        if len(shape) == 1:
            found[name] = pieces[name]
            continue
        packed, scales, zero_points = (pieces[part] for part in weights.names(name))
        product = unpack(packed, scales, zero_points, weights.bits(name), shape[1])
        found[name] = product.dequantise()
        offsets = weights.offsets_name(name)
        if offsets is not None:
            found[name] += np.repeat(pieces[offsets].T, 32, axis=1)
    return found


@pytest.mark.parametrize("mix", MIXES)
def test_blocks_are_kept_to_the_bit(mix: str, tmp_path: Path) -> None:
    """Against what ``gguf`` itself reads, in which q and k lie in another order; with a minimum of
    each block, to float32's last bits."""
    source = source_of(tmp_path, mix, MIXES[mix])
    precision = source.adapted(choose_precision("cpu", "int4"))
    found = read_back(source, precision)
    for name, value in source.weights():
        scale = np.abs(value).max()
        if name in (EMBEDDING, HEAD) and ("Q6_K" in mix or mix == "Q4_1"):  # to 8 bits of each row
            assert not np.array_equal(found[name], value)
            np.testing.assert_allclose(found[name], value, atol=scale / 100)
        elif name in precision.offset:  # scale and minimum are added up in float32
            np.testing.assert_allclose(found[name], value, rtol=0, atol=scale * 2e-7)
        else:
            assert np.array_equal(found[name], value), name


@pytest.mark.parametrize("mix", ROUNDED)
def test_a_file_that_holds_a_layers_matrix_otherwise_is_rounded(mix: str, tmp_path: Path) -> None:
    source = source_of(tmp_path, mix, ROUNDED[mix])
    precision = choose_precision("cpu", "int4")
    assert source.adapted(precision) == precision
    assert source.kept(precision) is None


def test_other_precisions_and_blocks_keep_nothing(tmp_path: Path) -> None:
    source = source_of(tmp_path, "Q8_0", {})
    for name, block in (("int8", None), ("fp32", None), ("int4", 64)):
        precision = choose_precision("cpu", name, block=block)
        assert source.adapted(precision) == precision
        assert source.kept(precision) is None


def test_what_is_in_no_blocks_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = source_of(tmp_path, "Q5_0", {}).checkpoint
    with pytest.raises(
        CheckpointError, match=r"doesn't hold model\.embed_tokens\.weight in blocks"
    ):
        checkpoint.blocks(EMBEDDING)


def test_the_graph_adds_the_offsets(tmp_path: Path) -> None:
    """Logits of a file in Q4_1 against numpy's, which has scales and minima apart."""
    source = source_of(tmp_path, "Q4_1", {"token_embd.weight": "Q8_0", "output.weight": "Q8_0"})
    precision = source.adapted(choose_precision("cpu", "int4"))
    layout = precision.layout(CONFIG)
    tables = [(name, table.numpy()) for name, table in rope_buffers(CONFIG)]
    kept = host_pieces(CONFIG, precision, source.weights, tables, None, source.kept(precision))
    pieces = dict(kept)
    list(write_weights(tmp_path / "w.safetensors", layout, pieces.items()))
    graph = tmp_path / "decoder.onnx"
    save_graph(trace_skeleton(CONFIG, precision), graph, "w.safetensors", weight_regions(layout))
    weights = precision.host_weights(CONFIG)
    assert isinstance(weights, BlockWeights)
    matrices: dict[str, object] = {}
    for name, value in read_back(source, precision).items():
        if value.ndim == 1:
            matrices[name] = value.astype(np.float64)
            continue
        offsets = None
        if name in precision.offset:
            offsets = pieces[f"{name}.offsets"].T.astype(np.float64)
            value -= np.repeat(offsets, 32, axis=1).astype(np.float32)
        matrices[name] = BlockMatrix(value.astype(np.float64), 32, offsets)
    reference = NumpyLlama(huggingface_names(CONFIG), matrices)  # type: ignore[arg-type]
    token_ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    session = open_session(graph, 1)
    backend = OrtCpu(session, CONFIG.geometry, num_slots=1, capacity=16, row_multiple=1)
    logits, expected = backend.run(prompt(token_ids)), reference.logits(token_ids)
    off = np.abs(logits - expected).max(axis=1)
    assert (off < 1e-4).mean() > 0.2  # one code that is rounded the other way shows in others
    assert off.max() < 0.1 * expected.std()
