"""What the batch is doing, as numbers for the page: no texts, and no waiting for a step."""

from __future__ import annotations

import time

from llama_runtime.sequence import Sequence
from llama_runtime.server.metrics import PER_DOUBLING, SHORTEST, Histogram
from llama_runtime.server.page_activity import Call
from llama_runtime.server.service import Service

_Pairs = list[tuple[Call, Sequence]]
MAX_SHOWN = 32  # of those that wait


def page_state(service: Service) -> dict[str, object]:
    """The answer of ``/page/state``.

    Counters are counted since the start, so that whoever asks twice knows what came between.

    Args:
        service: whose state it is.

    Returns:
        ``state`` ("loading", "ready", "draining", "stopped", "failed" or "engine_hangs") and
        ``time``, in seconds of a clock of its own; and, once the model is loaded, its ``models``,
        whether it has a ``chat`` template, ``max_len``, ``slots`` and ``limit`` (how many of them
        may be in use), what the engine has counted, the ``running`` sequences of requests, the
        first of those ``waiting`` and how many there are, and the latencies ``first_token`` and
        ``between``.
    """
    found: dict[str, object] = {"state": _state(service), "time": round(time.monotonic(), 4)}
    llm = service.loaded
    if llm is None:
        return found
    stats = llm.stats()
    running, waiting = _sequences(service)
    return found | {
        "models": list(service.names),
        "chat": llm.has_chat_template,
        "max_len": llm.max_len,
        "slots": max(llm.max_batch, stats.batch_limit),
        "limit": stats.batch_limit or llm.max_batch,
        "num_waiting": stats.waiting + len(service.gate.places),
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "finished": stats.finished,
        "running": [_running(call, seq) for call, seq in running],
        "waiting": [_waiting(call, seq) for call, seq in waiting[:MAX_SHOWN]],
        "first_token": _durations(service.tally.fine_first_token),
        "between": _durations(service.tally.fine_gap),
    }


def _state(service: Service) -> str:
    broken = service.broken
    if broken is None:
        return service.state
    return "failed" if broken.code == "engine_dead" else broken.code or "failed"


def _sequences(service: Service) -> tuple[_Pairs, _Pairs]:
    """Those with a slot, and those without one in order of arrival."""
    running: _Pairs = []
    waiting: _Pairs = []
    for call, seq in service.activity.sequences:
        (waiting if seq.slot is None else running).append((call, seq))
    for found in (running, waiting):
        found.sort(key=lambda pair: pair[1].id)
    return running, waiting


def _running(call: Call, seq: Sequence) -> dict[str, object]:
    tokens = seq.num_completion_tokens
    read = seq.num_prompt_tokens if tokens else min(seq.cache_len, seq.num_prompt_tokens)
    return {
        "id": seq.id,
        "slot": seq.slot,
        "read": read,
        "tokens": tokens,
        "max_tokens": seq.params.max_tokens,
        **_common(call, seq),
    }


def _waiting(call: Call, seq: Sequence) -> dict[str, object]:
    return {"id": seq.id, **_common(call, seq)}


def _common(call: Call, seq: Sequence) -> dict[str, object]:
    return {
        "request": call.id,
        "prompt": seq.num_prompt_tokens,
        "age": round(call.age, 2),
    }


def _durations(durations: Histogram) -> dict[str, object]:
    return {
        "first_bucket": SHORTEST,
        "per_doubling": PER_DOUBLING,
        "counts": list(durations.counts),
    }
