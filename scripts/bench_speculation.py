"""How fast completions are with speculation and without, at one stream and at eight."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from llama_runtime import LLM, SamplingParams
from scripts.bench_clock import seconds
from scripts.bench_machine import machine
from scripts.bench_speculation_prompts import CODE, EDIT, STORIES, SUMMARISE

MAX_LEN = 1024
# And how many prompts of each kind they answer. At eight one that ends makes room for the next, or
# else the time would be that of the slowest, with most of the slots empty.
STREAMS = {1: 4, 8: 16}
ASKED = {1: 1.5, 8: 1.2}  # times as fast, where answers repeat their prompts
ASKED_ELSEWHERE = 0.95
RANDOM_TOKENS = 200
MODES: tuple[Literal["off", "on"], ...] = ("off", "on")

Results = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """Prompts of one kind, and how they are continued."""

    repeats: bool  # whether answers hold much of what was there before
    prompts: list[list[int]]
    params: SamplingParams


def main() -> None:
    """Measure, and print the figures; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=128, help="the most of each answer")
    parser.add_argument("--only", action="append", help="kinds of prompts; all without it")
    parser.add_argument("--streams", type=int, choices=STREAMS, help="one or eight; both without")
    args = parser.parse_args()
    with LLM(args.bundle, max_batch=max(STREAMS), max_len=MAX_LEN, threads=args.threads) as llm:
        llm.generate([[1] * 40] * max(STREAMS), SamplingParams(max_tokens=4, ignore_eos=True))
        measured = {
            streams: {
                name: compare(llm, name, kind, streams, count, args.rounds)
                for name, kind in kinds(llm, args.tokens).items()
                if name in (args.only or [name])
            }
            for streams, count in STREAMS.items()
            if streams == (args.streams or streams)
        }
        threads = llm.threads
    print(
        json.dumps(
            {
                **machine(),
                "threads": threads,
                "rounds": args.rounds,
                "tokens": args.tokens,
                "asked": ASKED,
                "asked_elsewhere": ASKED_ELSEWHERE,
                "streams": {streams: summary(found) for streams, found in measured.items()},
            }
        )
    )


def kinds(llm: LLM, tokens: int) -> dict[str, Kind]:
    """What is asked, by name."""
    asked = {"summarise": SUMMARISE, "edit": EDIT, "code": CODE}
    chats = {
        name: [llm.chat_prompt([{"role": "user", "content": text}]) for text in texts]
        for name, texts in {**asked, "stories": STORIES}.items()
    }
    rng = np.random.default_rng(0)
    vocab_size = llm.bundle.manifest.geometry.vocab_size
    noise = rng.integers(0, vocab_size, (max(STREAMS), RANDOM_TOKENS)).tolist()
    greedy = SamplingParams(max_tokens=tokens, temperature=0.0)
    open_ended = replace(greedy, temperature=1.0, ignore_eos=True, seed=0)
    return {
        **{name: Kind(True, chats[name], greedy) for name in asked},
        "stories": Kind(False, chats["stories"], open_ended),
        "random tokens": Kind(False, noise, replace(open_ended, temperature=1.5)),
    }


def compare(llm: LLM, name: str, kind: Kind, streams: int, count: int, rounds: int) -> Results:
    """Tokens a second without and with speculation, which take turns at every batch of prompts.

    Prompts are computed anew each time, and count: "answers" is without the time that they take.
    """
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    answering: dict[str, list[float]] = {mode: [] for mode in MODES}
    before = llm.stats()
    for number in range(rounds):
        tokens, spent, prompts = dict.fromkeys(MODES, 0), dict.fromkeys(MODES, 0.0), 0.0
        batches = [range(i, i + 1) for i in range(count)] if streams == 1 else [range(count)]
        for batch in batches:
            act = partial(answer, llm, kind, batch, f"prompts {number}", max_tokens=1)
            prompts += seconds(act)
            for mode in MODES if number % 2 else reversed(MODES):
                counts: list[int] = []
                act = partial(
                    answer, llm, kind, batch, f"{mode} {number}", counts, speculation=mode
                )
                spent[mode] += seconds(act)
                tokens[mode] += sum(counts)
        for mode in MODES:
            rates[mode].append(tokens[mode] / spent[mode])
            answering[mode].append(tokens[mode] / (spent[mode] - prompts))
    after = llm.stats()
    found: Results = {
        "repeats": kind.repeats,
        "tokens_per_second": {mode: median(each) for mode, each in rates.items()},
        "times": _times(rates),
        "times_answers": _times(answering),
        "drafted": (after.drafted_tokens - before.drafted_tokens) // rounds,
        "accepted": (after.accepted_tokens - before.accepted_tokens) // rounds,
    }
    print(
        f"{streams} streams, {name:<13} {found['tokens_per_second']['off']:6.1f} tokens a second, "
        f"with speculation {found['tokens_per_second']['on']:6.1f}: {found['times']:.2f} times, "
        f"{found['times_answers']:.2f} without the prompts; "
        f"{found['accepted']} of {found['drafted']} guesses were right",
        flush=True,
    )
    return found


def answer(
    llm: LLM,
    kind: Kind,
    batch: range,
    salt: str,
    counts: list[int] | None = None,
    **params: Any,
) -> None:
    """Answer some of the prompts at once.

    Args:
        llm: answers.
        kind: what is asked.
        batch: which of its prompts; beyond the last it begins again.
        salt: keeps computed prompts from being used again.
        counts: gets how many tokens each completion has.
        params: other than those of the kind.
    """
    changed = replace(kind.params, **params)
    # A seed for each, or all would draw the same numbers.
    seeds = [None if changed.seed is None else i for i in batch]
    each = [
        replace(changed, seed=seed, cache_salt=f"{salt}, {i}")
        for i, seed in zip(batch, seeds, strict=True)
    ]
    completions = llm.generate([kind.prompts[i % len(kind.prompts)] for i in batch], each)
    if counts is not None:
        counts += [len(completion.token_ids) for completion in completions]


def summary(found: dict[str, Results]) -> Results:
    """The figures of each kind, the mean of those that repeat themselves and the worst other."""
    repeating = [of_kind["times"] for of_kind in found.values() if of_kind["repeats"]]
    others = [of_kind["times"] for of_kind in found.values() if not of_kind["repeats"]]
    return {
        "kinds": found,
        "times": float(np.exp(np.log(repeating).mean())) if repeating else None,
        "worst_elsewhere": min(others, default=None),
    }


def _times(rates: dict[str, list[float]]) -> float:
    return median(on / off for on, off in zip(rates["on"], rates["off"], strict=True))


if __name__ == "__main__":
    main()
