"""Rows for scripts/prove_resume: short and long, and one in ten is wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any


def prompt_rows(count: int, model: str, rng: random.Random) -> Iterator[bytes]:
    """Lines with prompts; one in ten is wrong."""
    del model
    wrong = [b"{broken", b"\xff\xfe{}", b'{"prompt": ""}', b'{"prompt": "a", "top_p": 7}']
    wrong += [json.dumps({"prompt": "x" * 5000}).encode(), b'{"messages": "no"}', b"[1]"]
    for index in range(count):
        row: dict[str, Any] = {"id": index, "prompt": f"row {index} " + "x" * rng.randrange(60)}
        row["max_tokens"] = rng.choice((1, 3, 10, 40))
        if rng.random() < 0.2:
            row |= {"temperature": 1.0, "n": 2}
        yield (rng.choice(wrong) if rng.random() < 0.1 else json.dumps(row).encode()) + b"\n"


def openai_rows(count: int, model: str, rng: random.Random) -> Iterator[bytes]:
    """Lines of OpenAI's Batch API; one in ten is wrong."""
    wrong: list[dict[str, Any]] = [
        {"method": "GET"},
        {"url": "/v1/embeddings"},
        {"body": None},
        {"more": 1},
    ]
    for index in range(count):
        prompts = [f"row {index} " + "x" * rng.randrange(60) for _ in range(rng.choice((1, 1, 3)))]
        body: dict[str, Any] = {
            "model": model,
            "prompt": prompts,
            "max_tokens": rng.choice((1, 3, 10, 40)),
        }
        if rng.random() < 0.2:
            body |= {"temperature": 1.0, "n": 2}
        row: dict[str, Any] = {"custom_id": f"c{index}", "method": "POST", "body": body}
        row["url"] = "/v1/completions"
        yield json.dumps(row | (rng.choice(wrong) if rng.random() < 0.1 else {})).encode() + b"\n"
