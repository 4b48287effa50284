"""See ``scripts/prove_export_scale``."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llama_decoder.config import LlamaConfig
from llama_decoder.weights import parameters
from llama_export.random_weights import random_shape, random_tokenizer

LIMIT_GB = 8.0


def main() -> None:
    """Write the checkpoint, build both bundles, and say what they took."""
    options = _options()
    config = random_shape(options.shape)
    if options.layers is not None:
        config = replace(config, num_layers=options.layers)
    found: dict[str, Any] = {"shape": options.shape, "layers": config.num_layers}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        model = Path(name, "model")
        model.mkdir()
        # In a process of its own: what one has held counts as held by those that it starts.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as writer:
            found["checkpoint_gb"] = writer.submit(write_checkpoint, config, model).result() / 1e9
        print(
            f"{options.shape}, {config.num_layers} layers: {found['checkpoint_gb']:.1f} GB in bf16"
        )
        for precision in ("int8", "int4"):
            found[precision] = build(model, Path(name, "bundle"), precision, options.calibrate)
            peak, seconds = found[precision]["peak_gb"], found[precision]["seconds"]
            size = found[precision]["bundle_gb"]
            print(f"{precision}: {size:.1f} GB in {seconds:,.0f} s, {peak:.2f} GB resident at most")
    print(json.dumps(found))
    sys.exit(any(found[precision]["peak_gb"] > LIMIT_GB for precision in ("int8", "int4")))


def write_checkpoint(config: LlamaConfig, directory: Path) -> int:
    """Write a Hugging Face directory, a shard for each layer, and say how many bytes it has."""
    numbers = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(numbers))
    tokenizer = random_tokenizer(config.vocab_size)
    (directory / "tokenizer.json").write_bytes(tokenizer.tokenizer_json)
    places: dict[str, str] = {}
    total = 0
    for number, (_, group) in enumerate(groupby(_tensors(config), key=_shard)):
        tensors = dict(group)
        file = f"model-{number:05}.safetensors"
        save_file(tensors, directory / file)
        places |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def build(model: Path, bundle: Path, precision: str, calibrate: bool) -> dict[str, float]:
    """Build a bundle in a process of its own: seconds, its size and its largest resident memory."""
    command = [sys.executable, "-m", "llama_export", "build", model, "-o", bundle, "--force"]
    options = [
        "--precision",
        precision,
        "--no-quality",
        *([] if calibrate else ["--no-calibration"]),
    ]
    started = time.monotonic()
    process = subprocess.Popen([*map(str, command), *options], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"the build ended with {process.returncode}")
    return {
        "seconds": time.monotonic() - started,
        "bundle_gb": sum(path.stat().st_size for path in bundle.iterdir()) / 1e9,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
    }


def _tensors(config: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint, scaled so that activations keep their size."""
    random = torch.Generator().manual_seed(0)
    for parameter in parameters(config, "safetensors"):
        for part in parameter.parts:
            values = torch.empty(part.shape, dtype=torch.bfloat16).normal_(generator=random)
            if len(part.shape) == 1:
                values = 1 + 0.1 * values
            else:
                values /= part.shape[1] ** 0.5
            yield part.name, values


def _shard(tensor: tuple[str, torch.Tensor]) -> str:
    """What tensors of one file have in common: the layer's name, or else their own."""
    name = tensor[0]
    return ".".join(name.split(".")[:3]) if ".layers." in name else name


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="Llama-3.1-8B")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--folder", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
