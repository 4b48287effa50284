"""Conversations in ShareGPT's form: a JSON list of ``{"conversations": [{"from", "value"}, ...]}``.

Of each the first question and its answer are taken, as other benchmarks do. What isn't of that form
is passed over, since the files that go round hold some; a file that isn't JSON is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from llama_runtime.errors import RequestError

_ASKS = ("human", "user")
_REPLIES = ("gpt", "assistant", "chatgpt", "bing", "bard")


class Talk(NamedTuple):
    """A question and its answer, neither of them blank."""

    prompt: str
    reply: str


def read_sharegpt(path: Path) -> list[Talk]:
    """What a file holds.

    Raises:
        RequestError: it can't be read, isn't such a list, or no conversation in it can be used.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise _wrong(path, f"can't be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise _wrong(path, f"is no JSON: {reason}") from error
    if not isinstance(found, list):
        raise _wrong(path, "must be a list of conversations, as ShareGPT's files are")
    talks = [talk for one in found if (talk := _talk(one)) is not None]
    if not talks:
        raise _wrong(
            path,
            f"has no conversation that begins with a question and its answer, of {len(found)}: "
            'each must be {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", '
            '"value": ...}]}',
        )
    return talks


def _talk(one: object) -> Talk | None:
    """The first question and its answer; None where there are none."""
    turns = one.get("conversations") if isinstance(one, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        return None
    texts = []
    for turn, who in zip(turns, (_ASKS, _REPLIES), strict=False):
        value = turn.get("value") if isinstance(turn, dict) and turn.get("from") in who else None
        if not isinstance(value, str) or not value.strip() or not _is_text(value):
            return None
        texts.append(value)
    return Talk(*texts)


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: JSON may hold half a surrogate pair."""
    return not any("\ud800" <= char < "\ue000" for char in value)


def _wrong(path: Path, problem: str) -> RequestError:
    return RequestError(f"--dataset-path: {path} {problem}", param="dataset_path")
