"""The streamed weight file is an ordinary safetensors file, and regions point at its tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from llama_export.errors import ExportError
from llama_export.weight_file import read_weights, weight_bytes, weight_regions, write_weights

TENSORS = {
    "first": np.arange(15, dtype=np.float32).reshape(3, 5),
    "second.weight": np.linspace(-1, 1, 7, dtype=np.float32),
}
SHAPES = {name: tensor.shape for name, tensor in TENSORS.items()}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    list(write_weights(path, SHAPES, iter(TENSORS.items())))
    return path


def test_safetensors_reads_the_file_back(written: Path) -> None:
    loaded = load_file(written)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(loaded[name], tensor)
    for name, mapped in read_weights(written):
        np.testing.assert_array_equal(mapped.numpy(), TENSORS[name])


def test_regions_are_where_the_bytes_lie(written: Path) -> None:
    data = written.read_bytes()
    for name, region in weight_regions(SHAPES).items():
        assert data[region.offset : region.offset + region.length] == TENSORS[name].tobytes()
    assert weight_regions(SHAPES)["first"].offset % 4096 == 0


def test_progress_counts_bytes(tmp_path: Path) -> None:
    counts = list(write_weights(tmp_path / "w", SHAPES, iter(TENSORS.items())))
    assert counts == [60, 88]
    assert counts[-1] == weight_bytes(SHAPES)


def test_values_of_other_types_are_written_as_float32(tmp_path: Path) -> None:
    doubles = np.array([[1.5, -2.0], [0.25, 4.0]]).T
    list(write_weights(tmp_path / "w", {"t": (2, 2)}, [("t", doubles)]))
    np.testing.assert_array_equal(load_file(tmp_path / "w")["t"], doubles.astype(np.float32))


@pytest.mark.parametrize(
    "tensors",
    [
        [("second.weight", TENSORS["second.weight"]), ("first", TENSORS["first"])],
        [("first", TENSORS["first"].T), ("second.weight", TENSORS["second.weight"])],
    ],
    ids=["order", "shape"],
)
def test_other_tensors_than_promised_are_refused(
    tmp_path: Path, tensors: list[tuple[str, np.ndarray]]
) -> None:
    with pytest.raises(ExportError, match="expected the weights first"):
        list(write_weights(tmp_path / "w", SHAPES, tensors))
