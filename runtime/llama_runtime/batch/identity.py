"""What makes a job the same when it is run again: rows, model, and how rows are continued."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from llama_runtime.bundle import Bundle
from llama_runtime.errors import RequestError


def bundle_hash(bundle: Bundle) -> str:
    """SHA-256 of the manifest, which holds that of every other file."""
    return hashlib.sha256(bundle.manifest.to_json().encode()).hexdigest()


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], output: object) -> None:
    """Refuse to go on with a job that was begun with other things.

    Args:
        before: what the job was begun with.
        now: what it is run with.
        output: the output's name, for the message.

    Raises:
        RequestError: they differ; it says in what.
    """
    found = list(_differences(before, now))
    if found:
        raise RequestError(
            f"the job of {output} was begun with something else: {'; '.join(found)}. Run it as it "
            "was begun, write elsewhere with --output, or give --force to begin anew",
            param="output",
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if before.get("input") != now["input"]:
        sizes = [of.get("input", {}).get("bytes") for of in (before, now)]
        other = (
            f"{sizes[0]:,} bytes then, {sizes[1]:,} now"
            if all(isinstance(size, int) for size in sizes) and sizes[0] != sizes[1]
            else "as many bytes, but other ones"
        )
        yield f"the rows changed ({other})"
    if before.get("bundle") != now["bundle"]:
        yield "the bundle changed"
    for key in ("format", "unordered", "chat", "allow_control_tokens", "max_len"):
        if before.get(key) != now[key]:
            yield f"{key} was {_shown(before.get(key))}, and is {_shown(now[key])}"
    options = before.get("options", {}), now["options"]
    for key in sorted(options[0].keys() | options[1].keys()):
        was, given = (of.get(key) for of in options)
        if was != given:
            yield f"{key} was {_shown(was)}, and is {_shown(given)}"


def _shown(value: object) -> str:
    return "not given" if value is None else f"{value!r:.60}"
