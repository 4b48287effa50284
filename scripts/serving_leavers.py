"""Clients who leave without their answers, at every point of a request: nothing of them stays."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

from scripts.findings import Findings
from scripts.serving_client import Connection, request_bytes
from scripts.serving_process import Server
from scripts.serving_requests import Bodies, judge

PART = "leavers"
# Where they leave: before the headers' end; within the body; while a long text is made tokens; as
# soon as it is sent, so while it waits; while the prompt is computed; while a whole answer is made;
# within a stream; after its last byte, on a connection that could be used on.
POINTS = ("headers", "body", "text", "sent", "prefill", "whole", "stream", "read")
LONG_TEXT = 60_000  # characters, which take some 20 ms
IDLE_SECONDS = 5.0  # after which nothing may be in use
SPARE_THREADS = 3  # of the four that make tokens, which begin as they are needed
MOST_STEPS = 4  # that run on after the last client left


@dataclass(frozen=True, slots=True)
class Crowd:
    """Of those who leave.

    Attributes:
        clients: all of them; a fifth leaves at one moment, at the end.
        spread: seconds within which the others come.
        slots: sequences that run at once.
        max_len: tokens of a slot.
    """

    clients: int = 500
    spread: float = 5.0
    slots: int = 8
    max_len: int = 512

    @property
    def options(self) -> list[str]:
        """Of ``llama-run serve``; most of them get in."""
        named = {"--max-batch": self.slots, "--max-queued-requests": self.clients}
        named |= {"--max-len": self.max_len, "--prefix-tokens": 2 * self.max_len}
        return [str(part) for pair in named.items() for part in pair]


class Leaver:
    """Somebody who leaves.

    Args:
        server: that he asks.
        bodies: of what he asks for.
        findings: takes what is found.
    """

    def __init__(self, server: Server, bodies: Bodies, findings: Findings) -> None:
        self._server = server
        self._bodies = bodies
        self._choose = bodies.choose
        self._findings = findings

    async def leave(self, point: str) -> bool:
        """Ask and leave.

        Args:
            point: where, one of ``POINTS``.

        Returns:
            Whether he came that far.
        """
        came = False
        with suppress(OSError, asyncio.IncompleteReadError):
            async with await Connection.to(self._server.port) as connection:
                came = await self._until(point, connection)
                connection.hang_up(rudely=self._choose.random() < 0.5)
        return came

    async def _until(self, point: str, connection: Connection) -> bool:
        """Go as far as told; whether it came to that."""
        choose, data = self._choose, self._request(point)
        head = data.index(b"\r\n\r\n") + 4
        if point in ("headers", "body"):
            bounds = (1, head - 1) if point == "headers" else (head, len(data) - 1)
            await connection.send(data[: choose.randint(*bounds)])
            await asyncio.sleep(choose.choice((0, 0.01)))
            return True
        await connection.send(data)
        if point == "read":
            reply = await connection.answer()
            judge(self._findings, PART, reply, (200, 429))
            return reply.status == 200
        if point == "stream":
            return await self._within(connection, choose.randint(1, 16))
        await asyncio.sleep(choose.uniform(0, 0.02 if point in ("text", "sent") else 0.5))
        return True

    def _request(self, point: str) -> bytes:
        if point == "read":
            body = self._bodies.completion(4, self._choose.randint(1, 8), True)
        elif point == "text":
            body = self._bodies.endless(1) | {"prompt": "a text " * (LONG_TEXT // 7)}
        elif point == "prefill":
            body = self._bodies.endless(self._bodies.max_len * 9 // 10)
        else:
            body = self._bodies.endless(self._choose.randint(1, 64), stream=point != "whole")
        key, keep = self._server.key, point == "read"
        return request_bytes("POST", "/v1/completions", body, key=key, keep=keep)

    async def _within(self, connection: Connection, events: int) -> bool:
        """Read so many events of a stream, and leave the others; whether there was a stream."""
        body = b""
        async for piece in connection.pieces():
            body += piece
            if body.count(b"data: ") >= events:
                return True
        connection.reply.body = body
        judge(self._findings, PART, connection.reply, (200, 429))
        return False


class Leavers:
    """The proof.

    Args:
        server: one with the options of the crowd.
        crowd: who leaves.
        seed: of when they do.
        findings: takes what is found.
    """

    def __init__(self, server: Server, crowd: Crowd, seed: int, findings: Findings) -> None:
        self._server = server
        self._crowd = crowd
        self._choose = random.Random(seed)
        self._bodies = Bodies(server.model, crowd.max_len, self._choose)
        self._leaver = Leaver(server, self._bodies, findings)
        self._findings = findings
        self._reached: Counter[str] = Counter()  # who came as far as he wanted to

    async def prove(self) -> None:
        """Have them come and leave, one by one and then all at once."""
        server, findings = self._server, self._findings
        await self._stay()
        before = await server.at_rest()
        at_once = self._crowd.clients // 5
        points = [POINTS[i % len(POINTS)] for i in range(self._crowd.clients - at_once)]
        await asyncio.gather(*map(self._leave, points))
        took = await server.idle_after(IDLE_SECONDS)
        law = f"{PART}: nothing is in use {IDLE_SECONDS:g} s after the last one"
        findings.hold(law, took is not None, await server.busy())
        steps = await self._leave_at_once(at_once)
        if await server.busy():
            return  # it may run on for long
        most = before._replace(threads=before.threads + SPARE_THREADS)
        after = await server.at_rest(most)
        kept = after.descriptors <= before.descriptors and after.threads <= most.threads
        law = f"{PART}: no descriptor and no thread stays behind"
        findings.hold(law, kept, (before, after))
        missing = [point for point in POINTS if not self._reached[point]]
        findings.hold(f"{PART}: some leave at every point", not missing, missing)
        await self._stay()
        findings.figures[PART] = {
            "clients": self._crowd.clients,
            "left": dict(self._reached),
            "idle_after_s": None if took is None else round(took, 3),
            "tokens_after_all_left_per_slot": round(steps, 2),
            "descriptors": [before.descriptors, after.descriptors],
            "threads": [before.threads, after.threads],
        }

    async def _stay(self) -> None:
        """A few who wait for their answers, and get them."""
        asked = (self._server.post("/v1/completions", self._bodies.mixed()) for _ in range(16))
        for reply in await asyncio.gather(*asked):
            judge(self._findings, PART, reply, (200,))

    async def _leave(self, point: str) -> None:
        await asyncio.sleep(self._choose.uniform(0, self._crowd.spread))
        if await self._leaver.leave(point):
            self._reached[point] += 1

    async def _leave_at_once(self, clients: int) -> float:
        """So many at the same moment, of whom some run and the others wait.

        Returns:
            The tokens that were made for nobody, for each slot: steps, about.
        """
        server, findings, choose = self._server, self._findings, self._choose
        connections = [await Connection.to(server.port) for _ in range(clients)]
        for connection in connections:
            body = self._bodies.endless(choose.randint(1, 8), stream=choose.random() < 0.7)
            await connection.send(request_bytes("POST", "/v1/completions", body))
        for _ in range(200):
            now = await server.metrics()
            if now["sequences_running"] >= self._crowd.slots and now["sequences_waiting"]:
                break
            await asyncio.sleep(0.005)
        else:
            findings.wrong(f"{PART}: all slots are taken when all leave", now)
        for connection in connections:
            connection.hang_up(rudely=choose.random() < 0.5)
        left = (await server.metrics())["generated_tokens_total"]
        idle = await server.idle_after(IDLE_SECONDS)
        findings.hold(f"{PART}: all slots are free soon", idle is not None, await server.busy())
        steps = (await server.metrics())["generated_tokens_total"] - left
        steps /= self._crowd.slots
        law = f"{PART}: at most {MOST_STEPS} steps run for those who left"
        findings.hold(law, steps <= MOST_STEPS, f"{steps:.2f}")
        return steps
