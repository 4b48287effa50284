"""The streamed weight file is an ordinary safetensors file, and regions point at its tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from llama_export.errors import ExportError
from llama_export.weight_file import (
    Stored,
    float32_layout,
    read_weights,
    stored_layout,
    weight_bytes,
    weight_regions,
    write_weights,
)

TENSORS = {
    "first": np.arange(15, dtype=np.float32).reshape(3, 5),
    "second.weight": np.linspace(-1, 1, 7, dtype=np.float32),
}
LAYOUT = float32_layout({name: tensor.shape for name, tensor in TENSORS.items()})


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    list(write_weights(path, LAYOUT, iter(TENSORS.items())))
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
    for name, region in weight_regions(LAYOUT).items():
        assert data[region.offset : region.offset + region.length] == TENSORS[name].tobytes()
    assert weight_regions(LAYOUT)["first"].offset % 4096 == 0


def test_progress_counts_bytes(tmp_path: Path) -> None:
    counts = list(write_weights(tmp_path / "w", LAYOUT, iter(TENSORS.items())))
    assert counts == [60, 88]
    assert counts[-1] == weight_bytes(LAYOUT)


def test_values_of_other_types_are_written_as_float32(tmp_path: Path) -> None:
    doubles = np.array([[1.5, -2.0], [0.25, 4.0]]).T
    list(write_weights(tmp_path / "w", {"t": Stored("F32", (2, 2))}, [("t", doubles)]))
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
        list(write_weights(tmp_path / "w", LAYOUT, tensors))


MIXED = {
    "half": Stored("F16", (4, 3)),
    "brain": Stored("BF16", (2,)),
    "bytes": Stored("U8", (2, 1, 16)),
    "full": Stored("F32", (3,)),
}


def mixed() -> list[tuple[str, np.ndarray]]:
    return [
        ("half", np.arange(12, dtype=np.float16).reshape(4, 3)),
        ("brain", np.array([0x3F80, 0xC000], np.uint16)),  # 1 and -2
        ("bytes", np.arange(32, dtype=np.uint8).reshape(2, 1, 16)),
        ("full", np.array([0.1, 0.2, 0.3], np.float32)),
    ]


def test_tensors_of_several_types_are_read_back_by_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "w"
    assert list(write_weights(path, MIXED, mixed()))[-1] == weight_bytes(MIXED) == 72
    loaded = dict(read_weights(path))
    assert list(loaded) == list(MIXED) == list(stored_layout(path))
    assert stored_layout(path) == MIXED
    assert loaded["brain"].tolist() == [1, -2]
    for name, array in mixed():
        if name != "brain":
            np.testing.assert_array_equal(loaded[name].numpy(), array)
        region = weight_regions(MIXED)[name]
        stored = path.read_bytes()[region.offset : region.offset + region.length]
        assert stored == array.tobytes()


def test_rows_may_come_in_pieces(tmp_path: Path) -> None:
    list(write_weights(tmp_path / "whole", MIXED, mixed()))
    pieces = [(name, rows) for name, array in mixed() for rows in np.array_split(array, 2)]
    list(write_weights(tmp_path / "pieces", MIXED, pieces))
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given[:-1], "expected the weights full .* got no more"),
        (lambda given: [*given, given[-1]], "expected no more weights, got full"),
        (lambda given: [given[0], given[0]], r"expected the weights brain .* got half"),
        (lambda _: [("half", np.zeros((5, 3), np.float16))], r"half \(4, 3\), got half"),
        (lambda _: [("half", np.zeros((0, 3), np.float16))], r"half \(4, 3\), got half"),
        (lambda _: [("half", np.zeros((4, 3), np.float32))], "half as F16, got float32"),
    ],
    ids=["missing", "extra", "order", "too many rows", "no rows", "type"],
)
def test_other_pieces_than_promised_are_refused(
    tmp_path: Path, change: object, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        list(write_weights(tmp_path / "w", MIXED, change(mixed())))  # type: ignore[operator]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda _: b"x" * 100])
def test_a_file_that_is_damaged_has_no_layout(tmp_path: Path, damage: object) -> None:
    list(write_weights(tmp_path / "w", MIXED, mixed()))
    (tmp_path / "w").write_bytes(damage((tmp_path / "w").read_bytes()))  # type: ignore[operator]
    with pytest.raises(ExportError):
        stored_layout(tmp_path / "w")
