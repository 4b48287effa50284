"""What traces come to, under the names of ``vllm bench serve``'s results.

Times are in milliseconds, rates in a second. Percentiles lie between values, as numpy's do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from llama_runtime.bench.trace import Trace

PERCENTILES = (90, 99)
LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token, without the first",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
}


def figures(traces: Seq[Trace], duration: float) -> dict[str, Any]:
    """The figures of one run.

    Args:
        traces: of all its requests; those that failed count as such, and in nothing else.
        duration: seconds from the first request to the end of the last.

    Returns:
        By vLLM's names; None for a latency of which there is no value.
    """
    good = [trace for trace in traces if trace.error is None]
    total_input = sum(trace.input_len for trace in good)
    total_output = sum(trace.output_len for trace in good)
    rate = 1 / max(duration, 1e-9)
    found: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(traces) - len(good),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": len(good) * rate,
        "output_throughput": total_output * rate,
        "total_token_throughput": (total_input + total_output) * rate,
        "max_concurrent_requests": most_at_once(good),
    }
    values = {
        "ttft": [trace.ttft for trace in good],
        "tpot": [trace.tpot for trace in good if trace.tpot is not None],
        "itl": [gap for trace in good for gap in trace.itls],
        "e2el": [trace.e2el for trace in good],
    }
    for name in LATENCIES:
        found |= _latency(name, values[name])
    return found


def _latency(name: str, seconds: Seq[float]) -> dict[str, float | None]:
    """Mean, median, deviation and percentiles, in milliseconds."""
    of = f"{name}_ms"
    names = [f"mean_{of}", f"median_{of}", f"std_{of}", *(f"p{p}_{of}" for p in PERCENTILES)]
    if not seconds:
        return dict.fromkeys(names)
    ms = 1e3 * np.array(seconds)
    found = [ms.mean(), np.median(ms), ms.std(), *np.percentile(ms, PERCENTILES)]
    return dict(zip(names, map(float, found), strict=True))


def most_at_once(traces: Seq[Trace]) -> int:
    """The most requests that were open at one time."""
    changes = [(trace.arrived, 1) for trace in traces] + [(trace.ended, -1) for trace in traces]
    most = now = 0
    for _, change in sorted(changes):  # who ends when another comes is gone by then
        now += change
        most = max(most, now)
    return most


def errors_of(traces: Seq[Trace]) -> dict[str, int]:
    """How many requests failed of each kind, most first."""
    kinds = Counter(trace.error for trace in traces if trace.error is not None)
    return dict(kinds.most_common())


def knee(rates: dict[int, float], share: float = 0.9) -> int | None:
    """The least size that reaches a share of the best rate; None of fewer than two sizes."""
    if len(rates) < 2:
        return None
    return min(size for size, rate in rates.items() if rate >= share * max(rates.values()))
