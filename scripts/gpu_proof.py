"""The proofs that need a CUDA GPU; see ``scripts/check_gpu``."""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from llama_decoder.config import LlamaConfig, RopeScaling
from llama_decoder.shapes import SHAPES
from llama_decoder.tiny import tiny_config
from llama_export.build import write_bundle
from llama_export.device_check import check_on_device
from llama_export.precisions import CUDA_PRECISIONS
from llama_export.sources import RandomSource
from llama_export.stages import Stages
from llama_runtime import LLM, SamplingParams, open_bundle
from llama_runtime.backends.cuda_device import Device
from llama_runtime.backends.cuda_sampler import CudaSampler
from llama_runtime.errors import CaravanError
from llama_runtime.grammar_masks import forbid, mask_words
from llama_runtime.grammars import Matcher
from llama_runtime.sampler import edit
from llama_runtime.sampling import NOT_FINITE, draw, likeliest, uniform
from llama_runtime.sequence import Sequence
from llama_runtime.step_arrays import ROW, row_of
from scripts.bench_gpu import device
from scripts.bench_machine import machine

WIDE = {"num_heads": 8, "num_kv_heads": 2, "hidden_size": 256, "intermediate_size": 512}
CONFIGS = {
    "d64-tied": tiny_config(
        **WIDE, head_dim=64, max_positions=2048, vocab_size=4096, tie_embeddings=True
    ),
    "d128-llama3": tiny_config(
        **WIDE,
        head_dim=128,
        max_positions=2048,
        vocab_size=1000,
        rope_scaling=RopeScaling(
            kind="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=32,
        ),
    ),
}
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "top_p": 0.5, "top_k": 100, "min_p": 0.01},
    {"temperature": 5.0, "top_p": 0.99},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.01, "top_p": 0.3},
    {"temperature": 100.0, "top_k": 50},
    {"temperature": 1.0, "top_p": 0.999999},
    {"temperature": 1.0, "min_p": 1.0},
]
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": -0.4}

LARGE = Path("/dev/shm/caravan")  # where scripts/bench_gpu has its bundles too

Results = dict[str, Any]


