"""Every metric: its names, its type, what it means and where its value is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from llama_runtime import __version__
from llama_runtime.async_llm import AsyncLLM
from llama_runtime.server.metrics import Histogram, Tally
from llama_runtime.shared_engine import Stats

Kind = Literal["gauge", "counter", "histogram"]
Value = float | Histogram | Mapping[tuple[str, ...], float]  # the last by the row's own labels

OWN, VLLM = "caravan_", "vllm:"  # what names begin with
_VLLM_REASONS = {"late": "abort"}  # of those it doesn't have


@dataclass(frozen=True, slots=True)
class Reading:
    """What values are read from, of one moment.

    Attributes:
        stats: the engine's.
        tally: the server's.
        llm: the model.
        preparing: requests that the engine has not accepted yet.
    """

    stats: Stats
    tally: Tally
    llm: AsyncLLM
    preparing: int


@dataclass(frozen=True, slots=True)
class Row:
    """One metric.

    Attributes:
        own: its name after ``OWN``, or empty if only vLLM has it.
        vllm: its name after ``VLLM``, or empty if vLLM has none of that type and meaning.
        kind: its type.
        meaning: one sentence.
        read: its value.
        labels: beside ``model_name``.
    """

    own: str
    vllm: str
    kind: Kind
    meaning: str
    read: Callable[[Reading], Value]
    labels: tuple[str, ...] = ()


def _info(_: Reading) -> Value:
    return {(__version__,): 1}


def _refused(reading: Reading) -> Value:
    refused = dict.fromkeys((400, 401, 429, 500, 503, 504), 0) | reading.tally.refused
    return {(str(status),): count for status, count in sorted(refused.items())}


def _finished(reading: Reading) -> Value:
    return {(reason,): count for reason, count in reading.tally.finished.items()}


def _vllm_finished(reading: Reading) -> Value:
    found: dict[tuple[str, ...], float] = {}
    for reason, count in reading.tally.finished.items():
        labels = (_VLLM_REASONS.get(reason, reason),)
        found[labels] = found.get(labels, 0) + count
    return found


def _cache_config(reading: Reading) -> Value:
    """Without blocks, a slot is one."""
    plan = reading.llm.memory_plan
    size = getattr(plan, "block_size", plan.max_len)
    number = getattr(plan, "num_blocks", plan.max_batch)
    return {(str(size), str(number)): 1}


ROWS = (
    Row("info", "", "gauge", "1, for the version of the server.", _info, ("version",)),
    Row(
        *("sequences_running", "num_requests_running", "gauge"),
        "Sequences that hold a slot.",
        lambda now: now.stats.running,
    ),
    Row(
        *("sequences_waiting", "num_requests_waiting", "gauge"),
        "Sequences that wait for a slot.",
        lambda now: now.stats.waiting,
    ),
    Row(
        *("sequences_limit", "", "gauge"),
        "Sequences that may run at once.",
        lambda now: now.stats.batch_limit or now.llm.max_batch,
    ),
    Row(
        *("requests_preparing", "", "gauge"),
        "Requests whose bodies are here and which the engine has not accepted yet.",
        lambda now: now.preparing,
    ),
    Row(
        *("cache_use_ratio", "kv_cache_usage_perc", "gauge"),
        "How much of the cache is held by sequences, 0 to 1.",
        lambda now: now.stats.cache_use,
    ),
    Row(
        *("prompt_tokens_total", "prompt_tokens_total", "counter"),
        "Tokens of the prompts of sequences that the engine accepted.",
        lambda now: now.stats.prompt_tokens,
    ),
    Row(
        *("generated_tokens_total", "generation_tokens_total", "counter"),
        "Tokens that were generated.",
        lambda now: now.stats.completion_tokens,
    ),
    Row(
        *("reused_prompt_tokens_total", "prefix_cache_hits_total", "counter"),
        "Tokens of prompts that weren't computed, because others had them before.",
        lambda now: now.stats.reused_tokens,
    ),
    Row(
        *("prefix_hits_total", "", "counter"),
        "Sequences that were spared tokens of their prompts.",
        lambda now: now.stats.prefix_hits,
    ),
    Row(
        *("", "prefix_cache_queries_total", "counter"),
        "Tokens of prompts that were looked for among those kept.",
        lambda now: now.stats.prompt_tokens,
    ),
    Row(
        *("drafted_tokens_total", "spec_decode_num_draft_tokens_total", "counter"),
        "Tokens that were guessed and verified.",
        lambda now: now.stats.drafted_tokens,
    ),
    Row(
        *("accepted_tokens_total", "spec_decode_num_accepted_tokens_total", "counter"),
        "Guessed tokens that were right.",
        lambda now: now.stats.accepted_tokens,
    ),
    Row(
        *("", "num_preemptions_total", "counter"),
        "Always 0: a sequence that has a slot keeps it.",
        lambda _: 0,
    ),
    Row(
        *("sequences_finished_total", "", "counter"),
        "Sequences that ended, by how.",
        _finished,
        ("reason",),
    ),
    Row(
        *("", "request_success_total", "counter"),
        "Sequences that ended, by how; late ones are aborted ones.",
        _vllm_finished,
        ("finished_reason",),
    ),
    Row(
        *("requests_refused_total", "", "counter"),
        "Requests that were answered with an error, by its status.",
        _refused,
        ("status",),
    ),
    Row(
        *("time_to_first_token_seconds", "time_to_first_token_seconds", "histogram"),
        "From the arrival of the request to the first token of a sequence.",
        lambda now: now.tally.first_token,
    ),
    Row(
        *("inter_token_latency_seconds", "inter_token_latency_seconds", "histogram"),
        "From a token of a sequence to its next.",
        lambda now: now.tally.gap,
    ),
    Row(
        *("request_latency_seconds", "e2e_request_latency_seconds", "histogram"),
        "From the arrival of the request to the end of a sequence.",
        lambda now: now.tally.request,
    ),
    Row(
        *("queue_seconds", "request_queue_time_seconds", "histogram"),
        "From when a sequence's prompt was made until it had its slot.",
        lambda now: now.tally.queue,
    ),
    Row(
        *("prefill_seconds", "request_prefill_time_seconds", "histogram"),
        "From a sequence's slot to its first token.",
        lambda now: now.tally.prefill,
    ),
    Row(
        *("decode_seconds", "request_decode_time_seconds", "histogram"),
        "From a sequence's first token to its last.",
        lambda now: now.tally.decode,
    ),
    Row(
        *("", "request_inference_time_seconds", "histogram"),
        "From a sequence's slot to its last token.",
        lambda now: now.tally.inference,
    ),
    Row(
        *("sequence_prompt_tokens", "request_prompt_tokens", "histogram"),
        "Tokens of a sequence's prompt.",
        lambda now: now.tally.prompt_tokens,
    ),
    Row(
        *("sequence_generated_tokens", "request_generation_tokens", "histogram"),
        "Tokens of a sequence's completion.",
        lambda now: now.tally.generated_tokens,
    ),
    Row(
        *("", "request_params_max_tokens", "histogram"),
        "Tokens that a sequence might have had.",
        lambda now: now.tally.max_tokens,
    ),
    Row(
        *("", "request_params_n", "histogram"),
        "Sequences that a prompt was asked for.",
        lambda now: now.tally.samples,
    ),
    Row(
        *("", "cache_config_info", "gauge"),
        "1, for the size of the cache in blocks.",
        _cache_config,
        ("block_size", "num_gpu_blocks"),
    ),
)
