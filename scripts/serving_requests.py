"""What the proofs of the server ask, and how its answers are judged."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from scripts.findings import Findings
from scripts.serving_client import Reply

_ERROR_FIELDS = {"message", "type", "param", "code"}


@dataclass(slots=True)
class Bodies:
    """Bodies of requests, of one seed.

    Args:
        model: its name.
        max_len: tokens of a prompt and its completion.
        choose: where chance comes from.
    """

    model: str
    max_len: int
    choose: random.Random

    def prompt(self, tokens: int) -> list[int]:
        """Token ids, which in any vocabulary are single letters."""
        return [self.choose.randrange(20, 250) for _ in range(tokens)]

    def completion(self, tokens: int, max_tokens: int, stream: bool) -> dict[str, Any]:
        """A body for ``/v1/completions`` that gets all tokens it asks for.

        Args:
            tokens: of the prompt.
            max_tokens: of the completion.
            stream: whether it is to come as it is made, with a usage at the end.
        """
        body = {"model": self.model, "prompt": self.prompt(tokens), "max_tokens": max_tokens}
        body |= {"ignore_eos": True, "temperature": 0, "stream": stream}
        return body | ({"stream_options": {"include_usage": True}} if stream else {})

    def mixed(self) -> dict[str, Any]:
        """One of a mixture: most are short, some nearly fill a slot, half are streams."""
        choose, most = self.choose, self.max_len
        tokens = min(choose.randint(1, most // 2), choose.randint(1, most * 3 // 4))
        max_tokens = choose.randint(1, most // 8)
        return self.completion(tokens, max_tokens, choose.random() < 0.5)

    def endless(self, tokens: int, *, stream: bool = True) -> dict[str, Any]:
        """One that runs until its slot is full."""
        return self.completion(tokens, self.max_len - tokens - 1, stream)

    def longest(self) -> dict[str, Any]:
        """One whose prompt nearly fills a slot."""
        return self.completion(self.max_len - 4, 2, False)


def judge(findings: Findings, part: str, reply: Reply, expected: Collection[int]) -> None:
    """Look at an answer, of which nothing may be missing.

    Args:
        findings: takes what is wrong.
        part: of the proof.
        reply: the answer.
        expected: statuses that it may have.
    """
    if reply.status not in expected:
        case = f"{reply.status}, not one of {sorted(expected)}: {reply.body[-300:]!r}"
        findings.wrong(f"{part}: every answer has an expected status", case)
        return
    if reply.status >= 400:
        said = reply.json()
        good = set(said) == {"error"} and set(said["error"]) == _ERROR_FIELDS
        findings.hold(f"{part}: an error has the one form", good, said)
    if reply.status in (429, 503):
        after = reply.headers.get("retry-after", "")
        good = after.isdigit() and int(after) >= 1
        findings.hold(f"{part}: who is refused is told when to ask again", good, reply.headers)
    elif reply.status == 200:
        findings.hold(f"{part}: what is answered is whole", reply.is_whole, reply.body[-300:])
