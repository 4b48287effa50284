"""Proof that a server doesn't fall over; scripts/prove_serving runs it.

Three parts, each with a ``llama-run serve`` of its own that is asked over HTTP: ten times more than
it can take; clients who leave at random points; SIGTERM with streams that are open.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from scripts.findings import Findings
from scripts.serving_drain import Drain, Open
from scripts.serving_leavers import Crowd, Leavers
from scripts.serving_overload import Overload, Size
from scripts.serving_process import LLAMA_RUN, Server, watched

PARTS = ("overload", "leavers", "drain")


@dataclass
class Proof:
    """Runs the parts, and collects what goes wrong.

    Args:
        start: of a command line that is ``llama-run``.
        bundle: that it serves.
        folder: for the logs.
        seed: of what is asked, and of when clients leave.

    Attributes:
        findings: what was found.
    """

    start: Sequence[str]
    bundle: Path
    folder: Path
    seed: int = 0
    findings: Findings = field(default_factory=Findings)

    def overload(self, size: Size) -> None:
        """Ten times more than it can take."""
        with self._watched(size.options) as server:
            asyncio.run(Overload(server, size, self.seed, self.findings).prove())

    def leavers(self, crowd: Crowd) -> None:
        """Clients who leave."""
        with self._watched(crowd.options) as server:
            asyncio.run(Leavers(server, crowd, self.seed, self.findings).prove())

    def drain(self, opened: Open) -> None:
        """SIGTERM, with time enough and with too little."""
        with self._watched(opened.options(opened.patience)) as server:
            asyncio.run(Drain(server, opened, self.seed, self.findings).prove_patient())
        with self._watched(opened.options(opened.hurry)) as server:
            asyncio.run(Drain(server, opened, self.seed, self.findings).prove_hurried())

    def _watched(self, options: list[str]) -> AbstractContextManager[Server]:
        return watched(self.findings, self.start, self.bundle, self.folder, *options)


def main() -> None:
    """Parse arguments, run, print what is broken, and a last line of JSON."""
    parser = argparse.ArgumentParser(prog="scripts/prove_serving")
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)} (all)")
    parser.add_argument("--bundle", type=Path, default=Path("bundle"))
    parser.add_argument("--seconds", type=float, default=60.0, help="of the overload (60)")
    parser.add_argument("--clients", type=int, default=500, help="that leave (500)")
    parser.add_argument("--streams", type=int, default=40, help="open when it drains (40)")
    parser.add_argument("--seed", type=int, default=0, help="of what is asked and when (0)")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}")
    with tempfile.TemporaryDirectory() as name:
        proof = Proof(LLAMA_RUN, args.bundle, Path(name), args.seed)
        for part in args.parts or PARTS:
            with proof.findings.part(part):
                if part == "overload":
                    proof.overload(Size(seconds=args.seconds, warm_up=args.seconds / 4))
                elif part == "leavers":
                    proof.leavers(Crowd(clients=args.clients))
                else:
                    proof.drain(Open(streams=args.streams, slots=min(32, args.streams - 1)))
            print(f"{part}: {json.dumps(proof.findings.figures.get(part))}", flush=True)
    proof.findings.end(seed=args.seed)


if __name__ == "__main__":
    main()
