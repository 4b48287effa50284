"""Engines are built from a graph that TensorRT understood, or not at all.

Building needs no GPU with TensorRT-RTX; running does, and is tested elsewhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from llama_runtime.contract import TENSORRT, DType, Geometry
from llama_runtime.errors import BackendError, CapacityError, DependencyError, RequestError
from llama_runtime.tensorrt import engine_build, library, progress
from llama_runtime.tensorrt.engine_build import BuiltEngine, build_engine, check_memory
from llama_runtime.tensorrt.library import Library, import_tensorrt, messages, parse_targets
from llama_runtime.tensorrt.limits import EngineLimits
from llama_runtime.tensorrt.network import check_network, parse_network
from llama_runtime.tensorrt.static_axis import with_static_axis

TINY = Geometry(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    hidden_size=64,
    intermediate_size=128,
    vocab_size=512,
    max_positions=256,
)
LIMITS = EngineLimits(max_batch=4, max_len=192)
RTX_TARGETS = ("sm80", "sm86", "sm89", "sm120")
ELEMENT = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
KINDS = {**ELEMENT, "int64": TensorProto.INT64}

LAYER = """
    n{i} = RMSNormalization <epsilon = 0.00001> (x{i}, norm{i})
    qkv{i} = Gemm <transB = 1> (n{i}, qkv_proj{i})
    padded{i} = Gather (qkv{i}, unpack)
    heads{i} = Reshape <allowzero = 1> (padded{i}, cells_shape)
    swapped{i} = Transpose <perm = [0, 2, 1, 3]> (heads{i})
    q{i}, k{i}, v{i} = Split <axis = 1> (swapped{i}, splits)
    qr{i} = RotaryEmbedding (q{i}, cos, sin, positions)
    kr{i} = RotaryEmbedding (k{i}, cos, sin, positions)
    "present.{i}.key" = TensorScatter <axis = -2, mode = "linear">
        ("past_key_values.{i}.key", kr{i}, past_lengths)
    "present.{i}.value" = TensorScatter <axis = -2, mode = "linear">
        ("past_key_values.{i}.value", v{i}, past_lengths)
    seen{i} = Attention <is_causal = 0> (qr{i}, "present.{i}.key", "present.{i}.value", mask)
    back{i} = Transpose <perm = [0, 2, 1, 3]> (seen{i})
    flat{i} = Reshape (back{i}, rows_shape)
    packed{i} = Gather (flat{i}, pack)
    o{i} = Gemm <transB = 1> (packed{i}, o_proj{i})
    y{i} = Add (x{i}, o{i})
    m{i} = RMSNormalization <epsilon = 0.00001> (y{i}, mlp_norm{i})
    gate{i} = Gemm <transB = 1> (m{i}, gate_proj{i})
    up{i} = Gemm <transB = 1> (m{i}, up_proj{i})
    s{i} = Sigmoid (gate{i})
    g{i} = Mul (gate{i}, s{i})
    h{i} = Mul (g{i}, up{i})
    down{i} = Gemm <transB = 1> (h{i}, down_proj{i})
    x{j} = Add (y{i}, down{i})
"""
BEFORE = """
    x0 = Gather (embedding, input_ids)
    batch = Shape <start = 0, end = 1> (unpack)
    width = Shape <start = 1> (unpack)
    width0 = Squeeze (width)
    capacity = Shape <start = 2, end = 3> ("past_key_values.0.key")
    capacity0 = Squeeze (capacity)
    cells_shape = Concat <axis = 0> (batch, width, all_heads, head_dim)
    past = Unsqueeze (past_lengths, one)
    steps = Range (zero0, width0, one0)
    positions = Add (past, steps)
    columns = Range (zero0, capacity0, one0)
    last = Unsqueeze (positions, two)
    seen = LessOrEqual (columns, last)
    mask = Unsqueeze (seen, one)
"""
AFTER = """
    rows = Gather (x{num_layers}, logits_rows)
    n = RMSNormalization <epsilon = 0.00001> (rows, norm)
    logits = Gemm <transB = 1> (n, lm_head)
