"""Bundles in 8 and 4 bits from the command's own function: figures, refusals, what is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llama_export.build import build_bundle
from llama_export.bundle_checks import verify_bundle
from llama_export.cpu_checks import CpuVerification
from llama_export.errors import ExportError
from llama_runtime.bundle import open_bundle
from llama_runtime.evaluation.scoring import evaluate
from llama_runtime.llm import LLM
from llama_runtime.params import SamplingParams


@pytest.fixture(scope="module")
def int8_bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("int8") / "bundle"
    build_bundle(tiny_model, output, precision="int8", kv_cache="int8")
    return output


def test_a_rounded_bundle_records_how_good_it_is(int8_bundle: Path) -> None:
    figures = json.loads((int8_bundle / "manifest.json").read_text())["verification"]
    quality = figures["quality"]
    assert quality["tokens"] >= 20_000
    assert 0 < quality["mean_kl"] < 0.05
    assert 0.9 < quality["top1_agreement"] < 1
    assert figures["recipe"] == {"rounding": "calibrated"}
    card = (int8_bundle / "README.md").read_text()
    assert "mean KL divergence" in card
    assert "rounding: calibrated" in card
    assert "not run" not in card


def test_its_figures_can_be_had_again_without_the_source(int8_bundle: Path) -> None:
    recorded = json.loads((int8_bundle / "manifest.json").read_text())["verification"]["quality"]
    assert evaluate(open_bundle(int8_bundle)).as_dict() == recorded


def test_it_runs(int8_bundle: Path) -> None:
    with LLM(int8_bundle, max_batch=3, threads=1) as llm:
        params = SamplingParams(max_tokens=6, temperature=0.0)
        found = llm.generate(["one", "two and three", "four"], params)
        alone = [llm.generate([prompt], params)[0] for prompt in ("one", "two and three", "four")]
    assert [each.token_ids for each in found] == [each.token_ids for each in alone]
    assert {len(each.token_ids) for each in found} == {6}


def test_what_was_not_measured_at_build_is_measured_by_verify(
    tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "b"
    manifest = build_bundle(tiny_model, output, precision="int4", calibrated=False, quality=False)
    assert manifest.verification == {"recipe": {"block_size": 32, "rounding": "nearest"}}
    assert "not run" in (output / "README.md").read_text()
    found = verify_bundle(output, tiny_model)
    assert isinstance(found, CpuVerification)
    assert found.quality is not None
    assert found.quality.total.tokens >= 20_000
    assert f"{found.quality.total.tokens:,}" in found.summary()


def test_a_bundle_that_is_too_far_off_is_refused_and_told_what_to_do(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama_runtime.evaluation import gates

    strict = {"int4": gates.Gate(1e-6, 0.9999, "build with --precision int8 or fp32")}
    monkeypatch.setattr(gates, "GATES", strict)
    with pytest.raises(ExportError, match=r"quality of int4 is too low.*build without --no-calibr"):
        build_bundle(tiny_model, tmp_path / "b", precision="int4", calibrated=False)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"calibrated": False}, "fp32 for cpu has no weights .*leave --no-calibration out"),
        (
            {"precision": "int8", "kv_cache": "int8", "calibrated": False},
            "an int8 cache takes its scales from the calibration text",
        ),
        ({"target": "cuda", "quality": False}, "not for cuda"),
        ({"target": "cuda", "quality": True}, "not for cuda"),
        ({"precision": "int8", "random_seed": 1, "quality": True}, "random weights"),
        ({"precision": "int8", "random_seed": 1, "calibrated": False}, "random weights"),
    ],
)
def test_options_that_nothing_would_read_are_refused(
    options: dict[str, object], said: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=said):
        build_bundle(tiny_model, tmp_path / "b", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_no_number_is_refused_by_name(
    value: float, tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_model.iterdir():
        if path.name != "model.safetensors":
            (model / path.name).write_bytes(path.read_bytes())
    weights = load_file(tiny_model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] = weights[
        "model.layers.1.mlp.down_proj.weight"
    ].copy()
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(weights, model / "model.safetensors")
    for precision in ("int8", "int4"):
        with pytest.raises(
            ExportError, match=r"layers\.1\.mlp\.down_proj\.weight hold values that"
        ):
            build_bundle(model, tmp_path / "b", precision=precision, quality=False)
