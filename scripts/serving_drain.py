"""SIGTERM under load: nobody is cut off in time, who comes is refused, the end is clean."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from dataclasses import dataclass

from scripts.findings import Findings
from scripts.serving_client import Connection, Reply, request_bytes
from scripts.serving_process import Server
from scripts.serving_requests import Bodies, judge

PART = "drain"
LAST_SECONDS = 20.0  # for the last words, and for the step that runs


@dataclass(frozen=True, slots=True)
class Open:
    """What is open when the signal comes.

    Attributes:
        streams: all of them; more than there are slots, so that some wait.
        slots: sequences that run at once.
        max_len: tokens of a slot.
        tokens: the most that one asks for, where all are to end in time.
        patience: the shutdown timeout then, in seconds.
        hurry: the shutdown timeout where they aren't.
    """

    streams: int = 40
    slots: int = 32
    max_len: int = 512
    tokens: int = 64
    patience: float = 120.0
    hurry: float = 1.0

    def options(self, timeout: float) -> list[str]:
        """Of ``llama-run serve``."""
        named = {"--max-batch": self.slots, "--max-len": self.max_len}
        named |= {"--prefix-tokens": 0}
        given = [str(part) for pair in named.items() for part in pair]
        return [*given, "--shutdown-timeout", str(timeout)]


class Drain:
    """The proof, for a server that ends with it.

    Args:
        server: one with the options.
        opened: what is open.
        seed: of what is asked.
        findings: takes what is found.
    """

    def __init__(self, server: Server, opened: Open, seed: int, findings: Findings) -> None:
        self._server = server
        self._open = opened
        self._choose = random.Random(seed)
        self._bodies = Bodies(server.model, opened.max_len, self._choose)
        self._findings = findings

    async def prove_patient(self) -> None:
        """With time enough nothing is cut off."""
        findings, server = self._findings, self._server
        least = self._open.tokens // 2
        counts = [self._choose.randint(least, self._open.tokens) for _ in range(self._open.streams)]
        async with await Connection.to(server.port) as kept:
            running = await self._opened(
                [self._bodies.completion(8, n, i % 8 != 0) for i, n in enumerate(counts)]
            )
            told = time.monotonic()
            server.told(signal.SIGTERM)
            polls = 0
            while not all(task.done() for task in running):
                polls += await self._refused(None if polls else kept, running)
            replies = [task.result() for task in running]
        seconds = time.monotonic() - told
        status = await server.status(LAST_SECONDS)
        findings.hold(f"{PART}: the server was asked while it drained", polls > 0, polls)
        findings.hold(f"{PART}: its status is 0", status == 0, status)
        for reply, count in zip(replies, counts, strict=True):
            judge(findings, PART, reply, (200,))
            if reply.status == 200 and reply.is_whole:
                tokens = reply.completion_tokens
                findings.hold(f"{PART}: nobody is cut off", tokens == count, (tokens, count))
        figures = {"answers": len(replies), "seconds": round(seconds, 2), "asked_meanwhile": polls}
        findings.figures[PART] = figures

    async def prove_hurried(self) -> None:
        """With too little of it, each gets one error and the server still ends well."""
        findings, server = self._findings, self._server
        running = await self._opened([self._bodies.endless(8) for _ in range(self._open.streams)])
        told = time.monotonic()
        server.told(signal.SIGTERM)
        replies = await asyncio.gather(*running)
        status = await server.status(LAST_SECONDS)
        seconds = time.monotonic() - told
        findings.hold(f"{PART}: the status is 0 in a hurry too", status == 0, status)
        law = f"{PART}: a hurried end comes within {LAST_SECONDS:g} s of its timeout"
        findings.hold(law, seconds <= self._open.hurry + LAST_SECONDS, f"{seconds:.1f} s")
        cut = 0
        for reply in replies:
            if reply.is_stream:
                errors = reply.body.count(b'{"error":')
                good = reply.status == 200 and errors == 1 and reply.error is not None
                good &= b"[DONE]" not in reply.body
                law = f"{PART}: who is cut off gets one error event, as the last"
                findings.hold(law, good, (reply.status, errors, reply.body[-300:]))
                cut += 1
            else:
                judge(findings, PART, reply, (503,))
        findings.hold(f"{PART}: some are cut off in a hurry", cut > 0)
        findings.figures[f"{PART}_hurried"] = {"cut_off": cut, "seconds": round(seconds, 2)}

    async def _opened(self, bodies: list[dict[str, object]]) -> list[asyncio.Task[Reply]]:
        """Requests of which all slots are full, and the rest waits."""
        running = [
            asyncio.create_task(self._server.post("/v1/completions", body)) for body in bodies
        ]
        for _ in range(1000):
            now = await self._server.metrics()
            generated, sequences = now["generated_tokens_total"], now["sequences_running"]
            all_came = sequences + now["sequences_waiting"] == len(bodies)
            if all_came and sequences == self._open.slots and generated:
                return running
            await asyncio.sleep(0.005)
        self._findings.wrong(f"{PART}: all streams are open when the signal comes", now)
        return running

    async def _refused(self, kept: Connection | None, running: list[asyncio.Task[Reply]]) -> int:
        """Ask a server that drains for something new; how often it answered."""
        server = self._server
        body = self._bodies.completion(4, 1, False)
        request = request_bytes("POST", "/v1/completions", body)
        asked = {
            "/ready": await server.get("/ready"),
            "/v1/completions": await server.post("/v1/completions", body),
            "/health": await server.get("/health"),
        }
        if kept is not None:  # a connection from before, for which all is as for a new one
            asked["a connection from before"] = await kept.ask(request)
        await asyncio.sleep(0.02)
        if all(task.done() for task in running):
            return 0  # it may have ended in between
        for name, reply in asked.items():
            judge(self._findings, PART, reply, (200 if name == "/health" else 503,))
        return 1