def main() -> None:
    """Run every proof, print each, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--only", action="append", help="proofs whose name holds this")
    parser.add_argument("--folder", type=Path, help="where bundles are made, and found again")
    args = parser.parse_args()
    results: Results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, proof in proofs(args.folder or Path(scratch), large=args.large):
            if args.only and not any(part in name for part in args.only):
                continue
            results[name] = found = proof()
            print(f"{'ok   ' if found['ok'] else 'WRONG'} {name}: {found['text']}", flush=True)
    failed = [name for name, found in results.items() if not found["ok"]]
    print(json.dumps({**machine(), **device(), "failed": failed, "proofs": results}))
    raise SystemExit(bool(failed))


Proof = Callable[[], Results]


def proofs(folder: Path, *, large: bool) -> Iterator[tuple[str, Proof]]:
    """The name of each proof, and what says whether it holds, with a sentence about it."""
    for vocab_size, dtype, deviation in (
        (128_256, "float16", 2.0),
        (128_256, "bfloat16", 0.7),
        (50_257, "float32", 3.0),
    ):
        name = f"sampler of {vocab_size:,} {dtype} logits"
        yield name, partial(_sampler, vocab_size, dtype, deviation)
    tied, config = made(folder, "d64-tied", "fp16"), CONFIGS["d64-tied"]
    yield "parameters of all kinds in one batch", partial(_company, tied)
    yield "completions held to a grammar, among others", partial(_grammars, tied)
    yield "a shared prefix changes nothing", partial(_prefixes, tied)
    yield "a replayed graph is the graph", partial(_replays, tied)
    yield "a batch whose size is found", partial(_auto, tied)
    many: dict[str, Any] = {"num_slots": 300, "prompt_lengths": [7, 40, 3] * 110}
    yield "300 sequences at once", partial(_checked, tied, config, "fp16", **many)
    small = made(folder, "d64-tied", "fp16+fp8kv")
    yield "d64-tied, fp16, an fp8 cache", partial(_checked, small, config, "fp16+fp8kv")
    for (shape, config), precision in product(CONFIGS.items(), ("fp16", "bf16", "int4")):
        bundle = made(folder, shape, precision)
        for size in (16, None) if precision == "fp16" else (None,):
            name = f"{shape}, {precision}, blocks of {size or 'the usual size'}"
            yield name, partial(_checked, bundle, config, precision, block_size=size)
    if large:
        bundle, config = made(LARGE, "Llama-3.2-1B", "fp16"), SHAPES["Llama-3.2-1B"]
        few = {"prompt_lengths": (1, 33, 257)}
        yield "Llama-3.2-1B, fp16", partial(_checked, bundle, config, "fp16", **few)


def made(folder: Path, shape: str, precision: str) -> Path:
    """A bundle of a shape with random weights, made unless it is there."""
    bundle = folder / f"{shape}-{precision}"
    if not bundle.exists():
        bundle.mkdir(parents=True)
        source = RandomSource(shape, 0, (CONFIGS | SHAPES)[shape])
        write_bundle(source, CUDA_PRECISIONS[precision], bundle, Stages())
    return bundle


def _checked(bundle: Path, config: LlamaConfig, precision: str, **options: Any) -> Results:
    opened = open_bundle(bundle, verify="size")
    try:
        found = check_on_device(opened, config, CUDA_PRECISIONS[precision], Device(0), **options)
    except CaravanError as error:
        return {"ok": False, "text": str(error)}
    return {"ok": found.passed, "text": found.summary(), **found.as_dict()}


def _replays(bundle: Path) -> Results:
    """The same job twice: the second time every step that decodes is a captured graph."""
    with LLM(bundle, max_batch=7, max_len=600, verify="size") as llm:
        prompts = _tokens(llm, [5, 300, 1, 64, 257, 8, 90, 33, 2])
        params = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=True)
        first, second = (llm.generate(prompts, params) for _ in range(2))
    return _same(first, second)


def _prefixes(bundle: Path) -> Results:
    """Prompts with a common beginning, computed by each of them and by the first alone."""
    with LLM(bundle, max_batch=4, max_len=1000, verify="size", prefix_tokens=0) as llm:
        head = _tokens(llm, [700])[0]
        prompts = [head + tail for tail in _tokens(llm, [3, 40, 1, 100])]
        params = SamplingParams(max_tokens=30, ignore_eos=True, logprobs=True)
        apart, unshared = llm.generate(prompts, params), llm.stats().reused_tokens
    with LLM(bundle, max_batch=4, max_len=1000, verify="size") as llm:
        together = llm.generate(prompts, params)
        shared = llm.stats().reused_tokens
        again = llm.generate(prompts, params)
    found = _same(apart, together)
    found["ok"] &= shared >= 3 * 512 and unshared == 0 and _same(together, again)["ok"]
    found["text"] += f"; {shared} tokens were shared"
    return found


def _auto(bundle: Path) -> Results:
    """More short requests than slots, with as many at once as throughput gains from."""
    with LLM(bundle, max_batch="auto", max_len=256, verify="size") as llm:
        params = SamplingParams(max_tokens=64, ignore_eos=True)
        done = llm.generate(_tokens(llm, [8] * 1500), params)
        stats, slots = llm.stats(), llm.max_batch
    whole = all(len(completion.token_ids) == 64 for completion in done)
    reasons = "; ".join(decision.reason for decision in stats.batch_decisions)
    ok = whole and 0 < stats.batch_limit <= slots and bool(reasons)
    return {"ok": ok, "text": f"{slots} slots, {stats.batch_limit} in the end ({reasons})"}


def _company(bundle: Path) -> Results:
    """Penalties, bias, seeds and filters beside each other, against each alone."""
    kinds = [*KINDS, {**PENALTIES, "temperature": 0.8}, {"logit_bias": {5: 100.0}}]
    kinds += [{"min_tokens": 6, "stop_token_ids": frozenset(range(0, 4096, 3))}]
    with LLM(bundle, max_batch=16, max_len=200, verify="size") as llm:
        prompts = _tokens(llm, [9] * len(kinds))
        params = [
            SamplingParams(max_tokens=24, seed=i, logprobs=True, **kind)
            for i, kind in enumerate(kinds)
        ]
        together = llm.generate(prompts, params)
        alone = [llm.generate(prompt, one)[0] for prompt, one in zip(prompts, params, strict=True)]
    biased = together[len(KINDS) + 1].token_ids
    found = _same(alone, together)
    found["ok"] &= set(biased) == {5} and len(together[-1].token_ids) >= 7
    return found


def _same(first: list[Any], second: list[Any]) -> Results:
    """Two runs of the same requests: equal tokens up to a near tie, and close log-probabilities."""
    worst, apart = 0.0, 0
    for one, other in zip(first, second, strict=True):
        pairs = zip(one.logprobs, other.logprobs, strict=False)
        for a, b in pairs:
            if a.token_id != b.token_id:
                apart += 1  # from here on they are different texts
                break
            worst = max(worst, abs(a.logprob - b.logprob))
    text = f"log-probabilities differ by {worst:.2g} at most, {apart} of {len(first)} go apart"
    return {"ok": worst < 0.05 and apart <= len(first) // 8, "text": text, "worst": worst}


def _sampler(vocab_size: int, dtype: str, deviation: float, num_rows: int = 256) -> Results:
    """The kernel against numpy at the same numbers, on the same logits."""
    one = Device(0)
    kernels = CudaSampler(
        one,
        dtype,  # type: ignore[arg-type]
        vocab_size=vocab_size,
        num_slots=num_rows,
        max_rows=num_rows,
        eos_token_ids=(7,),
    )
    rng = np.random.default_rng(1)
    values = (rng.standard_normal((num_rows, vocab_size)) * deviation).astype(np.float32)
    values[5] = values[5, 0]  # every token as likely as every other
    values[6] = np.round(values[6])
    values[7, 3], values[8, 9], values[9] = np.nan, np.inf, -np.inf
    stored, logits = _stored(values, dtype)
    address = one.allocate(stored.nbytes)
    one.upload(address, stored)
    masks = rng.integers(0, 2**32, (num_rows, mask_words(vocab_size)), np.uint32).view(np.int32)
    masks[::2] &= rng.integers(0, 2**32, masks[::2].shape, np.uint32).view(np.int32)
    masks[21:28] = 0  # where one word is left
    masks[21:28, 7] = -1
    rows, seqs = np.zeros(num_rows, ROW), []
    for i in range(num_rows):
        edits = {**PENALTIES, "logit_bias": {3: 2.0}, "min_tokens": 2} if i % 5 == 0 else {}
        params = SamplingParams(**(KINDS[i % len(KINDS)] | edits))
        seq = Sequence(i, [1, 2, 3, i], 4, params, i * 7919, None, sample=i % 3)  # type: ignore[arg-type]
        seq.slot = i
        if i % 7 == 0:
            seq.matcher = Matcher(None, None, None)  # type: ignore[arg-type]  # masks are given
        rows[i] = row_of(seq, vocab_size)
        seqs.append(seq)
    kernels.prepare(seqs)
    packed = one.allocate(rows.nbytes)
    one.upload(packed, rows)
    allowed = one.allocate(masks.nbytes)
    one.upload(allowed, masks)
    found: dict[int, list[int]] = {}
    for count in (3, 40, num_rows):  # a cluster of blocks for each row, fewer, and one
        tokens = np.zeros(count, np.int32)
        kernels.sample(address, packed, allowed, count)
        one.download(tokens, kernels.tokens)
        one.synchronize()
        found[count] = tokens.tolist()
        for seq in seqs[:count]:
            if seq.edited:  # what the kernel counted is put back
                kernels._edited.clear()
        kernels.prepare(seqs)
    one.close()
    wrong = 0
    for i, seq in enumerate(seqs):
        row = logits[i].copy()
        if seq.edited:
            edit(row, seq, (7,))
        if seq.matcher is not None:
            forbid(row, masks[i])
        want = int(likeliest(row[None])[0])
        if want != NOT_FINITE and not seq.params.greedy:
            want = draw(row, seq.params, uniform(seq.seed, seq.sample, 0))
        wrong += sum(tokens[i] != want for tokens in found.values() if i < len(tokens))
    checked = sum(map(len, found.values()))
    # One draw in some ten thousand lies so near a border that float32 weights decide it otherwise.
    return {"ok": wrong <= checked // 500, "text": f"{wrong} of {checked} draws are not numpy's"}


def _stored(values: Any, dtype: str) -> tuple[Any, Any]:
    """Logits as the device has them, and the float32 numbers that they are."""
    if dtype == "bfloat16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32)
    stored = values.astype(dtype)
    return stored, stored.astype(np.float32)


def _grammars(bundle: Path) -> Results:
    """Grammars of all kinds beside free completions, and those without them."""
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4}
    held: list[tuple[dict[str, Any], Callable[[str], object]]] = [
        ({"json_schema": schema}, json.loads),
        ({"regex": "([0-9]{2}[a-f]){3,5}x"}, re.compile("([0-9]{2}[a-f]){3,5}x").fullmatch),
        ({"choice": ("red", "green", "blue")}, {"red": 1, "green": 1, "blue": 1}.get),
        ({"grammar": 'start: "(" start ")" | "x"'}, re.compile(r"\(*x\)*").fullmatch),
    ]
    free = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=True)
    with LLM(bundle, max_batch=12, max_len=400, verify="size") as llm:
        prompts = _tokens(llm, [20] * 32)
        params = [
            free
            if i % 2
            else SamplingParams(max_tokens=300, temperature=i % 3, seed=i, **held[i // 2 % 4][0])
            for i in range(len(prompts))
        ]
        mixed = llm.generate(prompts, params)
        apart = llm.generate(prompts[1::2], free)
    found = _same(apart, mixed[1::2])
    done = [
        (i, one.text) for i, one in enumerate(mixed) if i % 2 == 0 and one.finish_reason == "stop"
    ]
    wrong = [text for i, text in done if not held[i // 2 % 4][1](text)]
    found["ok"] &= len(done) >= 12 and not wrong
    found["text"] += f"; {len(done)} of 16 have ended, {len(wrong)} of them not as they should"
    return found


def _tokens(llm: LLM, lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(3)
    vocab_size = llm.bundle.manifest.geometry.vocab_size
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


if __name__ == "__main__":
    main()
