"""A record as one page of HTML that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from itertools import groupby
from typing import Any

from llama_runtime.bench.charts import charts
from llama_runtime.bench.figures import LATENCIES, PERCENTILES
from llama_runtime.bench.table import rates_of, workload_of, workload_text
from llama_runtime.bench.xy_chart import Chart, figure, file, style
from llama_runtime.pages.page import facts, page, table
from llama_runtime.pages.page_text import NONE, number, share, text

Run = Mapping[str, Any]
_APART = ("tool", "runs", "notes", "machine", "limits")  # of a record: shown in their own places
_LATENCY = ("mean", "median", *(f"p{p}" for p in PERCENTILES))


def render(record: Mapping[str, Any]) -> str:
    """The page.

    Args:
        record: what the JSON file holds.

    Returns:
        HTML, to be written as UTF-8.
    """
    title = f"{record['tool']}: {record['model']}"
    body = [
        f"<header><h1>{text(title)}</h1>"
        f'<p class="lead">{text(record["date"])} on {text(record["machine"]["processor"])}</p>'
        "</header>",
        *(f'<p class="note">{text(note)}</p>' for note in record["notes"]),
    ]
    for number_of, (key, group) in enumerate(groupby(record["runs"], key=workload_of)):
        runs = list(group)
        body.append(f"<h2>{text(workload_text(key))}</h2>")
        body.append(_headline(runs))
        body += map(figure, charts(runs, f"-{number_of}"))
        body += _tables(runs)
    body.append('<div class="two">')
    body += facts("Asked", {k: v for k, v in record.items() if k not in _APART})
    body += facts("Machine", record["machine"])
    body += facts("Limits, measured at the start", _limits(record.get("limits")))
    body.append("</div>")
    return page(title, body, style())


def drawings(record: Mapping[str, Any]) -> dict[str, str]:
    """The charts as files of SVG, by name."""
    several = [list(group) for _, group in groupby(record["runs"], key=workload_of)]
    found: dict[str, Chart] = {}
    for i, runs in enumerate(several):
        suffix = f"-{i}" if len(several) > 1 else ""
        found |= {f"{chart.name}.svg": chart for chart in charts(runs, suffix)}
    return {name: file(chart) for name, chart in found.items()}


def _label(run: Run) -> str:
    if "strategy" in run:
        return f"{run['strategy']}, batch {run['batch_size']}"
    return f"{run['max_concurrency'] or 'any number'} at once, rate {run['request_rate']}"


def _headline(runs: Seq[Run]) -> str:
    """The best run, and what the ways come to beside it."""
    best = max(runs, key=lambda run: run["output_throughput"])
    cells = [
        ("Most completion tokens", f"{number(best['output_throughput'])}/s", _label(best)),
    ]
    for run in runs:
        if run.get("strategy") == "sequential" and run["output_throughput"]:
            times = best["output_throughput"] / run["output_throughput"]
            cells.append(("Over one at a time", f"{number(times)} x", "in the same time"))
    if rates_of(runs) and best.get("bandwidth_share") is not None:
        cells.append(("Of reading", share(best["bandwidth_share"], 1), "the machine's limit"))
        cells.append(("Of multiplying", share(best["compute_share"], 1), "the machine's limit"))
    failed = sum(run["failed"] for run in runs)
    if failed:
        cells.append(("Failed", number(failed), "requests"))
    return '<dl class="figures">{}</dl>'.format(
        "".join(
            f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd><dd>{text(note)}</dd></div>"
            for name, value, note in cells
        )
    )


def _tables(runs: Seq[Run]) -> Iterator[str]:
    columns: list[tuple[str, Callable[[Run], str]]] = [
        ("requests/s", lambda run: number(run["request_throughput"])),
        ("tokens/s out", lambda run: number(run["output_throughput"])),
        ("tokens/s in all", lambda run: number(run["total_token_throughput"])),
        ("failed", lambda run: number(run["failed"])),
        ("seconds", lambda run: number(run["duration"])),
    ]
    if runs[0].get("peak_memory_bytes") is not None:
        columns.append(("memory, MB", lambda run: _megabytes(run["peak_memory_bytes"])))
    if runs[0].get("bandwidth_share") is not None:
        columns.append(("of reading", lambda run: share(run["bandwidth_share"], 1)))
        columns.append(("of multiplying", lambda run: share(run["compute_share"], 1)))
    yield "<h3>Rates</h3>"
    yield table(
        ["", *(name for name, _ in columns)],
        [[_label(run), *(show(run) for _, show in columns)] for run in runs],
    )
    for name, words in LATENCIES.items():
        yield f"<h3>{words.capitalize()}, ms</h3>"
        yield table(
            ["", *_LATENCY],
            [[_label(run), *(number(run[f"{of}_{name}_ms"]) for of in _LATENCY)] for run in runs],
        )
    errors = [(run, run["errors"]) for run in runs if run.get("errors")]
    if errors:
        yield "<h3>Errors</h3>"
        yield table(
            ["", "kind and number"],
            [
                [_label(run), ", ".join(f"{kind}: {count}" for kind, count in kinds.items())]
                for run, kinds in errors
            ],
        )


def _megabytes(value: float | None) -> str:
    return NONE if value is None else number(value / 1e6)


def _limits(limits: Mapping[str, Any] | None) -> dict[str, object]:
    if limits is None:
        return {}
    return {
        "reading memory": f"{limits['bandwidth'] / 1e9:.1f} GB/s",
        **{
            f"products of {kind}": f"{rate / 1e9:,.0f} G operations/s"
            for kind, rate in limits["rates"].items()
        },
        **({} if limits["threads"] is None else {"threads": limits["threads"]}),
    }
