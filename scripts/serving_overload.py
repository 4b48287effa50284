"""More than a server can take: it says so at once, and serves those whom it took as before.

Ten times as many clients as there are places ask for as long as told. One who is refused comes back
when the answer said, as well-made clients do.
"""

from __future__ import annotations

import asyncio
import http.client
import random
import threading
import time
from dataclasses import dataclass
from statistics import quantiles

from scripts.findings import Findings
from scripts.serving_client import Reply, request_bytes
from scripts.serving_client import ask as ask_once
from scripts.serving_process import Server
from scripts.serving_requests import Bodies, judge

PART = "overload"
MOST_GROWTH = 0.05  # of memory, after the warm-up
HEALTH_SECONDS = 1.0  # within which /health answers
# Who is taken waits until those before him are done: on average the number of places divided by
# what is done a second (Little's law). A queue that takes all of ten times as many has ten of it.
MOST_TURNS = 4.0


@dataclass(frozen=True, slots=True)
class Size:
    """Of an overload.

    Attributes:
        slots: sequences that run at once.
        queue: requests that wait.
        max_len: tokens of a slot.
        seconds: how long too many ask.
        warm_up: of them, before memory is looked at.
        times: how many too many.
    """

    slots: int = 8
    queue: int = 24
    max_len: int = 512
    seconds: float = 60.0
    warm_up: float = 15.0
    times: int = 10

    @property
    def places(self) -> int:
        """Requests that it can have at once."""
        return self.slots + self.queue

    @property
    def options(self) -> list[str]:
        """Of ``llama-run serve``."""
        named = {"--max-batch": self.slots, "--max-queued-requests": self.queue}
        named |= {"--max-len": self.max_len, "--prefix-tokens": 2 * self.max_len}
        return [str(part) for pair in named.items() for part in pair]


@dataclass(frozen=True, slots=True)
class Done:
    """A request that was answered."""

    status: int
    ended: float
    seconds: float
    tokens: int


class Pulse(threading.Thread):
    """Asks for ``/health`` all the time, in a thread that nothing else of the proof holds up.

    Attributes:
        worst: the longest that it took, in seconds.
        count: how often it was asked.
        failures: what else came than 200.
    """

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.worst, self.count = 0.0, 0
        self.failures: list[str] = []
        self._port = port
        self._over = threading.Event()

    def run(self) -> None:
        """See ``threading``."""
        while not self._over.wait(0.1):
            began = time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
            try:
                connection.request("GET", "/health")
                status = connection.getresponse().status
                if status != 200:
                    self.failures.append(str(status))
            except OSError as error:
                self.failures.append(repr(error))
            finally:
                connection.close()
            self.worst = max(self.worst, time.monotonic() - began)
            self.count += 1

    def stop(self) -> None:
        """Ask no more."""
        self._over.set()
        self.join()


