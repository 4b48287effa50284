"""Others on the same GPU in the same run, at the same work: decoding around a context of 256.

Each runs in a process of its own: ONNX Runtime GenAI on a model that its own builder made, as it
is and with its CUDA graphs on, and transformers with a static cache and compiled steps. All are
greedy.

    python -m scripts.bench_gpu_peers {genai | genai-graphs | transformers} MODEL BATCH ROUNDS
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

CONTEXT = 256
TIMED_STEPS = 64
LEAD = 16

Results = dict[str, Any]


def peers(folder: Path, shape: str, batches: list[int], rounds: int) -> Results:
    """Milliseconds of a step of each peer, by batch; a reason where there is none."""
    source = _source(folder, shape)
    results: Results = {}
    built = _genai_model(folder, shape, source)
    for name, model in (("genai", built), ("genai-graphs", built), ("transformers", source)):
        results[name] = {}
        for batch in batches:
            command = [sys.executable, "-m", "scripts.bench_gpu_peers", name, str(model)]
            done = subprocess.run(
                [*command, str(batch), str(rounds)], capture_output=True, text=True, check=False
            )
            if done.returncode == 0:
                found = json.loads(done.stdout.splitlines()[-1])
                print(f"{shape}: {name} B={batch:<4} {found:.3f} ms", flush=True)
            else:
                found = done.stderr.strip().splitlines()[-1:] or ["it ended without a word"]
                print(f"{shape}: {name} B={batch:<4} {found[0]:.200}", flush=True)
            results[name][batch] = found
    return results


def _source(folder: Path, shape: str) -> Path:
    """A Hugging Face directory of the shape, random weights in fp16, made unless it is there."""
    directory = folder / f"{shape}-huggingface"
    if directory.exists():
        return directory
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from llama_decoder.shapes import SHAPES
    from llama_export.random_weights import END, random_tokenizer

    c = SHAPES[shape]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling is not None:
        s = c.rope_scaling
        rope |= {"rope_type": s.kind, "factor": s.factor, "low_freq_factor": s.low_freq_factor}
        rope |= {
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_positions,
        }
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters=rope,
        max_position_embeddings=c.max_positions,
        tie_word_embeddings=c.tie_embeddings,
        bos_token_id=0,
        eos_token_id=c.vocab_size - 1,
    )
    with torch.device("cuda"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).half()
    model.save_pretrained(directory)
    file = directory / "tokenizer.json"
    file.write_bytes(random_tokenizer(c.vocab_size).tokenizer_json)
    PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=END).save_pretrained(directory)
    return directory


def _genai_model(folder: Path, shape: str, source: Path) -> Path:
    """The same for ONNX Runtime GenAI, fp16 for CUDA, by its own builder."""
    model = folder / f"{shape}-genai"
    if not model.exists():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source)]
        command += ["-o", str(model), "-p", "fp16", "-e", "cuda", "-c", str(folder / "cache")]
        command += ["--extra_options", "hf_token=false"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"onnxruntime_genai's builder failed: {done.stderr[-1500:]}", flush=True)
    return model


def genai(model: str, batch: int, rounds: int, *, graphs: bool = False) -> float:
    """Milliseconds of a step of ONNX Runtime GenAI."""
    import numpy as np
    import torch

    torch.cuda.init()  # type: ignore[no-untyped-call]  # which finds CUDA's libraries
    import onnxruntime_genai as og

    config = og.Config(model)
    config.set_provider_option("cuda", "enable_cuda_graph", "1" if graphs else "0")
    loaded = og.Model(config)
    length = CONTEXT - TIMED_STEPS // 2 - LEAD
    prompts = np.random.default_rng(1).integers(1, 1000, (batch, length)).astype(np.int32)
    times = []
    for _ in range(rounds + 1):
        params = og.GeneratorParams(loaded)
        total = length + LEAD + TIMED_STEPS + 8
        params.set_search_options(
            batch_size=batch, max_length=total, min_length=total, do_sample=False
        )
        generator = og.Generator(loaded, params)
        generator.append_tokens(prompts)
        for _ in range(LEAD):
            generator.generate_next_token()
        generator.get_sequence(0)
        started = time.perf_counter()
        for _ in range(TIMED_STEPS):
            generator.generate_next_token()
        generator.get_sequence(0)
        times.append(1e3 * (time.perf_counter() - started) / TIMED_STEPS)
    return statistics.median(times[1:])


def transformers(model: str, batch: int, rounds: int) -> float:
    """Milliseconds of a step of ``generate`` with a static cache, whose steps it compiles."""
    import torch
    from transformers import LlamaForCausalLM, StaticCache

    loaded = LlamaForCausalLM.from_pretrained(model, dtype=torch.float16, device_map="cuda")
    length = CONTEXT - TIMED_STEPS // 2 - LEAD
    prompts = torch.randint(1, 1000, (batch, length), device="cuda")
    mask = torch.ones_like(prompts)
    # One cache for all runs: one made for each would differ in length, and be compiled for anew.
    cache = StaticCache(loaded.config, max_cache_len=length + LEAD + TIMED_STEPS + 8)

    def run(count: int) -> float:
        cache.reset()
        torch.cuda.synchronize()
        started = time.perf_counter()
        loaded.generate(
            prompts,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            past_key_values=cache,
        )
        torch.cuda.synchronize()
        return time.perf_counter() - started

    run(LEAD)
    run(LEAD + TIMED_STEPS)
    run(LEAD)
    times = [run(LEAD + TIMED_STEPS) - run(LEAD) for _ in range(rounds)]
    return 1e3 * statistics.median(times) / TIMED_STEPS


def main() -> None:
    """Measure one peer; the last line is the figure."""
    peer, model, batch, rounds = sys.argv[1:]
    measures: dict[str, Callable[[str, int, int], float]] = {
        "genai": genai,
        "genai-graphs": partial(genai, graphs=True),
        "transformers": transformers,
    }
    print(json.dumps(measures[peer](model, int(batch), int(rounds))))


if __name__ == "__main__":
    main()
