"""How good everybody's model is: what it predicts of the evaluation texts, beside the fp32 source.

The source's predictions are those that a bundle holds; texts, windows and estimator are those of
``llama-run eval``. A peer is given the same token ids, a window at a time and each from an empty
cache, and its logits come back in a file. Nothing is timed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_runtime.bundle import open_bundle
from llama_runtime.bundle_limits import REFERENCE_LOGPROBS
from llama_runtime.errors import CaravanError
from llama_runtime.evaluation.reference import Reference, read_reference
from llama_runtime.evaluation.report import Figures, QualityReport
from llama_runtime.evaluation.scoring import compared, evaluate, joined, report
from scripts.peers.compare import Runner
from scripts.peers.contest import Contest
from scripts.peers.process import Worker, WorkerError

Results = dict[str, Any]


def holds_reference(bundle: Path) -> bool:
    """Whether a bundle was built with its quality, and so with the source's predictions."""
    return (bundle / REFERENCE_LOGPROBS).is_file()


def qualities(
    contest: Contest, bundles: dict[str, Path], given_file: Sequence[str], threads: int
) -> Results:
    """Everybody's figures.

    Args:
        contest: those that loaded.
        bundles: ours, by the runner's name; all of one model, one at least with a reference.
        given_file: names of the peers that run the file as it is; others' tools rounded floats.
        threads: of our kernels.

    Returns:
        "figures", those of a quality report by name; "least", see ``least``; and "notes", by name
        why there are none.

    Raises:
        CaravanError: no bundle has a usable reference.
    """
    held = next((path for path in bundles.values() if holds_reference(path)), None)
    if held is None:
        raise CaravanError("no bundle holds the source's predictions: build one with --quality")
    reference = read_reference(open_bundle(held))
    reports: dict[Runner, QualityReport] = {}
    notes = dict(contest.notes)
    for runner, worker in contest.workers.items():
        print(f"measuring the quality of {runner.name}", file=sys.stderr, flush=True)
        try:
            if runner.ours:
                bundle = open_bundle(bundles[runner.name])
                reports[runner] = evaluate(bundle, threads=threads, reference=reference)
            else:
                reports[runner] = measured(runner.name, worker, reference)
        except (CaravanError, WorkerError) as error:
            notes[runner.name] = str(error)
    totals = {runner: one.total for runner, one in reports.items()}
    found = least(totals, given_file)
    print(table(totals, found, notes), flush=True)
    return {
        "figures": {runner.name: one.as_dict() for runner, one in reports.items()},
        "least": found,
        "notes": notes,
    }


def measured(name: str, worker: Worker, reference: Reference) -> QualityReport:
    """One peer's predictions of all windows, beside the source's.

    Args:
        name: what the report calls the peer.
        worker: it, loaded.
        reference: the source's predictions.

    Raises:
        WorkerError: it gives no logits, or not those of each token.
        BackendError: a logit is no finite number.
    """
    parts = []
    with tempfile.TemporaryDirectory(prefix="caravan-logits-") as folder:
        path = Path(folder, "logits")
        for number, window in enumerate(reference.windows):
            tokens = list(window.tokens[:-1])
            shape = worker.ask({"tokens": tokens, "output": str(path)})["shape"]
            if shape != [len(tokens), reference.vocab_size]:
                raise WorkerError(
                    f"its logits are {shape}, not [{len(tokens)}, {reference.vocab_size}]"
                )
            logits = np.fromfile(path, np.float32).reshape(shape)
            parts.append(compared(reference, number, 0, logits))
    return report(name, reference, joined(parts))


def least(totals: dict[Runner, Figures], given_file: Sequence[str]) -> Results:
    """The peers with the least mean divergence, and ours beside them.

    Args:
        totals: of everybody.
        given_file: as for ``qualities``.

    Returns:
        By bits and by where the peer has its weights from: "peer", and "ratios", how many times
        its mean divergence each of ours with as many bits has.
    """
    found: Results = {}
    for bits in sorted({runner.bits for runner in totals}):
        ours = {r.name: f for r, f in totals.items() if r.bits == bits and r.ours}
        peers = {r.name: f for r, f in totals.items() if r.bits == bits and not r.ours}
        for origin, named in (("rounded by the peer", False), ("of the file", True)):
            some = {name: f.mean_kl for name, f in peers.items() if (name in given_file) == named}
            if some:
                best = min(some, key=lambda name: some[name])
                ratios = {name: figures.mean_kl / some[best] for name, figures in ours.items()}
                found[f"{bits} bits, {origin}"] = {"peer": best, "ratios": ratios}
    return found


def table(totals: dict[Runner, Figures], found: Results, notes: dict[str, str]) -> str:
    """The nearest to the source first, then those without figures, then the least of each kind.

    Args:
        totals: of everybody.
        found: as ``least`` returns it.
        notes: by name, why there are no figures.
    """
    tokens = next((f"{figures.tokens:,} tokens" for figures in totals.values()), "nobody")
    columns = f"{'mean KL':>10} {'99.9 %':>8} {'top-1':>7}   perplexity ratio"
    lines = [f"quality, {tokens}", f"  {'':<20} {columns}"]
    for runner in sorted(totals, key=lambda runner: totals[runner].mean_kl):
        f = totals[runner]
        error = "" if f.perplexity_ratio_error is None else f" ± {f.perplexity_ratio_error:.4f}"
        lines.append(
            f"  {runner.name:<20} {f.mean_kl:>10.3g} {f.tail_kl:>8.3g} {f.top1_agreement:>7.1%}"
            f"   {f.perplexity_ratio:.4f}{error}"
        )
    lines += [f"  {name:<20}          -  ({why})" for name, why in notes.items()]
    for kind, one in found.items():
        beside = [f"{name} has {ratio:.2f}x its mean KL" for name, ratio in one["ratios"].items()]
        lines.append(f"  {kind}: {', '.join([one['peer'] + ' is the nearest', *beside])}")
    return "\n".join(lines)
