"""The CPU's rounded graphs compute what their bytes stand for, in any number of rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from llama_decoder.tiny import tiny_config
from llama_export.errors import ExportError
from llama_export.precisions import choose_precision
from llama_runtime.backends.ort_cpu import OrtCpu, open_session
from llama_runtime.backends.row_probe import first_tokens
from llama_runtime.step_batch import Step
from tests.old_cpu.cases import BYTE_SHAPES, write_byte_product
from tests.old_cpu.worker import byte_products
from tests.rounded import Rounded, write_rounded

CASES = {
    "int8": ("int8", None, False),
    "int8 tied": ("int8", None, True),
    "int4": ("int4", 32, False),
    "int4 tied": ("int4", 32, True),
    "int4 in 64": ("int4", 64, False),
    "int4 in 128": ("int4", 128, True),
}


@pytest.fixture(scope="module", params=CASES)
def rounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rounded:
    name, block, tied = CASES[request.param]
    config = tiny_config(hidden_size=128, intermediate_size=256, head_dim=32, tie_embeddings=tied)
    return write_rounded(tmp_path_factory.mktemp("rounded"), config, name, block=block)


def prompt(token_ids: list[int]) -> Step:
    """One step that runs a whole prompt and gives all its logits."""
    count = len(token_ids)
    rows = np.arange(count, dtype=np.int64)
    return Step(
        input_ids=np.array(token_ids, np.int64),
        logits_rows=rows,
        unpack=rows[None].copy(),
        pack=rows,
        seqlens_k=np.array([count - 1], np.int32),
        query_seqlens=np.array([count], np.int32),
        total_sequence_length=np.array(count, np.int32),
        first_slot=0,
        num_logits=count,
        num_scored=0,
        chunks=(),
    )


def backend(model: Rounded, slots: int, capacity: int, row_multiple: int | None = None) -> OrtCpu:
    session = open_session(model.graph, 1)
    return OrtCpu(
        session,
        model.config.geometry,
        num_slots=slots,
        capacity=capacity,
        row_multiple=row_multiple,
    )


def test_the_graph_computes_what_numpy_does_with_the_same_bytes(rounded: Rounded) -> None:
    """To float32's precision, unless a number lay so near the middle of two steps that its last
    bits decided: that changes one code, and all tokens that see it by less than rounding does."""
    token_ids = np.random.default_rng(1).integers(0, 512, 40).tolist()
    logits = backend(rounded, 64, 64).run(prompt(token_ids))
    expected = rounded.reference.logits(token_ids)
    off = np.sqrt(np.square(logits - expected).mean(axis=1))
    cost = np.sqrt(np.square(expected - rounded.exact.logits(token_ids)).mean())
    assert 0 < cost < 0.5 * expected.std()
    assert (off < 1e-5).mean() > 0.2
    assert off.max() < cost


def test_rows_have_the_same_bits_in_any_number_of_rows(rounded: Rounded) -> None:
    """For 1 to 70 rows, padded as the one-row probe says they must be."""
    multiple = backend(rounded, 16, 2).row_multiple
    model = backend(rounded, 72, 72, multiple)
    token_ids = np.random.default_rng(2).integers(0, 512, 72).tolist()
    for count in range(multiple, 71, multiple):
        step = first_of_each(token_ids[:count])
        logits = model.run(step)[:count].copy()
        if count == multiple:
            alone = [logits[:multiple]]
        else:
            rows = token_ids[count - multiple : count]
            alone.append(model.run(first_of_each(rows))[:multiple].copy())
        assert logits.tobytes() == np.concatenate(alone).tobytes(), f"{count} rows"


def first_of_each(token_ids: list[int]) -> Step:
    """The first tokens of as many sequences."""
    count = len(token_ids)
    step = first_tokens(1, 512)
    rows = np.arange(count, dtype=np.int64)
    unpack = np.zeros((72, 1), np.int64)
    unpack[:count, 0] = rows
    return Step(
        input_ids=np.array(token_ids, np.int64),
        logits_rows=rows,
        unpack=unpack,
        pack=rows,
        seqlens_k=np.zeros(72, np.int32),
        query_seqlens=(np.arange(72) < count).astype(np.int32),
        total_sequence_length=step.total_sequence_length,
        first_slot=0,
        num_logits=count,
        num_scored=0,
        chunks=(),
    )


def test_embedding_and_head_are_the_same_bytes_where_they_are_one_matrix(tmp_path: Path) -> None:
    for name in ("int8", "int4"):
        folder = tmp_path / name
        folder.mkdir()
        config = tiny_config(tie_embeddings=True)
        model = onnx.load(write_rounded(folder, config, name).graph, load_external_data=False)
        places = {
            tensor.name: tuple(
                entry.value for entry in tensor.external_data if entry.key in ("offset", "length")
            )
            for tensor in model.graph.initializer
            if "embed_tokens" in tensor.name and "codes" in tensor.name
        }
        assert len(places) == 2
        assert len(set(places.values())) == 1


@pytest.mark.parametrize(
    ("name", "products"), [("int8", "MatMulIntegerToFloat"), ("int4", "MatMulNBits")]
)
def test_no_product_in_float32_is_left(tmp_path: Path, name: str, products: str) -> None:
    config = tiny_config(num_layers=3)
    graph = onnx.load(write_rounded(tmp_path, config, name).graph, load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count(products) == 5 * config.num_layers + 1
    assert "Gemm" not in kinds
    if name == "int8":  # once for q, k and v, once for gate and up; what goes into down is turned
        assert kinds.count("QuantizeLinear") == 4 * config.num_layers + 1
        assert kinds.count("MatMul") == config.num_layers
    else:
        assert "MatMul" not in kinds


def test_a_row_that_is_no_number_stays_alone(tmp_path: Path) -> None:
    for name in ("int8", "int4"):
        folder = tmp_path / name
        folder.mkdir()
        model = write_rounded(folder, tiny_config(), name, no_numbers=(7,))
        graph = backend(model, 72, 2, 4)
        logits = graph.run(first_of_each([3, 7, 4, 5]))
        finite = np.isfinite(logits[:4]).all(axis=1).tolist()
        assert finite == [True, False, True, True]
        beside = graph.run(first_of_each([3, 9, 4, 5]))[:4]
        logits = graph.run(first_of_each([3, 7, 4, 5]))[:4]
        assert logits[[0, 2, 3]].tobytes() == beside[[0, 2, 3]].tobytes()


def test_a_matrix_that_makes_no_blocks_is_refused_with_what_would_do(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=96, intermediate_size=160)
    with pytest.raises(
        ExportError, match=r"has 96 columns.*multiple of 64: build with --block-size 32"
    ):
        choose_precision("cpu", "int4", block=64).check(config)
    with pytest.raises(
        ExportError, match=r"down_proj.*100.*multiple of 32: build with --precision int8"
    ):
        choose_precision("cpu", "int4").check(tiny_config(intermediate_size=100))
    choose_precision("cpu", "int8").check(tiny_config(intermediate_size=100))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("cpu", "int8", "same", 32),
            "a block size is of --precision int4 --target cpu, not of int8",
        ),
        (("cuda", "int4", "same", 32), "not of int4 for cuda"),
        (("cpu", "int4", "same", 48), "the block size is 48, and it may be 32, 64, 128"),
    ],
)
def test_a_block_size_that_nothing_reads_is_refused(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ExportError, match=said):
        choose_precision(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_largest_bytes_are_multiplied_exactly(tmp_path: Path, threads: int) -> None:
    """On this processor; tests/laws/test_old_cpu.py has one that needs help with it."""
    for terms, columns in BYTE_SHAPES:
        write_byte_product(tmp_path / f"bytes_{terms}_{columns}", terms, columns)
    found = byte_products(tmp_path, threads)
    assert found["numbers"] > 10_000
    assert found["wrong"] == 0