class Overload:
    """The proof.

    Args:
        server: one with the options of the size.
        size: of the load.
        seed: of what is asked.
        findings: takes what is found.
    """

    def __init__(self, server: Server, size: Size, seed: int, findings: Findings) -> None:
        self._server = server
        self._size = size
        self._bodies = Bodies(server.model, size.max_len, random.Random(seed))
        self._findings = findings

    async def prove(self) -> None:
        """Load it as far as it goes, then with ten times as much."""
        size, findings = self._size, self._findings
        await self._fill()
        usual = await self._load(size.places, size.seconds / 4)
        usual_rate = _rate(usual, usual[0].ended, usual[-1].ended)
        pulse, began = Pulse(self._server.port), time.monotonic()
        pulse.start()
        resident: list[int] = []
        watching = asyncio.create_task(self._watch(resident))
        done = await self._load(size.times * size.places, size.seconds)
        await watching
        pulse.stop()
        took = await self._server.idle_after(30)
        findings.hold(f"{PART}: all is given back", took is not None, await self._server.busy())

        taken = [one for one in done if one.status == 200]
        refused = len(done) - len(taken)
        findings.hold(f"{PART}: some are taken and some refused", bool(taken and refused))
        growth = resident[-1] / resident[0] - 1
        findings.hold(f"{PART}: memory stays", growth <= MOST_GROWTH, f"{growth:+.2%}")
        prompt = pulse.worst <= HEALTH_SECONDS and not pulse.failures
        case = f"{pulse.worst:.2f} s, {pulse.failures[:3]}"
        findings.hold(f"{PART}: /health answers within {HEALTH_SECONDS:g} s", prompt, case)
        until = began + size.seconds
        rate = _rate(taken, began + size.warm_up, until)
        turn = size.places / max(sum(one.ended <= until for one in taken) / size.seconds, 1e-9)
        *_, worst = cuts = quantiles([one.seconds for one in taken], n=100)
        case = f"{worst:.2f} s; a turn of all places takes {turn:.2f} s"
        law = f"{PART}: 99 of 100 who are taken wait at most {MOST_TURNS:g} turns"
        findings.hold(law, worst <= MOST_TURNS * turn, case)
        findings.figures[PART] = {
            "taken": len(taken),
            "refused": refused,
            "asked_per_second": round(len(done) / size.seconds, 1),
            "latency_p50_s": round(cuts[49], 3),
            "latency_p99_s": round(worst, 3),
            "turn_s": round(turn, 3),
            "tokens_per_second": round(rate, 1),
            "tokens_per_second_at_1x": round(usual_rate, 1),
            "resident_mb": [round(one / 1e6, 1) for one in (resident[0], resident[-1])],
            "resident_growth": round(growth, 4),
            "health_worst_s": round(pulse.worst, 3),
            "health_asked": pulse.count,
        }

    async def _fill(self) -> None:
        """Have every page of the cache touched, of the slots and of what is kept of prompts."""
        size = self._size
        for _ in range(3):
            asked = (
                self._server.post("/v1/completions", self._bodies.longest())
                for _ in range(size.slots)
            )
            for reply in await asyncio.gather(*asked):
                judge(self._findings, PART, reply, (200,))

    async def _watch(self, resident: list[int]) -> None:
        """Take its memory at the end of the warm-up and of the load."""
        await asyncio.sleep(self._size.warm_up)
        resident.append(self._server.held().resident)
        await asyncio.sleep(self._size.seconds - self._size.warm_up)
        resident.append(self._server.held().resident)

    async def _load(self, clients: int, seconds: float) -> list[Done]:
        """Have so many clients ask, each again when it is answered; in the order of answers."""
        done: list[Done] = []
        until = time.monotonic() + seconds
        await asyncio.gather(*(self._client(until, done) for _ in range(clients)))
        return done

    async def _client(self, until: float, done: list[Done]) -> None:
        while time.monotonic() < until:
            body = self._bodies.mixed()
            request = request_bytes("POST", "/v1/completions", body)
            reply = await ask_once(self._server.port, request)
            judge(self._findings, PART, reply, (200, 429))
            tokens = self._tokens(reply, body["max_tokens"])
            done.append(Done(reply.status, reply.ended, reply.seconds, tokens))
            if reply.status != 200:
                wait = int(reply.headers.get("retry-after", "1"))
                await asyncio.sleep(min(wait, max(until - time.monotonic(), 0)))

    def _tokens(self, reply: Reply, asked: int) -> int:
        if reply.status != 200 or not reply.is_whole:
            return 0
        tokens = reply.completion_tokens
        self._findings.hold(f"{PART}: nobody gets fewer tokens", tokens == asked, (tokens, asked))
        return tokens


def _rate(done: list[Done], since: float, until: float) -> float:
    """Tokens a second of those that ended between two moments."""
    tokens = sum(one.tokens for one in done if since < one.ended <= until)
    return tokens / max(until - since, 1e-9)