"""


def write_graph(folder: Path, geometry: Geometry, precision: DType) -> Path:
    """A decoder in the dialect, its weights beside it, as the exporter lays them out."""
    g = geometry
    heads = g.num_heads + 2 * g.num_kv_heads
    shapes = {"embedding": (g.vocab_size, g.hidden_size), "norm": (g.hidden_size,)}
    shapes["lm_head"] = (g.vocab_size, g.hidden_size)
    shapes |= dict.fromkeys(("cos", "sin"), (g.max_positions + 512, g.head_dim // 2))
    for i in range(g.num_layers):
        shapes |= {f"norm{i}": (g.hidden_size,), f"mlp_norm{i}": (g.hidden_size,)}
        shapes[f"qkv_proj{i}"] = (heads * g.head_dim, g.hidden_size)
        shapes[f"o_proj{i}"] = (g.hidden_size, g.num_heads * g.head_dim)
        shapes |= {
            f"{name}_proj{i}": (g.intermediate_size, g.hidden_size) for name in ("gate", "up")
        }
        shapes[f"down_proj{i}"] = (g.hidden_size, g.intermediate_size)
    constants: dict[str, Any] = {
        "one": [1],
        "two": [2],
        "zero0": 0,
        "one0": 1,
        "all_heads": [heads],
        "head_dim": [g.head_dim],
        "splits": [g.num_heads, g.num_kv_heads, g.num_kv_heads],
        "rows_shape": [-1, g.num_heads * g.head_dim],
    }
    dialect = TENSORRT.typed(precision)
    sizes = {"K": g.num_kv_heads, "D": g.head_dim, "V": g.vocab_size}
    inputs, outputs = (
        [
            helper.make_tensor_value_info(
                one.name, KINDS[one.dtype], [sizes.get(axis, axis) for axis in one.axes]
            )
            for one in specs
        ]
        for specs in (
            (*dialect.inputs, *dialect.cache_inputs(g.num_layers)),
            (dialect.logits, *dialect.cache_outputs(g.num_layers)),
        )
    )
    text = BEFORE + "".join(LAYER.format(i=i, j=i + 1) for i in range(g.num_layers))
    text += AFTER.format(num_layers=g.num_layers)
    nodes = onnx.parser.parse_graph(f"decoder () => () {{ {text} }}").node
    for node in nodes:
        node.name = f"node_of_{node.output[0]}"
    rng = np.random.default_rng(0)
    tensors, weights = {}, []
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32) * np.float32(0.05)
        halves = (values.view(np.uint32) >> 16).astype(np.uint16)  # which are bfloat16
        tensors[name] = values.astype(np.float16) if precision == "float16" else halves
    save_file(tensors, folder / "model.safetensors")
    header = (folder / "model.safetensors").read_bytes()[: 2**20]
    length = int.from_bytes(header[:8], "little")
    places = json.loads(header[8 : 8 + length])
    for name, shape in shapes.items():
        tensor = TensorProto(name=name, dims=shape, data_type=ELEMENT[precision])
        tensor.data_location = TensorProto.EXTERNAL
        begin, end = places[name]["data_offsets"]
        place = {
            "location": "model.safetensors",
            "offset": 8 + length + begin,
            "length": end - begin,
        }
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        weights.append(tensor)
    weights += [
        numpy_helper.from_array(np.array(value, np.int64), name)
        for name, value in constants.items()
    ]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    path = folder / "decoder.onnx"
    path.write_bytes(model.SerializeToString())
    return path


# --- the library --------------------------------------------------------------------------------


class FakeImports:
    """Stands for what is installed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: name if name in versions else None
        )
        monkeypatch.setattr(importlib, "import_module", lambda name: _module(versions[name]))


def _module(version: str) -> Any:
    if version == "broken":
        raise OSError("libnvinfer.so: cannot open shared object file")
    members = {"NONE": 0, "CURRENT": 1, "SM80": 80, "SM120": 120}
    return SimpleNamespace(
        __version__=version, ComputeCapability=SimpleNamespace(__members__=members)
    )


