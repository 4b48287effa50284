"""The page of a job: whole by itself, safe whatever the job held, and true to its summary."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_runtime.batch.figures.html_report import render
from llama_runtime.batch.figures.statistics import Statistics
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.pages.page_text import nice_step, nice_time, number, text
from llama_runtime.pages.svg_charts import HEIGHT, TOP, Axis

VOID = {"meta", "link", "br", "img", "input", "hr"}
ELEMENTS = {  # of HTML; what SVG holds is read apart
    *("html", "head", "meta", "title", "style", "body", "main", "header", "section"),
    *("h1", "h2", "h3", "p", "dl", "dt", "dd", "div", "span", "ol", "li", "figure", "figcaption"),
    *("table", "thead", "tbody", "tr", "th", "td", "details", "summary", "svg"),
}
DRAWN = {"svg", "title", "desc", "line", "text", "rect", "path"}


class Page(HTMLParser):
    """A page read strictly: every tag is closed, in its order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.attributes: set[str] = set()
        self.rows: list[list[str]] = []
        self.pieces: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("tr", "dl"):
            self.rows.append([])
        if tag in ("th", "td", "dt", "dd"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)
        if {"th", "td", "dt", "dd"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        """The cells after the only line with this name in its first cell."""
        (found,) = [row[1:] for row in self.rows if row and row[0] == name]
        return found


def ran(rows: int, kills: tuple[int, ...] = ()) -> Statistics:
    draw = random.Random(rows)
    statistics, seconds = Statistics(), 0.0
    for index in range(rows):
        seconds += draw.expovariate(5)
        prompt, completion = 1 + int(draw.lognormvariate(5, 1)), int(draw.lognormvariate(4, 1))
        error = None if draw.random() < 0.9 else f"row {index} is wrong"
        reasons = ("error",) if error else (draw.choice(["stop", "stop", "length"]),)
        statistics.count(Outcome(index, b"", error, prompt, completion, reasons, completion / 30))
        statistics.sample(seconds, draw.randint(1, 32))
        if index in kills:
            statistics, seconds = Statistics.from_dict(statistics.to_dict()), 0.0
    return statistics


def summary(statistics: Statistics, **job: Any) -> Any:
    facts = {"bundle": "tiny", "input": "in.jsonl", "output": "out.jsonl", "started": "2026-01-01"}
    whole = {
        "job": {**facts, "options": {"max_tokens": 64}, **job},
        "machine": {"threads": 2},
        "statistics": statistics.to_dict(),
    }
    return json.loads(json.dumps(whole))


JOBS = {
    "empty": ran(0),
    "one": ran(1),
    "few": ran(7, kills=(3,)),
    "many": ran(900, kills=(100, 400)),
    "often stopped": ran(300, kills=tuple(range(0, 300, 5))),
}


@pytest.fixture(params=JOBS)
def statistics(request: pytest.FixtureRequest) -> Statistics:
    return JOBS[request.param]


def test_the_page_is_well_formed_and_needs_nothing_else(statistics: Statistics) -> None:
    source = render(summary(statistics))
    page = Page(source)
    assert set(page.elements) <= ELEMENTS | DRAWN
    for outside in ("http:", "https:", "url(", "@import", "<script", "src=", "href", "javascript:"):
        assert outside not in source.lower()
    ids = re.findall(r' id="([^"]*)"', source)
    assert len(ids) == len(set(ids))


def charts(source: str) -> list[ElementTree.Element]:
    found = re.findall(r'<svg class="chart".*?</svg>(?=<details|</figure)', source, re.DOTALL)
    return [ElementTree.fromstring(svg) for svg in found]


def test_every_chart_is_a_picture_with_its_text(statistics: Statistics) -> None:
    source = render(summary(statistics))
    drawn = charts(source)
    assert len(drawn) == source.count('class="chart"') == (6 if statistics.rows else 0)
    for chart in drawn:
        assert {element.tag for element in chart.iter()} <= DRAWN
        assert chart.get("role") == "img"
        named = [
            chart.find(f".//*[@id='{name}']") for name in chart.get("aria-labelledby", "").split()
        ]
        assert [element is not None and bool(element.text) for element in named] == [True, True]
        for rect in chart.iter("rect"):
            top, height = float(rect.get("y", "")), float(rect.get("height", ""))
            assert TOP - 0.01 <= top <= top + height <= TOP + HEIGHT + 0.01
        for path in chart.iter("path"):
            places = re.findall(r"-?[\d.]+", path.get("d", ""))
            assert len(places) >= 4
            assert all(0 <= float(place) <= 100 for place in places)


def test_a_bar_is_as_high_as_its_count() -> None:
    source = render(summary(JOBS["many"]))
    for chart, name in zip(charts(source)[3:], JOBS["many"].per_row, strict=True):
        counts = [n for *_, n in JOBS["many"].to_dict()["per_row"][name]["histogram"]]
        heights = [float(rect.get("height", "")) for rect in chart.iter("rect")]
        scale = HEIGHT / Axis.to(max(counts), whole=True).top
        assert heights == pytest.approx([scale * n for n in counts], abs=0.02)


@pytest.mark.parametrize(
    ("job", "lines", "labels"),
    [("one", 0, 0), ("few", 1, 1), ("many", 2, 2), ("often stopped", 60, 0)],
)
def test_charts_over_time_are_marked_where_runs_began(job: str, lines: int, labels: int) -> None:
    drawn = charts(render(summary(JOBS[job])))[:3]
    began = JOBS[job].timeline.marks[1:]
    for chart in drawn:
        marks = [line for line in chart.iter("line") if "mark" in line.get("class", "")]
        places = [float(line.get("x1", "").rstrip("%")) for line in marks]
        assert places == pytest.approx(
            [100 * t / JOBS[job].timeline.seconds for t in began], abs=0.01
        )
        assert lines * 0.5 <= len(marks) <= lines  # runs of less than a cell share a mark
        texts = [t.text for t in chart.iter("text") if "mark-label" in t.get("class", "")]
        assert texts == [f"run {i}" for i in range(2, 2 + labels)]


def test_the_numbers_are_those_of_the_summary(statistics: Statistics) -> None:
    record = statistics.to_dict()
    page = Page(render(summary(statistics)))
    figures = next(row for row in page.rows if row and row[0] == "Rows")
    cells = {figures[i]: figures[i + 1] for i in range(0, len(figures), 3)}
    assert cells["Rows"] == f"{record['rows']:,}"
    assert cells["Failed"] == f"{record['failed']:,}"
    assert cells["Prompt tokens"] == f"{record['prompt_tokens']:,}"
    assert cells["Completion tokens"] == f"{record['completion_tokens']:,}"
    for reason, count in record["finish_reasons"].items():
        assert page.row(reason)[0] == f"{count:,}"
    for error in record["first_errors"]:
        assert error["message"] in page.pieces
    if record["rows"]:
        for figure in ("min", "p50", "p90", "p99", "max"):
            expected = [record["per_row"][name][figure] for name in record["per_row"]][:2]
            assert page.row(figure)[:2] == [f"{value:,}" for value in expected]
        for start, end, count in record["per_row"]["prompt_tokens"]["histogram"]:
            wide = f"{start:,} to {end - 1:,}" if end - 1 > start else f"{start:,}"
            assert [f"{count:,}"] in [row[1:2] for row in page.rows if row and row[0] == wide]


def test_rates_over_time_add_up_to_the_tokens() -> None:
    statistics = JOBS["many"]
    page = Page(render(summary(statistics)))
    start = next(i for i, row in enumerate(page.rows) if row and row[0] == "From") + 1
    pieces = 72
    rates = [
        [float(cell.replace(",", "")) for cell in row[2:5]] for row in page.rows[start:][:pieces]
    ]
    expected = statistics.rows, statistics.prompt_tokens, statistics.completion_tokens
    for rate, total in zip(zip(*rates, strict=True), expected, strict=True):
        assert sum(rate) * statistics.timeline.seconds / pieces == pytest.approx(total, rel=0.005)


HOSTILE = [
    "</title></style></svg><script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "' onmouseover='alert(1)",
    "]]><!-- <!DOCTYPE x> &lt;b&gt; &amp;&#x3c; </td></table>",
    "nul \0 escape \x1b[2J half \ud800 none \ufffe c1 \x9b right-to-left \u202eabc",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_texts_stay_texts(hostile: str) -> None:
    def page(word: str) -> Page:
        statistics = Statistics()
        statistics.count(Outcome(0, b"", word, 3, 4, (word,), 0.5))
        statistics.sample(1, 1)
        whole = summary(statistics, bundle=word, input=word, ended=word, options={word: [word]})
        whole["machine"] = {word: {"cpu": word}}
        source = render(whole)
        source.encode("utf-8")
        return Page(source)

    found, harmless = page(hostile), page("word")
    assert found.elements == harmless.elements
    assert found.attributes == harmless.attributes
    # The parser gives back the very text, but for what no page can hold.
    shown = re.sub("[\0\x1b\x9b\ud800\ufffe]", "\ufffd", hostile)
    assert found.pieces.count(shown) == harmless.pieces.count("word") >= 3


@given(st.text() | st.text(st.characters(codec=None, categories=["Cc", "Cs", "Cn"])))
def test_any_text_can_stand_in_xml_and_utf_8(value: str) -> None:
    ElementTree.fromstring(b"<p a='%b'>%b</p>" % ((text(value).encode("utf-8"),) * 2))


@given(st.floats(1e-9, 1e15) | st.integers(0, 10**15))
@example(999.96)
@example(0.09999)
def test_a_number_is_right_to_three_digits(value: float) -> None:
    shown = number(value)
    assert float(shown.replace(",", "")) == pytest.approx(value, rel=0.005)
    assert not shown.endswith(".")


@given(st.floats(1e-6, 1e12), st.integers(1, 10))
def test_steps_of_axes_fit_and_are_round(span: float, most: int) -> None:
    for step in (nice_step(span, most), nice_time(span, most)):
        assert step * most / span >= 0.9999
        assert step * most / span <= 3 or step >= 1
    assert re.fullmatch(r"[125]e[-+]\d+", f"{nice_step(span, most):.0e}")


@given(st.floats(0, 1e12), st.booleans())
def test_an_axis_holds_its_values_in_a_few_ticks(most: float, whole: bool) -> None:
    axis = Axis.to(most, whole=whole)
    assert axis.top >= most * 0.9999
    assert 2 <= len(axis.ticks()) <= 6
    assert axis.ticks()[-1] == pytest.approx(axis.top)
    assert not whole or all(tick == int(tick) for tick in axis.ticks())
