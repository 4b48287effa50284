"""Workers that take turns at the same work."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from scripts.peers.compare import Runner, slow, summary, table
from scripts.peers.process import Worker, WorkerError
from scripts.peers.works import ASKED, Case, Texts

SETTLE_SECONDS = 0.3  # the threads of the worker before spin a little while

Results = dict[str, Any]


class Contest:
    """Loaded workers, one of which computes at a time.

    Attributes:
        workers: those that loaded.
        notes: by name, why one can't take part at all.
        settings: by name, what a worker said that it set.
    """

    def __init__(self) -> None:
        self.workers: dict[Runner, Worker] = {}
        self._texts: dict[Runner, Texts] = {}
        self._idle: dict[Runner, list[float]] = {}
        self.notes: dict[str, str] = {}
        self.settings: dict[str, Results] = {}

    def __enter__(self) -> Contest:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def enter(self, runner: Runner, command: list[str], texts: Texts, log: Path) -> None:
        """Start a worker, or note why it can't be."""
        try:
            worker = Worker(command, log)
        except WorkerError as error:
            self.notes[runner.name] = str(error)
            return
        self.workers[runner], self._texts[runner] = worker, texts
        self._idle[runner] = [0.0, 0.0]
        self.settings[runner.name] = worker.settings

    def run(self, case: Case, rounds: int, drop: float, *, by_bits: bool) -> Results:
        """One case: a round to warm up, then as many as asked for.

        Args:
            case: what is done.
            rounds: how many rounds count.
            drop: see ``compare.slow``; who is that slow to warm up runs no further.
            by_bits: see ``compare.summary``.

        Returns:
            What ``summary`` returns, and "seconds" of all rounds and "notes", both by name.
        """
        notes = dict(self.notes)
        warm_up: dict[Runner, float] = {}
        for runner in self.workers:
            self._turn(runner, case, 0, warm_up, notes)
        dropped = slow(warm_up, drop, by_bits=by_bits)
        for runner in dropped:
            speed = case.tokens / warm_up[runner]
            notes[runner.name] = f"{speed:.1f} in the warm-up, over {drop:g} times slower: left out"
        times: dict[Runner, list[float]] = {
            runner: [] for runner in warm_up if runner not in dropped
        }
        for number in range(1, rounds + 1):
            order = list(times)
            first = number % len(order) if order else 0
            for runner in order[first:] + order[:first]:
                turn: dict[Runner, float] = {}
                self._turn(runner, case, number, turn, notes)
                if runner in turn:
                    times[runner].append(turn[runner])
                else:
                    del times[runner]
        result = summary(case, times, by_bits=by_bits)
        result["seconds"] = {runner.name: several for runner, several in times.items()}
        result["notes"] = notes
        print(table(case, result, notes, ASKED.get(case.name)), flush=True)
        return result

    def idle(self) -> dict[str, float]:
        """By name, what part of a processor each used while others computed."""
        return {
            runner.name: used / waited if waited else 0.0
            for runner, (used, waited) in self._idle.items()
        }

    def _turn(
        self,
        runner: Runner,
        case: Case,
        number: int,
        seconds: dict[Runner, float],
        notes: dict[str, str],
    ) -> None:
        worker = self.workers[runner]
        prompts = self._texts[runner].prompts(case, number)
        time.sleep(SETTLE_SECONDS)
        before = {other: self.workers[other].cpu_seconds() for other in self.workers}
        started = time.perf_counter()
        try:
            if number == 0:
                _check_lengths(worker, prompts, case)
            seconds[runner] = worker.generate(prompts, case.new_tokens)
        except WorkerError as error:
            notes[runner.name] = str(error)
        waited = time.perf_counter() - started
        for other, used in before.items():
            if other != runner:
                self._idle[other][0] += max(0.0, self.workers[other].cpu_seconds() - used)
                self._idle[other][1] += waited


def _check_lengths(worker: Worker, prompts: list[str], case: Case) -> None:
    """Everybody reads as many tokens; one more, at the beginning, is let pass."""
    counts = worker.ask({"count": prompts})["counts"]
    for count, (wanted, _) in zip(counts, case.lengths, strict=True):
        if not wanted <= count <= wanted + 1:
            raise WorkerError(f"it makes {count} tokens of a prompt of {wanted}")
