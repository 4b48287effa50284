"""A job's ``summary.json`` as one page of HTML that needs nothing beside it.

No scripts, fonts or pictures from elsewhere; whatever comes from the job is escaped. It follows the
reader's light or dark setting, and fits a phone and a sheet of paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from llama_runtime.batch.figures import report_charts
from llama_runtime.pages.page import facts, page
from llama_runtime.pages.page_text import number, seconds, share, text


def render(summary: Mapping[str, Any]) -> str:
    """The page.

    Args:
        summary: what ``summary.json`` holds: ``job`` and ``machine``, facts by name of any JSON
            type, of which "bundle", "input", "output", "started" and "ended" of the job are shown
            at the top; and ``statistics``, from ``Statistics.to_dict``.

    Returns:
        The text of the page, to be written as UTF-8.

    Raises:
        KeyError, TypeError, ValueError: ``statistics`` isn't such a record.
    """
    job, statistics = summary["job"], summary["statistics"]
    title = f"Batch job: {job.get('bundle', 'unnamed')}"
    parts = [
        f"<header><h1>{text(title)}</h1>{_lead(job)}</header>",
        _headline(statistics),
        *report_charts.over_time(statistics["timeline"]),
        *report_charts.per_row(statistics["per_row"]),
        *_finish_reasons(statistics["finish_reasons"]),
        *_errors(statistics["first_errors"], statistics["failed"]),
        '<div class="two">',
        *facts("Job", job),
        *facts("Machine", summary["machine"]),
        "</div>",
    ]
    return page(title, parts)


def _lead(job: Mapping[str, Any]) -> str:
    way = " → ".join(str(job[name]) for name in ("input", "output") if name in job)
    when = " to ".join(str(job[name]) for name in ("started", "ended") if job.get(name))
    return "".join(f'<p class="lead">{text(line)}</p>' for line in (way, when) if line)


def _headline(statistics: Mapping[str, Any]) -> str:
    """The figures one wants first, each with what it means."""
    rows, failed = statistics["rows"], statistics["failed"]
    runs, elapsed = statistics["timeline"]["runs"], statistics["seconds"]
    cells = [
        ("Rows", number(rows), _rate(statistics, "rows", "a second"), ""),
        ("Failed", number(failed), share(failed, rows), ' class="bad"' if failed else ""),
        ("Time at work", seconds(elapsed), "in one run" if runs == 1 else f"in {runs:,} runs", ""),
    ]
    for label, name in (
        ("Prompt tokens", "prompt_tokens"),
        ("Completion tokens", "completion_tokens"),
    ):
        cells.append((label, number(statistics[name]), _rate(statistics, name, "tokens/s"), ""))
    return '<dl class="figures">{}</dl>'.format(
        "".join(
            f"<div><dt>{label}</dt><dd{kind}>{text(value)}</dd><dd>{text(note)}</dd></div>"
            for label, value, note, kind in cells
        )
    )


def _rate(statistics: Mapping[str, Any], name: str, unit: str) -> str:
    rate = statistics[f"{name}_per_second"]
    return "" if rate is None else f"{number(rate)} {unit}"


def _finish_reasons(reasons: Mapping[str, int]) -> Iterator[str]:
    yield "<h2>Finish reasons</h2>"
    if not reasons:
        yield '<p class="note">No completion has ended yet.</p>'
        return
    total = sum(reasons.values())
    yield '<div class="wide"><table class="shares"><thead><tr><th scope="col">Reason</th>'
    yield '<th scope="col" class="n">Completions</th><th scope="col" class="n">Share</th>'
    yield "<td></td></tr></thead><tbody>"
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        yield (
            f'<tr><th scope="row">{text(reason)}</th><td class="n">{number(count)}</td>'
            f'<td class="n">{share(count, total)}</td><td><span class="share" '
            f'style="width:{100 * count / total:.2f}%"></span></td></tr>'
        )
    yield "</tbody></table></div>"


def _errors(errors: Seq[Mapping[str, Any]], failed: int) -> Iterator[str]:
    if not errors:
        return
    yield "<h2>First errors</h2>"
    if failed > len(errors):
        yield f'<p class="note">Those of the lowest rows, of {number(failed)} in all.</p>'
    yield '<ol class="errors">'
    for error in errors:
        yield (
            f'<li><span class="row">row {number(error["index"])}</span>'
            f'<span class="message">{text(error["message"])}</span></li>'
        )
    yield "</ol>"
