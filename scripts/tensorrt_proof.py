"""The proofs that need a CUDA GPU and TensorRT; see ``scripts/check_gpu --tensorrt``.

For each shape and precision: a bundle with random weights, its engine, a ragged job that goes to
the corners of both profiles, compared with the decoder in float32; and how long a step takes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_decoder.config import LlamaConfig
from llama_decoder.shapes import SHAPES
from llama_export.build import write_bundle
from llama_export.device_check import MAX_TOKENS, check_engine
from llama_export.precisions import TENSORRT_PRECISIONS
from llama_export.sources import RandomSource
from llama_export.stages import Stages
from llama_runtime import LLM, SamplingParams, open_bundle
from llama_runtime.backends.cuda_device import Device
from llama_runtime.errors import CaravanError
from llama_runtime.tensorrt.library import import_tensorrt
from llama_runtime.tensorrt.limits import MAX_PROMPT_CHUNK
from llama_runtime.tensorrt_loading import loaded_engine, target_of, tensorrt_plan
from llama_runtime.tokenizer import Tokenizer
from scripts.bench_machine import machine
from scripts.gpu_proof import CONFIGS, LARGE

DIVERGENCE = {"fp16": 1e-3, "bf16": 3e-2, "int4": 1e-3}  # nats; the decoder has the same 4 bits
NUM_SLOTS, MAX_LEN = 6, 1100
# The least and the most of a chunk, one more than that, and what fills a slot to its end.
LENGTHS = (1, 2, MAX_PROMPT_CHUNK, MAX_PROMPT_CHUNK + 1, MAX_LEN - MAX_TOKENS, 33, 7, 300, 1, 90)
STEPS = 64

Results = dict[str, Any]


def main() -> None:
    """Run every proof, print each, and end with one JSON object to paste."""
    parser = argparse.ArgumentParser(prog="check_gpu --tensorrt", description=__doc__)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--only", action="append", help="proofs whose name holds this")
    args = parser.parse_args()
    try:
        library, device = import_tensorrt(), Device(0)
        target = target_of(device, library)
    except CaravanError as error:
        raise SystemExit(f"check_gpu: {error}") from error
    about = {"library": library.name, "library_version": library.version, "gpu": device.name}
    device.close()
    print(f"{library.name} {library.version}, {about['gpu']}, engines for {target}", flush=True)
    results: Results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, bundle, config, precision in cases(Path(scratch), large=args.large):
            if args.only and not any(part in name for part in args.only):
                continue
            results[name] = found = proof(bundle, config, precision)
            print(f"{'ok   ' if found['ok'] else 'WRONG'} {name}: {found['text']}", flush=True)
    failed = [name for name, found in results.items() if not found["ok"]]
    print(json.dumps({**machine(), **about, "failed": failed, "proofs": results}))
    raise SystemExit(bool(failed))


def cases(folder: Path, *, large: bool) -> Iterator[tuple[str, Path, LlamaConfig, str]]:
    """A name, a bundle, its shape and its precision."""
    shapes = {**CONFIGS, **({"Llama-3.2-1B": SHAPES["Llama-3.2-1B"]} if large else {})}
    for shape, config in shapes.items():
        for precision, recipe in TENSORRT_PRECISIONS.items():
            bundle = (LARGE if shape in SHAPES else folder) / f"{shape}-{precision}-tensorrt"
            if not bundle.exists():
                bundle.mkdir(parents=True)
                write_bundle(RandomSource(shape, 0, config), recipe, bundle, Stages())
            yield f"{shape}, {precision}", bundle, config, precision


def proof(path: Path, config: LlamaConfig, precision: str) -> Results:
    """Build the engine of a bundle, compare what it computes, and time its steps."""
    bundle, device = open_bundle(path, verify="size"), Device(0)
    started = time.perf_counter()
    try:
        plan = tensorrt_plan(bundle, device, NUM_SLOTS, MAX_LEN)
        byte_table = Tokenizer(bundle.tokenizer_path).byte_table
        engine = loaded_engine(bundle, device, plan, byte_table, ())
        seconds = time.perf_counter() - started
        weights, recipe = path / "model.safetensors", TENSORRT_PRECISIONS[precision]
        found = check_engine(engine, device.name, weights, config, recipe, LENGTHS)
        steps = {batch: step(path, batch) for batch in (1, 8, 32)}
    except CaravanError as error:
        return {"ok": False, "text": str(error)}
    close = found.device_max_divergence <= DIVERGENCE[precision]
    speed = ", ".join(f"{ms:.2f} ms at B={batch}" for batch, ms in steps.items())
    text = f"engine ready in {seconds:.1f} s; {found.summary()}; steps take {speed}"
    return {"ok": found.passed and close, "text": text, "steps": steps, **found.as_dict()}


def step(path: Path, batch: int) -> float:
    """Milliseconds of a step that decodes so many sequences, greedily, at a context of 256."""
    with LLM(path, max_batch=batch, max_len=512, verify="size") as llm:
        prompts = [[1 + i] * 200 for i in range(batch)]
        times = []
        for count in (16, 16 + STEPS, 16, 16 + STEPS):  # the first two warm it up
            params = SamplingParams(max_tokens=count, ignore_eos=True)
            started = time.perf_counter()
            llm.generate(prompts, params)
            times.append(time.perf_counter() - started)
    return 1e3 * (times[3] - times[2]) / STEPS


if __name__ == "__main__":
    main()
