"""See ``scripts/simulate_scale``.

A worker runs ``ROWS_PER_SECOND``, and two pieces at a time, so that it is never idle between them.
A free worker takes the next piece. When a worker dies, what it did of both pieces is lost; it is
back after ``RESTART_SECONDS``, and the pieces are run again. A figure is the share of all workers'
time in which no result came about that counts.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llama_runtime.batch.runners.ray_tables import rows_of_piece

WORKERS = 64
SLOTS = 32  # of a worker
ROWS_PER_SECOND = 4.0  # of a worker
SPREAD = 0.1  # of the workers' speeds, as the sigma of a log-normal distribution
PIECE_SPREAD = 0.2  # of the time that equal numbers of rows take
SLOW_SHARE, SLOWNESS = 0.02, 3.0  # so many workers are so much slower than the others
RESTART_SECONDS = 120.0  # a process or a machine, and the model
START_SECONDS = 60.0  # of a job: processes, and the model
PIECE_SECONDS = 0.05  # of a worker for each piece: Ray's bookkeeping, and reading the file
HOUR = 3600.0


@dataclass(frozen=True)
class Setting:
    """A job to simulate.

    Attributes:
        rows: how many there are.
        piece_rows: in a piece; None for what Caravan does.
        hours_to_death: the mean, of a worker.
    """

    rows: int
    piece_rows: int | None
    hours_to_death: float

    def pieces(self) -> Iterator[int]:
        """Rows of each piece."""
        left = self.rows
        while left > 0:
            size = min(self.piece_rows or rows_of_piece(left, WORKERS, SLOTS), left)
            yield size
            left -= size


def lost_share(setting: Setting, random: np.random.Generator) -> float:
    """One job: the share of the workers' time that came to nothing."""
    speeds = ROWS_PER_SECOND * np.exp(SPREAD * random.standard_normal(WORKERS))
    speeds[random.random(WORKERS) < SLOW_SHARE] /= SLOWNESS
    # Two pieces at a time are like two workers of half the speed that die together.
    deaths = START_SECONDS + random.exponential(setting.hours_to_death * HOUR, WORKERS)
    lanes = [(START_SECONDS, lane) for lane in range(2 * WORKERS)]
    heapq.heapify(lanes)
    end = START_SECONDS
    for size in setting.pieces():
        luck = float(np.exp(PIECE_SPREAD * random.standard_normal()))
        while True:
            now, lane = heapq.heappop(lanes)
            worker = lane // 2
            while deaths[worker] + RESTART_SECONDS <= now:
                lived = random.exponential(setting.hours_to_death * HOUR)
                deaths[worker] += RESTART_SECONDS + lived
            done = now + 2 * size * luck / speeds[worker] + PIECE_SECONDS
            if done <= deaths[worker]:
                heapq.heappush(lanes, (done, lane))
                end = max(end, done)
                break
            heapq.heappush(lanes, (max(now, deaths[worker]) + RESTART_SECONDS, lane))
    ideal = setting.rows / float(speeds.sum())
    return 1.0 - ideal / end


def mean_lost(setting: Setting, seed: int, rounds: int) -> float:
    """The mean over several jobs, which are the same for each setting as far as can be."""
    rounds_of = [np.random.default_rng([seed, number]) for number in range(rounds)]
    return float(np.mean([lost_share(setting, random) for random in rounds_of]))


def table(title: str, heads: list[str], rows: list[tuple[str, list[float]]]) -> None:
    """Print a table in Markdown."""
    print(f"| {title} | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 1) + "|")
    for name, values in rows:
        print(f"| {name} | " + " | ".join(f"{value:.1%}" for value in values) + " |")
    print()


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()

    def lost(rows: int, piece_rows: int | None, hours: float) -> float:
        return mean_lost(Setting(rows, piece_rows, hours), options.seed, options.rounds)

    hours = {"2 h": 2.0, "8 h": 8.0, "24 h": 24.0, "720 h": 720.0}
    sizes: dict[str, int | None] = {f"{size:,}": size for size in (32, 256, 1024, 8192)}
    sizes |= {f"shrinking, {8 * SLOTS} to {SLOTS}": None}
    table(
        "rows of a piece, a million rows",
        [f"dies every {name}" for name in hours],
        [
            (name, [lost(10**6, size, mean) for mean in hours.values()])
            for name, size in sizes.items()
        ],
    )
    table(
        "rows of a job, shrinking pieces",
        [f"dies every {name}" for name in hours],
        [
            (f"{rows:,}", [lost(rows, None, mean) for mean in hours.values()])
            for rows in (10**5, 10**6, 4 * 10**6)
        ],
    )


if __name__ == "__main__":
    main()
