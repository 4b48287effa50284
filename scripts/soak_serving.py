"""A server under mixed load for half an hour, watched from outside; scripts/prove_soak runs it.

Clients of every kind ask all the time, somewhat more than it can take. Through its memory,
descriptors and threads after the first third of the time a line is fitted: it has to be flat.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from scripts.findings import Findings
from scripts.serving_leavers import SPARE_THREADS
from scripts.serving_process import LLAMA_RUN, Held, Server, watched
from scripts.serving_uses import PART, Uses

CLIENTS = 28
MAX_LEN = 256
OPTIONS = (
    *("--max-batch", "8", "--max-queued-requests", "16"),
    *("--max-len", str(MAX_LEN), "--prefix-tokens", "512"),
)
SAMPLES = 360  # of what it holds; every 5 s of 30 minutes
WARM_UP = 1 / 3  # of the time
# A kilobyte kept of each request is 36 MB an hour at ten a second. Memory grows by some 40 MB in
# the first ten thousand requests: compiled grammars, kept prefixes, pages of the cache that no
# sequence had reached, and what the allocator keeps for each thread.
MOST_MB_AN_HOUR = 20.0
LEAST_SECONDS = 60.0
# Over the whole time, by the line. Descriptors follow the connections that are open.
MOST_DESCRIPTORS = 5.0
MOST_THREADS = 1.0
KEY = "a-key-of-the-soak"


class Soak:
    """The proof.

    Args:
        server: with ``OPTIONS`` and ``KEY``.
        seconds: how long.
        seed: of what is asked.
        findings: takes what is found.
        say: told a line a minute.
    """

    def __init__(
        self,
        server: Server,
        seconds: float,
        seed: int,
        findings: Findings,
        say: Callable[[str], None],
    ) -> None:
        self._server = server
        self._seconds = seconds
        self._findings = findings
        self._say = say
        self._uses = Uses(server, MAX_LEN, seed, findings)
        self._points: list[tuple[float, Held]] = []

    async def prove(self) -> None:
        """Use it, and see that it holds what it held."""
        await self._uses.fill()
        await self._use(self._seconds * WARM_UP)
        await self._server.idle_after(30)
        before = await self._server.at_rest()
        await self._use(self._seconds * (1 - WARM_UP))
        took = await self._server.idle_after(30)
        after = await self._server.at_rest(before)
        findings, uses = self._findings, self._uses
        findings.hold(f"{PART}: all is given back", took is not None, await self._server.busy())
        most = before._replace(threads=before.threads + SPARE_THREADS)
        at_most = after.descriptors <= most.descriptors and after.threads <= most.threads
        law = f"{PART}: at rest there are no more descriptors and threads than before"
        findings.hold(law, at_most, (before, after))
        slopes = self._slopes()
        hours = self._seconds * (1 - WARM_UP) / 3600
        bounds = (MOST_MB_AN_HOUR * 1e6 * hours, MOST_DESCRIPTORS, MOST_THREADS)
        for name, slope, bound in zip(Held._fields, slopes, bounds, strict=True):
            law = f"{PART}: {name} grow by no more than {bound:.0f}"
            if self._seconds >= LEAST_SECONDS:
                findings.hold(law, slope <= bound, f"{slope:+.1f}")
        self._server.told(signal.SIGTERM)
        status = await self._server.status(60)
        findings.hold(f"{PART}: its status is 0", status == 0, status)
        findings.figures[PART] = {
            "seconds": self._seconds,
            "answers": sum(uses.statuses.values()),
            "statuses": dict(sorted(uses.statuses.items())),
            "uses": dict(uses.kinds),
            "resident_mb": [round(one.resident / 1e6, 1) for one in (before, after)],
            "mb_an_hour": round(slopes[0] / 1e6 / hours, 2),
            "descriptors_grown": round(slopes[1], 2),
            "threads_grown": round(slopes[2], 2),
        }

    async def _use(self, seconds: float) -> None:
        """Have the clients ask, and take samples and say how it goes."""
        over, until = asyncio.Event(), time.monotonic() + seconds
        clients = [asyncio.create_task(self._uses.go_on(over)) for _ in range(CLIENTS)]
        self._points = []
        said = time.monotonic()
        while time.monotonic() < until:
            await asyncio.sleep(self._seconds / SAMPLES)
            held = self._server.held()
            self._points.append((time.monotonic(), held))
            if time.monotonic() - said >= 60:
                said = time.monotonic()
                self._say(
                    f"{until - said:5.0f} s to go, {sum(self._uses.statuses.values()):7,} answers, "
                    f"{held.resident / 1e6:.1f} MB, {held.descriptors} descriptors, "
                    f"{held.threads} threads, {sum(self._findings.broken.values())} broken"
                )
        over.set()
        await asyncio.gather(*clients)

    def _slopes(self) -> list[float]:
        """What was added over the time of the samples, of each thing, by least squares."""
        times = np.array([moment for moment, _ in self._points])
        held = np.array([held for _, held in self._points], float)
        return [
            float(np.polyfit(times, column, 1)[0] * (times[-1] - times[0])) for column in held.T
        ]


def main() -> None:
    """Parse arguments, run, print what is broken, and a last line of JSON."""
    parser = argparse.ArgumentParser(prog="scripts/prove_soak")
    parser.add_argument("--bundle", type=Path, default=Path("bundle"))
    parser.add_argument("--minutes", type=float, default=30.0, help="(30)")
    parser.add_argument("--seed", type=int, default=0, help="of what is asked (0)")
    args = parser.parse_args()
    findings = Findings()
    with (
        tempfile.TemporaryDirectory() as name,
        findings.part(PART),
        watched(findings, LLAMA_RUN, args.bundle, Path(name), *OPTIONS, key=KEY) as server,
    ):
        soak = Soak(
            server, args.minutes * 60, args.seed, findings, lambda line: print(line, flush=True)
        )
        asyncio.run(soak.prove())
    findings.end(seed=args.seed)


if __name__ == "__main__":
    main()
