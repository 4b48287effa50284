"""OpenVINO GenAI as a worker: its ``ContinuousBatchingPipeline`` on a model directory or a GGUF.

    python -m scripts.peers.openvino MODEL --threads N --slots N --max-len N

What its CPU plugin chooses by itself stays: how it computes (``INFERENCE_PRECISION_HINT``), how
activations are quantised (``DYNAMIC_QUANTIZATION_GROUP_SIZE``), and an 8-bit cache.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from scripts.peers.openvino_logits import Reader, check
from scripts.peers.protocol import Loaded, Options, Output, serve

SCHEDULED_TOKENS = 512  # of one step; the library's own 256 makes the prompts of 512 tokens slower
CACHE_GB = 1  # more than 32 sequences need; without it the cache grows while it is measured
REPORTED = (
    "INFERENCE_PRECISION_HINT",
    "KV_CACHE_PRECISION",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "PERFORMANCE_HINT",
)


def load(options: Options) -> Loaded:
    """Load the model with a scheduler of as many sequences as everybody has."""
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = options.slots
    scheduler.max_num_batched_tokens = SCHEDULED_TOKENS
    scheduler.cache_size = CACHE_GB
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = False
    properties: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": options.threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        str(options.model), scheduler, "CPU", properties
    )
    tokenizer = pipeline.get_tokenizer()

    def config(count: int) -> Any:
        made = openvino_genai.GenerationConfig()
        made.max_new_tokens = made.min_new_tokens = count
        made.ignore_eos = True
        made.do_sample = False
        made.apply_chat_template = False  # else prompts are wrapped into a conversation
        return made

    def generate(prompts: list[str], max_new_tokens: list[int]) -> Output:
        results = pipeline.generate(prompts, [config(count) for count in max_new_tokens])
        texts = [result.m_generation_ids[0] for result in results]
        # The figure of the whole call, which every result carries
        return Output(texts, results[0].perf_metrics.get_num_generated_tokens())

    def count(text: str) -> int:
        return int(tokenizer.encode(text).input_ids.shape[1])

    @cache
    def reader() -> Reader:  # a second copy of the model, only where it is asked for
        return Reader(options.model, properties)

    def logits(tokens: list[int]) -> Any:
        rows = reader().logits(tokens)
        check(rows, tokens, pipeline)
        return rows

    core = openvino.Core()
    settings = {name: str(core.get_property("CPU", name)) for name in REPORTED}
    settings |= {"max_num_batched_tokens": str(SCHEDULED_TOKENS), "cache_GB": str(CACHE_GB)}
    return Loaded(generate, count, logits, settings)


if __name__ == "__main__":
    serve(load)
