"""The reference is what the decoder computes, over windows that hold the texts."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama_decoder.config import RopeScaling
from llama_decoder.decoder import rope_buffers
from llama_decoder.tiny import random_weights, tiny_config
from llama_export import quality
from llama_export.errors import ExportError
from llama_export.precisions import CPU_PRECISIONS
from llama_export.quality import (
    LEAST_WINDOW,
    cut_windows,
    measure,
    num_parameters,
    reference_logprobs,
    require_quality,
    write_reference,
)
from llama_export.weights_cost import streamed_logits
from llama_runtime.bundle import open_bundle
from llama_runtime.bundle_limits import MAX_REFERENCE_BYTES, REFERENCE_LOGPROBS
from llama_runtime.evaluation.gates import GATES, gate_of
from llama_runtime.evaluation.reference import Window, read_reference
from llama_runtime.evaluation.report import Figures, QualityReport, Scores
from llama_runtime.tokenizer import Tokenizer
from tests.evaluated import SHA256, TEXTS, Text, rewrite_manifest, stand_in_texts

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied, 3 layers": {"tie_embeddings": True, "num_layers": 3},
    "llama3, a KV head": {
        "num_kv_heads": 1,
        "rope_scaling": RopeScaling(
            kind="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=32,
        ),
    },
}
RNG = np.random.default_rng(5)
WINDOWS = [Window("a", tuple(RNG.integers(0, 512, n).tolist())) for n in (200, 2, 33, 100)]


@pytest.mark.parametrize(
    ("shape", "elements"), [*((shape, 1 << 24) for shape in SHAPES), ("plain", 512 * 50)]
)
def test_it_is_what_the_decoder_computes(
    shape: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "HEAD_ELEMENTS", elements)
    config = tiny_config(**SHAPES[shape])
    weights = random_weights(config, seed=6)
    counts: list[int] = []
    reference = reference_logprobs(config, weights.items(), WINDOWS, SHA256, counts.append)
    assert counts == [*range(1, num_parameters(config) + 1)]
    with torch.no_grad():
        tensors = ((name, torch.from_numpy(value)) for name, value in weights.items())
        prompts = [window.tokens[:-1] for window in WINDOWS]
        logits = streamed_logits(config, tensors, dict(rope_buffers(config)), prompts)
    expected = torch.from_numpy(logits).double().log_softmax(1).numpy()
    rows = np.arange(len(expected))
    targets = np.concatenate([window.tokens[1:] for window in WINDOWS])
    np.testing.assert_allclose(reference.targets, expected[rows, targets], atol=1e-4)
    kept = reference.kept(slice(None))
    ids = np.argsort(-expected, axis=1)[:, : quality.TOP]
    assert (reference.top_ids[:, :4] == ids[:, :4]).mean() > 0.99  # but for near ties
    found = np.take_along_axis(expected, reference.top_ids, axis=1)
    np.testing.assert_allclose(kept.parts[:, :-1], found, atol=1e-3)
    np.testing.assert_allclose(found, np.take_along_axis(expected, ids, axis=1), atol=1e-4)
    rest = np.log(1 - np.exp(found).sum(axis=1))
    np.testing.assert_allclose(kept.parts[:, -1], rest, atol=1e-3)
    drawn = np.take_along_axis(expected, reference.sample_ids, axis=1)
    np.testing.assert_allclose(kept.samples, drawn, atol=1e-3)


def test_samples_are_drawn_from_the_rest_as_it_is() -> None:
    logits = torch.from_numpy(2 * RNG.standard_normal((1, 40))).float().expand(4000, 40)
    top = logits.topk(5).indices
    uniform = torch.from_numpy(RNG.random((4000, 1)))
    drawn = quality._drawn(logits, top, uniform, 8)
    assert drawn.shape == (4000, 8)
    assert not np.isin(drawn.numpy(), top[0].numpy()).any()
    rest = logits[0].double().softmax(0).scatter(0, top[0], 0)
    shares = torch.bincount(drawn.flatten(), minlength=40) / drawn.numel()
    np.testing.assert_allclose(shares.numpy(), (rest / rest.sum()).numpy(), atol=0.005)


def test_the_same_source_gives_the_same_file() -> None:
    config = tiny_config()
    first, second = (
        reference_logprobs(config, random_weights(config, 6).items(), WINDOWS, SHA256).to_bytes()
        for _ in range(2)
    )
    assert first == second


def test_one_layer_is_in_memory_at_a_time() -> None:
    config = tiny_config(num_layers=6)
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def given() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal most
        for name, value in random_weights(config, seed=0).items():
            memory = value.copy()
            alive.append(weakref.ref(memory))
            most = max(most, sum(ref() is not None for ref in alive))
            yield name, memory
            del memory

    reference_logprobs(config, given(), WINDOWS, SHA256)
    assert most <= 8  # of 45: those of a layer, and one


def test_weights_that_are_no_numbers_are_named() -> None:
    config = tiny_config()
    weights = random_weights(config, seed=0)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        reference_logprobs(config, weights.items(), WINDOWS, SHA256)


def test_logits_beyond_float32_are_refused() -> None:
    config = tiny_config()
    weights = random_weights(config, seed=0)
    weights["lm_head.weight"] *= np.float32(1e38)
    with pytest.raises(ExportError, match="the source's logits are no finite numbers"):
        reference_logprobs(config, weights.items(), WINDOWS, SHA256)


@pytest.fixture
def tokenizer(tiny_bundle: Path) -> Tokenizer:
    return Tokenizer(tiny_bundle / "tokenizer.json")


@pytest.fixture
def opening_tokenizer(tmp_path: Path) -> Tokenizer:
    from tokenizers.processors import TemplateProcessing

    from tests.tiny_model import byte_level_tokenizer

    tokenizer = byte_level_tokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer(tmp_path / "tokenizer.json")


def test_windows_hold_the_texts_from_beginning_to_end(tokenizer: Tokenizer) -> None:
    windows = cut_windows(tokenizer, TEXTS, 256)
    assert [*dict.fromkeys(window.kind for window in windows)] == ["prose", "code"]
    for kind in ("prose", "code"):
        text = "".join(one.text for one in TEXTS if one.kind == kind)
        tokens = [token for window in windows if window.kind == kind for token in window.tokens]
        assert tokenizer.decode(tokens) == text
    assert {len(window.tokens) for window in windows[:2]} == {256}
    assert max(len(window.tokens) for window in cut_windows(tokenizer, TEXTS, 8192)) == 512


def test_every_window_begins_as_a_prompt_does(opening_tokenizer: Tokenizer) -> None:
    windows = cut_windows(opening_tokenizer, [Text("prose", "ab" * 300)], 256)
    assert [len(window.tokens) for window in windows] == [256, 256, 91]
    assert all(window.tokens[0] == 1 for window in windows)
    assert not any({1, 2} & {*window.tokens[1:]} for window in windows)


def test_the_rest_of_a_text_is_left_out_if_it_is_short(tokenizer: Tokenizer) -> None:
    for count, last in ((LEAST_WINDOW - 1, 256), (LEAST_WINDOW, LEAST_WINDOW)):
        windows = cut_windows(tokenizer, [Text("prose", "a" * (512 + count))], 256)
        assert len(windows[-1].tokens) == last


def test_of_a_long_text_windows_are_taken_evenly(tokenizer: Tokenizer) -> None:
    text = "".join(chr(97 + number) * 512 for number in range(24))
    windows = cut_windows(tokenizer, [Text("prose", text)], 8192)
    assert len(windows) * 512 == quality.KIND_TOKENS
    assert "".join(tokenizer.decode(window.tokens[:1]) for window in windows) == "acegikmoqsuw"


def test_a_text_that_is_too_short_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ExportError, match="of the kind chat has fewer than 32 tokens"):
        cut_windows(tokenizer, [*TEXTS, Text("chat", "Hello")], 256)


def test_a_bundle_is_measured_against_what_was_written(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_texts(monkeypatch)
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    config = tiny_config()
    write_reference(bundle, config, random_weights(config, seed=0).items())
    rewrite_manifest(bundle)
    counts: list[int] = []
    report = measure(open_bundle(bundle), counts.append)
    require_quality(report)
    assert counts[-1] == 100
    assert report.texts_sha256 == read_reference(open_bundle(bundle)).texts_sha256 == SHA256
    assert [*report.kinds] == ["prose", "code"]


def test_the_largest_file_is_one_that_the_runtime_takes() -> None:
    of_a_place = 4 + 4 + 6 * (quality.TOP + quality.SAMPLES) + 2
    from llama_runtime.evaluation.texts import KINDS

    assert len(KINDS) * quality.KIND_TOKENS * of_a_place < min(MAX_REFERENCE_BYTES, 8e6)
    assert REFERENCE_LOGPROBS.endswith(".bin")


def report(precision: str, mean_kl: float) -> QualityReport:
    zeros = np.zeros(10)
    scores = Scores(zeros, np.ones(10, bool), zeros, zeros, np.arange(10))
    figures = replace(Figures.of(scores), mean_kl=mean_kl)
    return QualityReport(precision, SHA256, {"prose": figures}, figures)


@pytest.mark.parametrize("precision", GATES)
def test_too_low_a_quality_says_what_to_do(precision: str) -> None:
    gate = GATES[precision]
    require_quality(report(precision, gate.mean_kl))
    with pytest.raises(ExportError) as caught:
        require_quality(report(precision, 2 * gate.mean_kl))
    message = str(caught.value)
    assert f"{2 * gate.mean_kl:.3g} nats (at most {gate.mean_kl:g})" in message
    assert message.endswith(gate.instead)


def test_a_precision_without_a_gate_is_not_built() -> None:
    with pytest.raises(ExportError, match="no gate for the precision int3"):
        require_quality(report("int3", 0.0))


def test_every_precision_of_the_cpu_has_a_gate() -> None:
    names = {recipe.name for recipe in CPU_PRECISIONS.values()}
    assert {"fp32", "int8", "int4"} <= names
    assert all(gate_of(name) is not None for name in names)
