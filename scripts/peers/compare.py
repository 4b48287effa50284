"""Medians and ratios of rounds that were run in turns, and the table of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from scripts.peers.works import Case

Results = dict[str, Any]


@dataclass(frozen=True)
class Runner:
    """One that takes part.

    Attributes:
        name: what the report calls it.
        ours: whether it is Caravan.
        bits: of its weights.
    """

    name: str
    ours: bool
    bits: int


def slow(warm_up: dict[Runner, float], factor: float, *, by_bits: bool) -> set[Runner]:
    """Who needn't run again: slower than ``factor`` times the fastest of its own side.

    Args:
        warm_up: seconds of the first round.
        factor: how many times as slow.
        by_bits: look only at those with weights of the same bits.
    """

    def rivals(runner: Runner) -> list[float]:
        return [
            seconds
            for other, seconds in warm_up.items()
            if other.ours == runner.ours and (other.bits == runner.bits or not by_bits)
        ]

    return {runner for runner, seconds in warm_up.items() if seconds > factor * min(rivals(runner))}


def summary(case: Case, rounds: dict[Runner, list[float]], *, by_bits: bool) -> Results:
    """Tokens per second of each, and how many times as fast the best of ours is.

    Args:
        case: what they did.
        rounds: seconds of each round, as many for everybody.
        by_bits: compare only those with weights of the same bits.

    Returns:
        "tokens_per_s" by name, and "ratios": for each group "ours" and "peer", the two fastest by
        their medians, and "ratio", "low" and "high", the median, least and greatest of the rounds.
        A group without one of both sides is left out.
    """
    groups: Iterable[tuple[str, list[Runner]]] = [("all", list(rounds))]
    if by_bits:
        bits = sorted({runner.bits for runner in rounds})
        groups = [(f"{b} bits", [r for r in rounds if r.bits == b]) for b in bits]
    found: Results = {}
    for name, members in groups:
        ours = [runner for runner in members if runner.ours]
        peers = [runner for runner in members if not runner.ours]
        if ours and peers:
            first, rival = (min(side, key=lambda r: median(rounds[r])) for side in (ours, peers))
            ratios = [b / a for a, b in zip(rounds[first], rounds[rival], strict=True)]
            found[name] = {
                "ours": first.name,
                "peer": rival.name,
                "ratio": median(ratios),
                "low": min(ratios),
                "high": max(ratios),
            }
    speeds = {runner.name: case.tokens / median(times) for runner, times in rounds.items()}
    return {"tokens_per_s": speeds, "ratios": found}


def table(case: Case, result: Results, notes: dict[str, str], asked: float | None) -> str:
    """The lines of one case: the fastest first, then those that didn't run, then the ratios.

    Args:
        case: what was done.
        result: as ``summary`` returns it.
        notes: by name, why a runner has no figure, or what must be known beside it.
        asked: the ratio that is wanted.
    """
    speeds: dict[str, float] = result["tokens_per_s"]
    lines = [f"{case.name}, tokens/s"]
    for name in sorted(speeds, key=lambda n: -speeds[n]):
        note = f"  ({notes[name]})" if name in notes else ""
        lines.append(f"  {name:<20} {speeds[name]:8.1f}{note}")
    lines += [f"  {name:<20}        -  ({notes[name]})" for name in notes if name not in speeds]
    for group, ratio in result["ratios"].items():
        wanted = f", asked {asked}x" if asked else ""
        lines.append(
            f"  {group}: {ratio['ours']} is {ratio['ratio']:.2f}x {ratio['peer']} "
            f"(rounds {ratio['low']:.2f} to {ratio['high']:.2f}{wanted})"
        )
    return "\n".join(lines)
