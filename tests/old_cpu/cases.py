"""The cases that the worker runs under emulation, made with numpy on the real processor."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from llama_runtime.bundle import open_bundle
from llama_runtime.prompt_encoder import PromptEncoder
from tests.numpy_llama import Floats, NumpyLlama, read_weights

# Terms by columns: odd ones, less than a vector, more terms than the kernel's block of 256.
SHAPES = ((1, 1), (7, 5), (33, 65), (64, 192), (300, 130))
LONGER_SHAPES = ((576, 960), (1536, 576), (1000, 333), (576, 4096), (2048, 512))
BYTE_SHAPES = ((64, 33), (600, 70))
NUM_ROWS = 33
PROMPT_LENGTHS = (1, 2, 33, 34, 65, 7, 98)
COMPLETION_LENGTHS = (20, 3, 12, 9, 7, 15, 2)
SCHEDULES, MORE_SCHEDULES = 2, 40
CLEAR = 1e-3  # the best two logits of every row are further apart, so that tokens can be compared
NUM_BATCH_TOKENS = 8
BATCH_PROMPTS = ("a", "Two words", "A prompt of more than thirty-two bytes, which is two chunks.")


def write_cases(folder: Path, model: Path, bundle: Path, *, thorough: bool) -> None:
    """Fill a folder for the worker.

    Args:
        folder: an existing one; its ``bundle`` becomes a link.
        model: the Hugging Face directory that the bundle was built from.
        bundle: a tiny one.
        thorough: whether there is time for larger products and more schedules.
    """
    (folder / "bundle").symlink_to(bundle.resolve())
    for terms, columns in SHAPES + LONGER_SHAPES * thorough:
        _write_product(folder / f"product_{terms}_{columns}", terms, columns)
    for terms, columns in BYTE_SHAPES:
        write_byte_product(folder / f"bytes_{terms}_{columns}", terms, columns)
    reference = read_reference(model, bundle)
    write_requests(folder, reference)
    (folder / "schedules.json").write_text(str(MORE_SCHEDULES if thorough else SCHEDULES))
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in BATCH_PROMPTS))
    encoder = PromptEncoder(open_bundle(bundle))
    completions = [
        _completion(reference, list(encoder.encode(prompt)), NUM_BATCH_TOKENS)[0]
        for prompt in BATCH_PROMPTS
    ]
    (folder / "completions.json").write_text(json.dumps(completions))


def read_reference(model: Path, bundle: Path) -> NumpyLlama:
    """The numpy Llama of a bundle that was built from a Hugging Face directory."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    return NumpyLlama(config, read_weights(bundle / "model.safetensors"))


def _write_product(path: Path, terms: int, columns: int) -> None:
    """A Gemm as exported graphs hold it, packed rows for it, and what float64 makes of them."""
    rng = np.random.default_rng([terms, columns])
    weights = rng.standard_normal((columns, terms), np.float32) / np.float32(np.sqrt(terms))
    x = rng.standard_normal((NUM_ROWS, terms), np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "weights"], ["y"], transB=1, beta=0.0)],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", terms])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", columns])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(model, path.with_suffix(".onnx"))
    exact_x, exact_weights = x.astype(np.float64), weights.T.astype(np.float64)
    np.savez(
        path.with_suffix(".npz"),
        x=x,
        expected=exact_x @ exact_weights,
        scale=np.abs(exact_x) @ np.abs(exact_weights),
    )


def write_byte_product(path: Path, terms: int, columns: int) -> None:
    """Bytes times signed bytes as int8 graphs hold them, and what whole numbers make of them.

    Among them are the largest there can be, 255·127 of each term: without VNNI two of these don't
    fit into what x86 adds them up in. The matrix lies as it is read for the first result, and is
    turned while the graph loads for the second.
    """
    rng = np.random.default_rng([terms, columns])
    codes = rng.integers(0, 256, (NUM_ROWS, terms), dtype=np.uint8)
    matrix = rng.integers(-127, 128, (terms, columns), dtype=np.int8)
    codes[:2], matrix[:, 0], matrix[:, 1] = 255, 127, -127
    names = ("matrix", "turned")
    nodes = [helper.make_node("Transpose", ["table"], ["turned"])]
    nodes += [
        helper.make_node(
            "MatMulIntegerToFloat",
            ["codes", name, "one", "scales", "zero_point"],
            [f"y_{name}"],
            domain="com.microsoft",
        )
        for name in names
    ]
    tensors = {
        "matrix": matrix,
        "table": matrix.T.copy(),
        "one": np.array(1, np.float32),
        "scales": np.ones(columns, np.float32),
        "zero_point": np.array(128, np.uint8),
    }
    graph = helper.make_graph(
        nodes,
        "bytes",
        [helper.make_tensor_value_info("codes", TensorProto.UINT8, ["N", terms])],
        [
            helper.make_tensor_value_info(f"y_{name}", TensorProto.FLOAT, ["N", columns])
            for name in names
        ],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    domains = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    onnx.save(model, path.with_suffix(".onnx"))
    expected = (codes.astype(np.int64) - 128) @ matrix.astype(np.int64)
    np.savez(path.with_suffix(".npz"), codes=codes, expected=expected)


def write_requests(folder: Path, reference: NumpyLlama, seed: int = 1) -> None:
    """Random prompts, and numpy's logits and greedy tokens for each.

    Args:
        folder: where they go.
        reference: of a vocabulary of 512.
        seed: one without near ties.
    """
    choose = random.Random(seed)
    requests = []
    expected: dict[str, Any] = {}
    for i, (length, max_tokens) in enumerate(zip(PROMPT_LENGTHS, COMPLETION_LENGTHS, strict=True)):
        prompt = [choose.randrange(512) for _ in range(length)]
        token_ids, logits = _completion(reference, prompt, max_tokens)
        requests.append({"prompt": prompt, "max_tokens": max_tokens})
        expected[f"tokens_{i}"], expected[f"logits_{i}"] = np.array(token_ids), logits
    (folder / "requests.json").write_text(json.dumps(requests))
    np.savez(folder / "expected.npz", **expected)


def _completion(
    reference: NumpyLlama, prompt: list[int], num_tokens: int
) -> tuple[list[int], Floats]:
    token_ids, logits = reference.greedy(prompt, num_tokens)
    second, best = np.sort(logits, axis=-1)[:, -2:].T
    if (best - second).min() < CLEAR:
        raise ValueError(f"a near tie after a prompt of {len(prompt)} tokens: take another one")
    return token_ids, logits