def test_tensorrt_is_preferred_to_tensorrt_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeImports(monkeypatch, tensorrt="10.15.1.29", tensorrt_rtx="1.7.1.116")
    assert import_tensorrt().name == "tensorrt"
    rtx = import_tensorrt("tensorrt_rtx")
    assert (rtx.name, rtx.version) == ("tensorrt_rtx", "1.7.1.116")
    FakeImports(monkeypatch, tensorrt_rtx="1.7.1.116")
    assert import_tensorrt().name == "tensorrt_rtx"
    with pytest.raises(RequestError, match="library must be"):
        import_tensorrt("tensorflow")


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        ({}, r"tensorrt and tensorrt_rtx can't be found: pip install 'llama-caravan\[tensorrt-rtx"),
        ({"tensorrt": "10.14.1"}, "10.14.1, and 10.15 is the first"),
        ({"tensorrt": "9.99"}, "9.99, and 10.15 is the first"),
        ({"tensorrt_rtx": "1.6.0"}, "1.6.0, and 1.7 is the first"),
        ({"tensorrt": "broken"}, r"can't be imported \(libnvinfer.*pypi.nvidia.com"),
    ],
    ids=["none", "old", "much older", "old RTX", "broken"],
)
def test_a_library_that_will_not_do_is_refused(
    versions: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeImports(monkeypatch, **versions)
    with pytest.raises(DependencyError, match=says):
        import_tensorrt()


def test_targets_are_those_of_the_library() -> None:
    rtx = Library("tensorrt_rtx", "1.7.1", _module("1.7.1"))
    assert parse_targets(" SM120, sm80,sm80", rtx) == ("sm80", "sm120")
    assert parse_targets("current", rtx) == ("current",)
    for text in ("sm90", "", "sm80,", "none", "sm80,current"):
        with pytest.raises(RequestError) as caught:
            parse_targets(text, rtx)
        assert caught.value.param == "for"
    with pytest.raises(RequestError, match=r"'sm90': it has current, sm80, sm120$"):
        parse_targets("sm90", rtx)
    full = Library("tensorrt", "10.15", _module("10.15"))
    assert parse_targets("current", full) == ("current",)
    with pytest.raises(RequestError, match="it has current, the GPU of the machine that builds"):
        parse_targets("sm80", full)


# --- the axis -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 127, 128, 300, 2**31])
def test_only_the_axis_changes(size: int, tmp_path: Path) -> None:
    graph = write_graph(tmp_path, TINY, "float16").read_bytes()
    model = onnx.load_from_string(graph)
    between = helper.make_tensor_value_info("columns", TensorProto.INT64, ["C", "CC", 7, None])
    between.type.tensor_type.shape.dim[0].denotation = "capacity"
    model.graph.value_info.append(between)
    model.graph.doc_string = "C"
    graph = model.SerializeToString()
    count = 0
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == "C":
                count += 1
                dimension.dim_value = size
    assert count == 4 * TINY.num_layers + 1
    changed = with_static_axis(graph, "C", size)
    assert onnx.load_from_string(changed) == model
    # Protobuf writes fields by number, and so does this: the rest is the same, byte for byte.
    assert changed == model.SerializeToString()
    assert with_static_axis(changed, "C", 5) == changed
    assert with_static_axis(graph, "X", 5) == graph


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    graph = write_graph(tmp_path, TINY, "float16").read_bytes()
    for data in (graph[:-1], b"\xff" * 20, b"\x3a\x05\x5a", b"\x0f"):
        with pytest.raises(BackendError, match="not an ONNX graph"):
            with_static_axis(data, "C", 128)


# --- progress -----------------------------------------------------------------------------------


def test_nested_phases_make_one_fraction_that_never_falls() -> None:
    phases = progress.PhaseTree()
    phases.start("all", None, 4)
    phases.step("all", 0)
    assert phases.fraction == 1 / 4
    phases.start("part", "all", 2)  # which is given half of the second quarter
    phases.step("part", 0)
    assert phases.fraction == 1 / 4 + 1 / 16
    phases.start("piece", "part", 2)  # half of the second half of that
    phases.step("piece", 0)
    assert phases.fraction == 1 / 4 + 1 / 16 + 1 / 64
    phases.finish("piece")
    assert phases.fraction == 1 / 4 + 1 / 16 + 1 / 32
    phases.finish("part")
    assert phases.fraction == 1 / 4 + 1 / 8
    phases.start("part", "all", 2)  # half of what the step has left
    phases.step("part", 0)
    assert phases.fraction == 1 / 4 + 1 / 8 + 1 / 32
    phases.step("part", 0)  # which TensorRT has said
    phases.step("unknown", 3)
    phases.finish("unknown")
    assert phases.fraction == 1 / 4 + 1 / 8 + 1 / 32
    phases.step("all", 1)
    assert phases.fraction == 1 / 2
    phases.step("part", 1)  # late, from another thread
    assert phases.fraction == 1 / 2
    phases.start("late", "part", 1)
    phases.finish("late")
    assert phases.fraction == 1 / 2
    phases.step("all", 7)  # more than there were to be
    assert phases.fraction == 1
    phases.finish("all")
    assert phases.fraction == 1
    phases.start("all", None, 4)
    phases.step("all", 0)
    assert phases.fraction == 1


# --- TensorRT, which isn't here -----------------------------------------------------------------


class FakeConfig:
    """A configuration of TensorRT, which knows the timing cache ``known`` only."""

    def __init__(self, known: bytes) -> None:
        self._known = known
        self.cache: bytes | None = None
        self.profiles: list[dict[str, Any]] = []

    def create_timing_cache(self, data: bytes) -> bytes:
        return data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache not in (b"", self._known):
            return False
        self.cache = cache
        return True

    def add_optimization_profile(self, profile: dict[str, Any]) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1


class FakeProfile(dict[str, Any]):
    def set_shape(self, name: str, *shapes: Any) -> None:
        self[name] = shapes


@pytest.mark.parametrize(
    ("given", "used"), [(b"", b""), (b"ours", b"ours"), (b"another GPU's", b"")]
)
def test_tensorrt_starts_with_a_timing_cache_if_it_is_its_own(given: bytes, used: bytes) -> None:
    config = FakeConfig(known=b"ours")
    builder = SimpleNamespace(
        create_builder_config=lambda: config, create_optimization_profile=FakeProfile
    )
    full = Library("tensorrt", "10.15", _module("10.15"))
    made = engine_build._config(full, builder, TINY, LIMITS, ("current",), given)
    assert made is config
    assert config.cache == used
    decode, prompt = config.profiles  # in this order, which the backend counts on
    assert decode["unpack"] == ((1, 1), (2, 1), (4, 1))
    assert prompt["unpack"] == ((1, 1), (1, 96), (1, 192))
    assert decode["past_key_values.1.value"][2] == (4, 2, 192, 32)


# --- the real library ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trt() -> Library:
    """TensorRT-RTX, which builds without a GPU."""
    pytest.importorskip("tensorrt_rtx")
    return import_tensorrt("tensorrt_rtx")


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(tmp_path, TINY, "float16")


def _build(graph: Path, trt: Library, **options: Any) -> BuiltEngine:
    settings: dict[str, Any] = {"precision": "float16", "targets": RTX_TARGETS[:1], **options}
    return build_engine(graph, TINY, LIMITS, library=trt, **settings)


def _edit(graph: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(graph, load_external_data=False)
    change(model)
    graph.write_bytes(model.SerializeToString())


def _node(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.output[0] == output)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_an_engine_for_every_target(precision: DType, trt: Library, tmp_path: Path) -> None:
    graph = write_graph(tmp_path, TINY, precision)
    weights = (tmp_path / "model.safetensors").stat().st_size
    sizes = []
    for targets in (*((one,) for one in RTX_TARGETS), RTX_TARGETS):
        fractions: list[float] = []
        built = _build(
            graph, trt, precision=precision, targets=targets, on_progress=fractions.append
        )
        sizes.append(built.plan.nbytes - weights)
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1
        assert built.seconds > 0
        assert "info: Engine generation completed" in built.log
    # Weights once, and 4.5 MB of code, which TensorRT-RTX 1.7.1 shares between its targets.
    assert all(0 < size < 8e6 for size in sizes), sizes
    assert max(sizes) < 1.1 * min(sizes), sizes


def test_the_plan_holds_the_weights_of_the_file(trt: Library, graph: Path) -> None:
    """At their offsets: external data that isn't found, or is found elsewhere, would show here."""
    plan = bytes(_build(graph, trt).plan)
    weights = graph.with_name("model.safetensors").read_bytes()
    model = onnx.load(graph, load_external_data=False)
    for name in ("lm_head", "down_proj1", "o_proj0"):
        tensor = next(one for one in model.graph.initializer if one.name == name)
        place = {entry.key: entry.value for entry in tensor.external_data}
        offset, length = int(place["offset"]), int(place["length"])
        assert weights[offset : offset + length] in plan, name


def _causal(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "Attention":
            del node.attribute[:], node.input[3:]
            node.attribute.append(helper.make_attribute("is_causal", 1))


def _without_mask(model: onnx.ModelProto) -> None:
    del _node(model, "seen1").input[3:]


def _second_mask(model: onnx.ModelProto) -> None:
    _node(model, "seen1").input[3] = "other"
    model.graph.node.insert(
        12, helper.make_node("LessOrEqual", ["columns", "last"], ["le"], name="le")
    )
    model.graph.node.insert(13, helper.make_node("Unsqueeze", ["le", "one"], ["other"], name="u"))


def _added_mask(model: onnx.ModelProto) -> None:
    """A mask of numbers, to be added to the scores."""
    _node(model, "mask").input[0] = "added"
    cast = helper.make_node("Cast", ["seen"], ["added"], to=TensorProto.FLOAT16, name="cast")
    position = [node.output[0] for node in model.graph.node].index("mask")
    model.graph.node.insert(position, cast)


def _narrow_mask(model: onnx.ModelProto) -> None:
    """One column, which is broadcast over the whole cache."""
    _node(model, "seen").input[0] = "one"


def _crossed_caches(model: onnx.ModelProto) -> None:
    first, second = (_node(model, f"present.{i}.value") for i in (0, 1))
    first.input[0], second.input[0] = second.input[0], first.input[0]


def _crossed_outputs(model: onnx.ModelProto) -> None:
    key, value = (_node(model, f"present.0.{part}") for part in ("key", "value"))
    key.output[0], value.output[0] = value.output[0], key.output[0]


def _other_places(model: onnx.ModelProto) -> None:
    scatter = _node(model, "present.1.key")
    scatter.input[2] = "elsewhere"
    zeros = helper.make_node("Sub", ["past_lengths", "one"], ["elsewhere"], name="sub")
    model.graph.node.insert(0, zeros)


def _circular(model: onnx.ModelProto) -> None:
    scatter = _node(model, "present.1.key")
    next(one for one in scatter.attribute if one.name == "mode").s = b"circular"


def _fixed_capacity(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        if value.name.endswith(("key", "value")):
            value.type.tensor_type.shape.dim[2].dim_value = 512


def _other_heads(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        if value.name.endswith(("key", "value")):
            value.type.tensor_type.shape.dim[1].ClearField("dim_value")
            value.type.tensor_type.shape.dim[1].dim_param = "K"


def _one_layer_unmasked(model: onnx.ModelProto) -> None:
    """A layer's attention is spelled out, so TensorRT sees one attention less."""
    _node(model, "seen1").CopyFrom(
        helper.make_node("Identity", ["qr1"], ["seen1"], name="identity")
    )


BROKEN: dict[Callable[[onnx.ModelProto], None], str] = {
    _causal: "has a causality of its own",
    _without_mask: "has no mask",
    _second_mask: "use 2 masks and must share one",
    _narrow_mask: r"is BOOL \[\?, 1, \?, 1\] and must be BOOL \[..., 192\]",
    _added_mask: "is HALF .* and must be BOOL",
    _crossed_caches: r"'present.0.value' is an update of 'past_key_values.1.value' and must be one",
    _crossed_outputs: r"'present.0.key' is an update of 'past_key_values.0.value' and must be one",
    _other_places: "writes at ",
    _circular: "Only linear mode is supported",
    _fixed_capacity: r"is HALF \[\?, 2, 512, 32\] and must be HALF \[\?, 2, 192, 32\]",
    _other_heads: r"is HALF \[\?, \?, 192, 32\] and must be HALF \[\?, 2, 192, 32\]",
    _one_layer_unmasked: "has 1 attention layers and must have 2",
}


@pytest.mark.parametrize("change", BROKEN, ids=lambda change: change.__name__.strip("_"))
def test_a_network_that_was_not_meant_is_refused(
    change: Callable[[onnx.ModelProto], None], trt: Library, graph: Path
) -> None:
    _edit(graph, change)
    with pytest.raises(BackendError, match=BROKEN[change]):
        _build(graph, trt)


def test_a_network_of_another_precision_or_model_is_refused(trt: Library, graph: Path) -> None:
    with pytest.raises(BackendError, match=r"is HALF .* and must be BF16"):
        _build(graph, trt, precision="bfloat16")


def test_a_network_whose_types_tensorrt_may_choose_is_refused(trt: Library, graph: Path) -> None:
    """TensorRT-RTX makes no such network, TensorRT does."""

    class Weak:
        def __init__(self, definition: Any) -> None:
            self._definition = definition

        def get_flag(self, _: Any) -> bool:
            return False

        def __getattr__(self, name: str) -> Any:
            return getattr(self._definition, name)

    log = library.process_logger(trt)
    builder = trt.module.Builder(log)
    network = parse_network(trt, log, builder, graph, LIMITS)
    check_network(trt, network.definition, TINY, LIMITS, "float16")
    with pytest.raises(BackendError, match="its types are TensorRT's choice"):
        check_network(trt, Weak(network.definition), TINY, LIMITS, "float16")


def test_an_operator_that_tensorrt_does_not_have_is_named(trt: Library, graph: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        _node(model, "s1").op_type = "Multinomial"

    _edit(graph, change)
    with pytest.raises(BackendError, match="operator Multinomial of the node 'node_of_s1'"):
        _build(graph, trt)


def test_weights_that_are_not_there_are_named(trt: Library, graph: Path) -> None:
    graph.with_name("model.safetensors").unlink()
    with pytest.raises(BackendError, match=r"tensorrt_rtx can't parse .*initializer: embedding"):
        _build(graph, trt)


def test_a_graph_that_can_not_be_built_gives_the_reason(trt: Library, tmp_path: Path) -> None:
    graph = write_graph(tmp_path, TINY, "bfloat16")
    with pytest.raises(BackendError, match=r"can't build .*sm75"):  # which has no bfloat16
        _build(graph, trt, precision="bfloat16", targets=("sm75",))


def test_memory_is_looked_at_first(monkeypatch: pytest.MonkeyPatch, graph: Path) -> None:
    with graph.with_name("model.safetensors").open("r+b") as file:
        file.truncate(4_000_000_000)
    free = SimpleNamespace(num_bytes=9_100_000_000, bound="container")
    monkeypatch.setattr(engine_build, "available_memory", lambda **_: free)
    with pytest.raises(
        CapacityError,
        match=r"4\.00 GB of weights takes about 9\.2 GB .* container has 9\.1 GB free",
    ):
        build_engine(
            graph,
            TINY,
            LIMITS,
            precision="float16",
            targets=("sm80",),
            library=Library("tensorrt_rtx", "1.7.1", None),
        )
    free.num_bytes = 9_300_000_000
    check_memory(graph, TINY.num_layers)
    with pytest.raises(CapacityError, match=r"takes about 9\.6 GB"):
        check_memory(graph, TINY.num_layers + 30)
    _edit(graph, lambda model: setattr(_node(model, "s1"), "op_type", "DequantizeLinear"))
    with pytest.raises(CapacityError, match=r"takes about 13\.2 GB"):
        check_memory(graph, TINY.num_layers)


def _building() -> bool:
    """Whether TensorRT is still at work, but for the last instructions of its thread."""
    threads = [one for one in threading.enumerate() if one.name == "tensorrt-build"]
    for thread in threads:
        thread.join(0.05)
    return any(thread.is_alive() for thread in threads)


def test_what_on_progress_raises_ends_the_build(trt: Library, graph: Path) -> None:
    class EnoughError(Exception):
        pass

    def enough(fraction: float) -> None:
        assert threading.current_thread() is threading.main_thread()
        raise EnoughError

    with pytest.raises(EnoughError):
        _build(graph, trt, on_progress=enough)
    assert not _building()
    assert _build(graph, trt).plan.nbytes


def test_an_interrupt_ends_the_build(trt: Library, tmp_path: Path) -> None:
    large = Geometry(6, 8, 4, 64, 1024, 4096, 8000, 256)
    graph = write_graph(tmp_path, large, "float16")
    fractions: list[float] = []

    def report(fraction: float) -> None:
        fractions.append(fraction)
        if len(fractions) == 2:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()

    with messages() as said, pytest.raises(KeyboardInterrupt):
        build_engine(
            graph,
            large,
            LIMITS,
            precision="float16",
            targets=("sm80",),
            library=trt,
            on_progress=report,
        )
    assert not _building()
    assert "Detected 9 inputs" not in said.text  # the tiny model's: this one has 17
    assert "Detected 17 inputs" in said.text
    assert "Engine generation completed" not in said.text


def test_everyone_who_listens_hears_tensorrt(trt: Library) -> None:
    log = library.process_logger(trt)
    severity = trt.module.ILogger.Severity
    with messages() as first:
        log.log(severity.INFO, "one")
        with messages() as second:
            log.log(severity.ERROR, "two")
            log.log(severity.VERBOSE, "not this")
        log.log(severity.WARNING, "three")
    log.log(severity.ERROR, "to nobody")
    assert first.text == "info: one\nerror: two\nwarning: three\n"
    assert second.errors == ["two"]
    assert library.process_logger(trt) is log
