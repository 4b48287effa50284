"""The sampler as a graph: its form, what its outputs promise, and that company doesn't show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from llama_export.sampler import BLOCK_SIZES, VECTOR, block_size, build_sampler, save_sampler
from llama_runtime.backends.ort_cpu import open_session
from llama_runtime.backends.ort_sampler import OrtSampler
from llama_runtime.contract import SAMPLER_INPUTS, SAMPLER_OUTPUTS
from llama_runtime.errors import BackendError
from llama_runtime.graph_file import OPERATORS, check_graph

Arrays = dict[str, npt.NDArray[Any]]

# Whole blocks; blocks that are filled up; rows that begin in the middle of a vector.
VOCAB_SIZES = (1, 5, 61, 320, 1009, 32_000, 32_003, 50_257)
ROWS = 9


@pytest.fixture(params=VOCAB_SIZES)
def vocab_size(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


def saved(vocab_size: int, folder: Path) -> Path:
    save_sampler(vocab_size, folder / "sampler.onnx")
    return folder / "sampler.onnx"


# --- form ---------------------------------------------------------------------------------------


def test_it_is_a_graph_that_the_runtime_takes(vocab_size: int, tmp_path: Path) -> None:
    graph = saved(vocab_size, tmp_path)
    check_graph(graph)
    OrtSampler(graph, vocab_size, threads=1)
    assert [path.name for path in tmp_path.iterdir()] == [graph.name]  # it has no weights
    assert graph.stat().st_size < 20_000


def test_a_sampler_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="doesn't fit its manifest"):
        OrtSampler(saved(320, tmp_path), 321, threads=1)


def test_it_uses_no_operator_that_the_runtime_refuses() -> None:
    used = {node.op_type for node in build_sampler(61).graph.node}
    assert used < OPERATORS[""]
    assert used | {node.op_type for node in build_sampler(320).graph.node} == used


@pytest.mark.parametrize("vocab_size", [1009, 32_000], ids=str)
def test_no_sum_runs_along_the_whole_vocabulary(vocab_size: int) -> None:
    """A GPU is slow at long ones, and in float32 they lose digits."""
    model = onnx.shape_inference.infer_shapes(build_sampler(vocab_size), data_prop=True)
    last_axis = {
        value.name: value.type.tensor_type.shape.dim[-1].dim_value
        for value in [*model.graph.value_info, *model.graph.input]
    }
    sums = [n for n in model.graph.node if n.op_type in ("ReduceSum", "CumSum")]
    lengths = [last_axis[node.input[0]] for node in sums]
    assert len(lengths) > 5
    assert max(lengths) <= 2 * vocab_size**0.5


@pytest.mark.parametrize("vocab_size", [*VOCAB_SIZES, 49_152, 128_256, 151_936], ids=str)
def test_blocks_are_whole_vectors(vocab_size: int) -> None:
    assert block_size(vocab_size) % VECTOR == 0
    assert block_size(vocab_size) in (VECTOR, 2 * VECTOR, 3 * VECTOR, *BLOCK_SIZES)


@pytest.mark.parametrize(
    ("vocab_size", "size"), [(32_000, 160), (49_152, 192), (128_256, 384), (50_257, 224)]
)
def test_blocks_divide_the_vocabulary_if_they_can_and_lie_near_its_root(
    vocab_size: int, size: int
) -> None:
    assert block_size(vocab_size) == size


# --- what the outputs say -----------------------------------------------------------------------


class Graph:
    """Runs the graph itself, group by group."""

    def __init__(self, vocab_size: int, folder: Path, threads: int = 1) -> None:
        self._session = open_session(saved(vocab_size, folder), threads)
        self._none: Arrays = {
            spec.name: np.zeros((0, vocab_size if "V" in spec.axes else 1), spec.dtype)
            for spec in SAMPLER_INPUTS
        }
        self._none["candidates"] = np.array([min(256, vocab_size)])

    def run(self, inputs: Arrays) -> Arrays:
        names = [spec.name for spec in SAMPLER_OUTPUTS]
        return dict(zip(names, self._session.run(names, self._none | inputs), strict=True))


def inputs(vocab_size: int, rows: int = ROWS) -> Arrays:
    rng = np.random.default_rng(vocab_size)

    def logits() -> npt.NDArray[np.float32]:
        return (3 * rng.standard_normal((rows, vocab_size))).astype(np.float32)

    return {
        "whole_logits": logits(),
        "whole_inverse_temperatures": rng.uniform(0.5, 3, (rows, 1)).astype(np.float32),
        "whole_numbers": rng.random((rows, 1)),
        "filtered_logits": logits(),
        "filtered_inverse_temperatures": rng.uniform(0.5, 3, (rows, 1)).astype(np.float32),
        "filtered_numbers": rng.random((rows, 1)),
        "top_k": rng.choice([1, min(40, vocab_size), vocab_size], (rows, 1)),
        "top_p": rng.choice([0.5, 0.9, 1.0], (rows, 1)),
        "min_p": rng.choice([0, 0.01, 0.1], (rows, 1)),
        "scored_logits": logits(),
        "scored_tokens": rng.integers(vocab_size, size=(rows, 1)),
    }


@pytest.mark.parametrize("threads", [1, 2])
def test_every_output_of_a_row_is_the_same_bits_in_any_company(
    vocab_size: int, threads: int, tmp_path: Path
) -> None:
    given = inputs(vocab_size)
    together = Graph(vocab_size, tmp_path).run(given)
    other = Graph(vocab_size, tmp_path, threads)
    for part in (slice(0, 1), slice(3, 4), slice(4, 7), slice(8, 9), slice(0, ROWS)):
        found = other.run({name: np.ascontiguousarray(a[part]) for name, a in given.items()})
        for name, values in found.items():
            assert values.tobytes() == together[name][part].tobytes(), (name, part)


@pytest.mark.parametrize(
    "group",
    [
        {"whole_logits", "whole_inverse_temperatures", "whole_numbers"},
        {"scored_logits", "scored_tokens"},
    ],
    ids=["whole", "scored"],
)
def test_groups_do_not_need_each_other(group: set[str], tmp_path: Path) -> None:
    graph, given = Graph(1009, tmp_path), inputs(1009)
    alone = graph.run({name: given[name] for name in group})
    without = graph.run({name: array for name, array in given.items() if name not in group})
    for name, values in graph.run(given).items():
        parts = alone[name].tobytes(), without[name].tobytes()
        assert sorted(parts) == [b"", values.tobytes()]


def test_totals_are_the_mass_of_the_row_and_nan_where_there_is_none(tmp_path: Path) -> None:
    graph, given = Graph(1009, tmp_path), inputs(1009)
    for i, value in enumerate((np.nan, np.inf)):
        given["whole_logits"][i, 700] = given["filtered_logits"][i, 1008] = value
    given["whole_logits"][2], given["filtered_logits"][2] = -np.inf, -np.inf
    found = graph.run(given)
    for group in ("whole", "filtered"):
        totals = found[f"{group}_totals"][:, 0]
        assert np.isnan(totals[:3]).all()
        assert totals[3:] == pytest.approx(1, abs=1e-6)


def test_covered_means_that_everything_kept_is_among_the_candidates(tmp_path: Path) -> None:
    """256 equal tokens, one that is less likely, and the rest far away."""
    row = np.full(1009, -50, np.float32)
    row[100:356], row[500] = 1, 0.9
    cases = {  # top_k, top_p, min_p
        (5, 1.0, 0.0): False,  # whether there are more equals can't be seen
        (1009, 0.5, 0.0): True,
        (1009, 0.999, 0.0): False,
        (1009, 1.0, 0.95): False,  # the last candidate may be kept, so that more may be
        (1009, 0.9999, 0.5): False,
        (1009, 1.0, 0.0): False,
    }
    given = inputs(1009, len(cases))
    given["filtered_logits"] = np.stack([row] * len(cases))
    given["filtered_inverse_temperatures"][:] = 1
    for at, name in enumerate(("top_k", "top_p", "min_p")):
        given[name] = np.array([[case[at]] for case in cases], given[name].dtype)
    found = Graph(1009, tmp_path).run(given)
    assert found["filtered_covered"][:, 0].tolist() == list(cases.values())
    given["filtered_logits"][:, 355] = 0.8  # now 255 are equal, and the 256th is the lone one
    found = Graph(1009, tmp_path).run(given)
    assert found["filtered_covered"][:, 0].tolist() == [True, True, False, True, False, False]
