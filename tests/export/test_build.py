"""A bundle is whole and verified, or isn't there; and nothing of anybody else's is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from llama_decoder.tiny import random_weights, tiny_config
from llama_export.build import build_bundle
from llama_export.bundle_checks import verify_bundle
from llama_export.errors import ExportError
from llama_export.precision import Precision
from llama_runtime import memory_plan
from llama_runtime.backends.ort_cpu import OrtCpu
from llama_runtime.bundle import describe_file, open_bundle
from llama_runtime.contract import SLOTS
from llama_runtime.errors import BundleError
from llama_runtime.step_batch import Step

TYPES = {"float32": 1, "int32": 6, "int64": 7}


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_bundle_holds_what_the_runtime_needs(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle, verify="full")
    assert names(tiny_bundle) == {*bundle.manifest.files, "manifest.json"}
    assert bundle.manifest.geometry == tiny_config().geometry
    assert bundle.generation_config["eos_token_id"] == [2]
    assert bundle.chat_template is not None
    assert bundle.manifest.special_tokens["bos_token"] == "<s>"
    assert (tiny_bundle / "tokenizer.json").is_file()


def test_weights_of_the_bundle_are_those_of_the_model(tiny_bundle: Path) -> None:
    stored = load_file(tiny_bundle / "model.safetensors")
    for name, weight in random_weights(tiny_config(), seed=0).items():
        np.testing.assert_array_equal(stored[name], weight)


def test_graph_speaks_the_contract(tiny_bundle: Path) -> None:
    """Names, types and axes; every weight is a reference into the weight file."""
    model = onnx.load(tiny_bundle / "decoder.onnx", load_external_data=False)
    config = tiny_config()
    sizes = {"K": config.num_kv_heads, "D": config.head_dim, "V": config.vocab_size}
    specs = {
        "input": (*SLOTS.inputs, *SLOTS.cache_inputs(config.num_layers)),
        "output": (SLOTS.logits, *SLOTS.cache_outputs(config.num_layers)),
    }
    for side, values in (("input", model.graph.input), ("output", model.graph.output)):
        assert [value.name for value in values] == [spec.name for spec in specs[side]]
        for value, spec in zip(values, specs[side], strict=True):
            tensor = value.type.tensor_type
            axes = [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]
            assert tensor.elem_type == TYPES[spec.dtype], spec.name
            assert axes == [sizes.get(axis, axis) for axis in spec.axes], spec.name
    inside = [i.name for i in model.graph.initializer if not i.external_data]
    assert sum(len(i.raw_data) for i in model.graph.initializer) < 1000, inside
    assert (tiny_bundle / "decoder.onnx").stat().st_size < 200_000


def test_verification_figures_are_recorded(tiny_bundle: Path) -> None:
    figures = open_bundle(tiny_bundle).manifest.verification
    assert figures["rows"] == 55
    assert 0 < float(str(figures["max_logit_difference"])) <= 1e-4
    assert "Verified against its source" in (tiny_bundle / "README.md").read_text()


@pytest.mark.parametrize("precision", [None, "bf16", "int4"])
def test_a_bundle_for_cuda_records_what_its_precision_costs(
    precision: str | None, tiny_model: Path, tmp_path: Path
) -> None:
    manifest = build_bundle(tiny_model, tmp_path / "out", target="cuda", precision=precision)
    name = precision or "fp16"
    assert next((g.dialect, g.precision) for g in manifest.graphs) == ("paged", name)
    figures = manifest.verification
    assert figures["weights_precision"] == name
    least, most = {"fp16": (1e-4, 0.02), "bf16": (0.01, 0.2), "int4": (0.3, 3.0)}[name]
    assert least < float(str(figures["weights_max_logit_difference"])) < most
    assert "rows" not in figures  # which would say that the graph was run
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"an NVIDIA GPU (cuda), {name}" in card
    assert "was not run when the bundle was built" in card
    bundle = open_bundle(tmp_path / "out", verify="full")
    sizes = {n: e.size for n, e in manifest.files.items()}
    expected = sizes["decoder.onnx"] + sizes["model.safetensors"]
    assert memory_plan.weight_bytes(manifest, "paged") == expected
    with pytest.raises(BundleError, match=r"only in paged: .* build --target cpu"):
        bundle.graph_path("slots")


def test_a_bundle_whose_weights_are_not_the_models_fails_the_gate(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of one kind of matrix in the wrong order."""
    encode = Precision.encode

    def swapped(self: Precision, parameter: str, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        stored = encode(self, parameter, rows)
        return tuple(s[::-1].copy() if "down_proj" in parameter else s for s in stored)

    monkeypatch.setattr(Precision, "encode", swapped)
    with pytest.raises(ExportError, match="the weights in fp16 are not those of the model: "):
        build_bundle(tiny_model, tmp_path / "out", target="cuda")
    assert names(tmp_path) == set()


def test_licence_and_notice_travel(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "LICENSE.txt").write_text("terms")
    (model / "NOTICE").write_text("notice")
    build_bundle(model, tmp_path / "out")
    manifest = open_bundle(tmp_path / "out").manifest
    assert set(manifest.licence.files) == {"LICENSE.txt", "NOTICE"}
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "terms"


def test_verify_finds_a_graph_that_computes_something_else(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """One weight of the bundle changes a little, and the manifest says it was always so."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    assert verify_bundle(bundle, tiny_model).passed
    path = bundle / "model.safetensors"
    weights = load_file(path)
    data = bytearray(path.read_bytes())
    name = "model.layers.1.mlp.down_proj.weight"
    start = data.index(weights[name].tobytes())
    data[start : start + 4] = np.float32(0.5).tobytes()
    path.write_bytes(data)
    with pytest.raises(BundleError, match="altered"):
        verify_bundle(bundle, tiny_model)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = vars_of(path)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert not verify_bundle(bundle, tiny_model).passed


def vars_of(path: Path) -> dict[str, object]:
    entry = describe_file(path)
    return {"size": entry.size, "sha256": entry.sha256}


def test_verify_refuses_another_source(tiny_bundle: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + np.float32(1e-3)
    save_file(weights, other / "model.safetensors")
    with pytest.raises(ExportError, match="was built from"):
        verify_bundle(tiny_bundle, other)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"precision": "fp4"}, "precision 'fp4'.* slots .*knows fp32, int8,"),
        ({"dialect": "of later"}, "dialect 'of later'"),
        (None, "no graph of a decoder"),
    ],
)
def test_verify_says_what_it_does_not_know_of_another_version(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path, changed: dict[str, str] | None, said: str
) -> None:
    """It ended in a KeyError, or a StopIteration."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    decoder, sampler = manifest["graphs"]
    manifest["graphs"] = [sampler] if changed is None else [decoder | changed, sampler]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match=said):
        verify_bundle(bundle, tiny_model)


def test_failed_gate_leaves_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_export.verify.LOGIT_TOLERANCE", 1e-9)
    with pytest.raises(ExportError, match="does not compute what the model does"):
        build_bundle(tiny_model, tmp_path / "out")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_graph_that_gives_no_numbers_fails_the_gate(
    value: float, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: OrtCpu, step: Step) -> np.ndarray:
        return np.full((len(step.logits_rows), tiny_config().vocab_size), value, np.float32)

    monkeypatch.setattr(OrtCpu, "run", broken)
    with pytest.raises(ExportError, match="differ by up to inf"):
        build_bundle(tiny_model, tmp_path / "out")
    assert names(tmp_path) == set()


def test_output_in_use_is_refused_before_anything_runs(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    with pytest.raises(ExportError, match="not empty"):
        build_bundle(tiny_model, tmp_path / "out")
    with pytest.raises(ExportError, match="holds no bundle"):
        build_bundle(tiny_model, tmp_path / "out", force=True)
    with pytest.raises(ExportError, match="not a directory"):
        build_bundle(tiny_model, tmp_path / "out" / "thesis.txt")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years"


def test_force_replaces_a_bundle_and_nothing_else(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(tiny_bundle, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="will not replace"):
        build_bundle(tiny_model, out, force=True)
    (out / "notes.txt").unlink()
    build_bundle(tiny_model, out, force=True)
    assert open_bundle(out, verify="full").manifest.name == tiny_model.name
    assert names(tmp_path) == {"out"}


def test_full_disk_is_one_sentence_and_leaves_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llama_export.build.save_graph", full)
    with pytest.raises(ExportError, match=r"can't be written: .*No space left"):
        build_bundle(tiny_model, tmp_path / "out")
    assert names(tmp_path) == set()


def test_weights_that_are_not_numbers_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = np.nan
    save_file(weights, model / "model.safetensors")
    with pytest.raises(ExportError, match=r"model\.norm\.weight hold values that are not finite"):
        build_bundle(model, tmp_path / "out")
    assert names(tmp_path) == {"model"}
