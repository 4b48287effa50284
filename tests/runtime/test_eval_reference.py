"""The file of reference log-probabilities: what it holds, and what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_runtime.bundle import open_bundle
from llama_runtime.bundle_limits import REFERENCE_LOGPROBS
from llama_runtime.errors import BundleError
from llama_runtime.evaluation.reference import (
    Reference,
    Window,
    decoded,
    encoded,
    read_reference,
)
from tests.evaluated import rewrite_manifest
from tests.runtime.conftest import FAKE_GEOMETRY

V, K, M = 258, 5, 2
RNG = np.random.default_rng(1)


def distribution(rows: int, spread: float = 3.0) -> np.ndarray:
    """Log-probabilities [rows, K + 1] that sum to 1, the first K falling."""
    logits = spread * RNG.standard_normal((rows, K + 1))
    logits[:, :K] = -np.sort(-logits[:, :K], axis=1)
    logprobs: np.ndarray = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logprobs


def made(vocab_size: int = V) -> Reference:
    windows = (Window("prose", (1, 2, 3, 4)), Window("code", (9, 8)), Window("prose", (7, 257, 7)))
    rows = sum(window.num_targets for window in windows)
    ids = np.array([RNG.permutation(vocab_size)[: K + M] for _ in range(rows)])
    return Reference(
        texts_sha256="a" * 64,
        vocab_size=vocab_size,
        windows=windows,
        targets=-RNG.exponential(2, rows).astype(np.float32),
        top_ids=ids[:, :K],
        sample_ids=ids[:, K:],
        codes=encoded(distribution(rows)),
        sample_codes=RNG.integers(9000, 2**16, (rows, M)).astype(np.uint16),
    )


@pytest.mark.parametrize("vocab_size", [V, 2**16, 2**16 + 1, 128_256])
def test_what_is_written_is_read(vocab_size: int) -> None:
    reference = made(vocab_size)
    data = reference.to_bytes()
    found = Reference.from_bytes(data)
    assert (found.texts_sha256, found.vocab_size) == (reference.texts_sha256, vocab_size)
    assert found.windows == reference.windows
    for name in ("targets", "top_ids", "sample_ids", "codes", "sample_codes"):
        assert (getattr(found, name) == getattr(reference, name)).all()
    assert found.starts.tolist() == [0, 3, 4, 6]
    assert found.to_bytes() == data


def test_the_layout_is_the_one_that_is_documented() -> None:
    reference = made()
    data = reference.to_bytes()
    magic, size = struct.unpack_from("<8sI", data)
    header = json.loads(data[12 : 12 + size])
    assert magic == b"caravan1"
    assert header == {
        "texts_sha256": "a" * 64,
        "vocab_size": V,
        "top": K,
        "samples": M,
        "windows": [["prose", 4], ["code", 2], ["prose", 3]],
    }
    rest = data[12 + size :]
    assert len(rest) == 9 * 4 + 6 * 4 + 6 * (K + M) * 2 + 6 * (K + 1 + M) * 2
    assert np.frombuffer(rest[:36], "<u4").tolist() == [1, 2, 3, 4, 9, 8, 7, 257, 7]
    assert (np.frombuffer(rest[36:60], "<f4") == reference.targets).all()
    sizes = [6 * count for count in (K, M, K + 1, M)]
    parts = np.split(np.frombuffer(rest[60:], "<u2"), np.cumsum(sizes)[:-1])
    names = ("top_ids", "sample_ids", "codes", "sample_codes")
    for name, part in zip(names, parts, strict=True):
        assert (part.reshape(6, -1) == getattr(reference, name)).all()


def test_codes_are_off_by_less_than_a_thousandth_of_a_nat() -> None:
    logprobs = np.maximum(distribution(10_000), -31)
    logprobs -= np.log(np.exp(logprobs).sum(axis=1, keepdims=True))
    samples = logprobs[:, -1:] - RNG.exponential(0.1, (len(logprobs), M))
    found, drawn = decoded(encoded(logprobs), encoded(samples))
    assert np.abs(drawn - np.maximum(samples, -32)).max() < 1e-3
    assert np.abs(found - logprobs).max() < 1e-3
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, atol=1e-12)
    lost = (np.exp(logprobs) * (logprobs - found)).sum(axis=1)
    assert 0 <= lost.mean() < 1e-7  # nats, of what is measured against it


def test_what_is_too_unlikely_for_a_code_is_as_unlikely_as_one_can_say() -> None:
    certain = np.array([[0.0, -50, -60, -70, -80, -90]])
    codes = encoded(certain)
    assert codes[0].tolist() == [0, *[2**16 - 1] * 5]
    np.testing.assert_allclose(decoded(codes, codes).parts[0, 0], 0, atol=1e-12)


def changed(**changes: Any) -> bytes:
    return replace(made(), **changes).to_bytes()


def header(change: Callable[[Any], Any]) -> bytes:
    data = made().to_bytes()
    size = struct.unpack_from("<8sI", data)[1]
    text = json.dumps(change(json.loads(data[12 : 12 + size]))).encode()
    return struct.pack("<8sI", b"caravan1", len(text)) + text + data[12 + size :]


def with_first(name: str, value: Any) -> bytes:
    array = getattr(made(), name).copy()
    array.flat[0] = value
    return changed(**{name: array})


GOOD = made().to_bytes()
HOSTILE = {
    "nothing": b"",
    "11 bytes": GOOD[:11],
    "another magic": b"caravan2" + GOOD[8:],
    "a zip file": b"PK\x03\x04" + GOOD,
    "a header of 4 GB": GOOD[:8] + b"\xff\xff\xff\xff" + GOOD[12:],
    "a header to the end": GOOD[:8] + struct.pack("<I", len(GOOD) - 11) + GOOD[12:],
    "one byte less": GOOD[:-1],
    "one byte more": GOOD + b"\0",
    "no header": header(lambda _: []),
    "deep header": struct.pack("<8sI", b"caravan1", 60_000) + b"[" * 60_000,
    "no windows": header(lambda h: {**h, "windows": []}),
    "windows of text": header(lambda h: {**h, "windows": "aa"}),
    "a window of one token": header(lambda h: {**h, "windows": [["a", 1], ["b", 8]]}),
    "a window of -4 tokens": header(lambda h: {**h, "windows": [["a", -4], ["b", 13]]}),
    "windows of 10^30 tokens": header(lambda h: {**h, "windows": [["a", 10**30]]}),
    "half a token": header(lambda h: {**h, "windows": [["a", 4.5], ["b", 4.5]]}),
    "a kind that is none": header(lambda h: {**h, "windows": [[3, 9]]}),
    "a kind that moves the cursor": header(lambda h: {**h, "windows": [["\x1b[2J", 9]]}),
    "an unknown field": header(lambda h: {**h, "more": 1}),
    "a missing field": header(lambda h: {k: v for k, v in h.items() if k != "top"}),
    "no likeliest": header(lambda h: {**h, "top": 0}),
    "no samples": header(lambda h: {**h, "samples": 0}),
    "a million samples": header(lambda h: {**h, "samples": 10**6}),
    "a sample too high": with_first("sample_ids", V),
    "all likeliest": header(lambda h: {**h, "top": V}),
    "no vocabulary": header(lambda h: {**h, "vocab_size": 0}),
    "true tokens": header(lambda h: {**h, "vocab_size": True}),
    "a token too high": changed(windows=(Window("a", (1, 2, 3, 4, V, 5, 6)),)),
    "a likeliest token too high": with_first("top_ids", V),
    "a token twice": changed(top_ids=np.zeros((6, K), np.int64)),
    "no number": with_first("targets", np.nan),
    "an infinite one": with_first("targets", -np.inf),
    "more than certain": with_first("targets", 0.5),
    "no distribution": with_first("codes", 0),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_another_file_is_refused(name: str, fake_bundle: Path) -> None:
    (fake_bundle / REFERENCE_LOGPROBS).write_bytes(HOSTILE[name])
    rewrite_manifest(fake_bundle)
    with pytest.raises(BundleError, match=r"not a reference of this bundle, .*: rebuild it with"):
        read_reference(open_bundle(fake_bundle))


def test_whatever_bytes_change_it_is_read_or_refused() -> None:
    refused = 0
    for _ in range(400):
        data = bytearray(GOOD)
        for place in RNG.integers(0, len(data), RNG.integers(1, 4)):
            data[place] = RNG.integers(0, 256)
        try:
            Reference.from_bytes(bytes(data))
        except ValueError:
            refused += 1
    assert refused > 100


def test_a_bundle_gives_its_reference(fake_bundle: Path) -> None:
    (fake_bundle / REFERENCE_LOGPROBS).write_bytes(GOOD)
    rewrite_manifest(fake_bundle)
    assert read_reference(open_bundle(fake_bundle)).to_bytes() == GOOD


def test_a_bundle_without_one_says_how_to_get_one(fake_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"built without reference_logprobs\.bin, .* rebuild it"):
        read_reference(open_bundle(fake_bundle))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 300}, "of a vocabulary of 258 tokens and the model has 300"),
        ({"max_positions": 3}, "a window has 4 tokens and the model 3 positions"),
    ],
)
def test_the_reference_of_another_model_is_refused(
    change: dict[str, int], message: str, fake_bundle: Path
) -> None:
    (fake_bundle / REFERENCE_LOGPROBS).write_bytes(GOOD)
    geometry = replace(FAKE_GEOMETRY, **change)
    rewrite_manifest(fake_bundle, geometry=geometry)
    with pytest.raises(BundleError, match=message):
        read_reference(open_bundle(fake_bundle))
