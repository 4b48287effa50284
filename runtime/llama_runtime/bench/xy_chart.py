"""Charts of lines and points as SVG: a part of a page, or a file by itself.

As in ``svg_charts``, what lies along x is in percent and what lies along y in pixels, so a chart is
as wide as its place. Each series has a number, which is its colour everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from llama_runtime.bench.scales import Scale
from llama_runtime.pages.page_text import text

HEIGHT, TOP, BELOW = 240, 26, 44  # of the plot, and the room above and below it
FILE_WIDTH, FILE_LEFT, FILE_RIGHT, FILE_HEAD = 760, 70, 24, 66  # of a file by itself
_LETTER = 6.6  # pixels that a letter of a label takes, about


@dataclass(frozen=True, slots=True)
class _Colours:
    """Of a file; those of a page's paper and ink are in ``report.css``."""

    paper: str
    ink: str
    soft: str
    rule: str
    series: tuple[str, ...]


_LIGHT = _Colours(
    "#fdfcfa", "#23211e", "#6b665f", "#e2ddd5", ("#6b665f", "#2a6d9e", "#7d52b3", "#a8481a")
)
_DARK = _Colours(
    "#191816", "#e9e5de", "#a09a90", "#38352f", ("#a09a90", "#6fb1de", "#b99be3", "#ee9a63")
)


@dataclass(frozen=True, slots=True)
class Series:
    """A line.

    Attributes:
        name: in the legend; the same name may come twice, and stands there once.
        colour: 0 to 3.
        points: x and y of each, in order; one alone is a point.
        labels: a few letters beside each point, or none at all.
        dashed: for the second of two lines of one colour.
        marked: whether points are drawn; many are not.
    """

    name: str
    colour: int
    points: Seq[tuple[float, float]]
    labels: Seq[str] = ()
    dashed: bool = False
    marked: bool = True


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart.

    Attributes:
        name: an id that no other chart of a page has, and the name of its file.
        title: what it shows.
        note: how to read it, in a sentence.
        summary: the same as the chart in words, for who can't see it.
        x: of the x axis, and what it counts.
        y: the same of the y axis.
        series: the lines.
        marks: places of vertical lines across it, by x, and their labels.
    """

    name: str
    title: str
    note: str
    summary: str
    x: tuple[Scale, str]
    y: tuple[Scale, str]
    series: Seq[Series]
    marks: Seq[tuple[float, str]] = ()


def style() -> str:
    """CSS for charts within a page, beside that of ``report.css``."""
    dark = "\n".join(_series_rules(_DARK.series))
    return (
        ".chart.xy text.axis { text-anchor: start; }\n.chart.xy text.point { font-size: 10.5px; }\n"
        ".chart.xy text.x-name { text-anchor: end; }\n"
        ".chart.xy .curve { fill: none; stroke-width: 1.8; vector-effect: non-scaling-stroke; }\n"
        ".chart.xy .dashed { stroke-dasharray: 5 4; }\n"
        ".figures + figure { margin-top: 2.4rem; }\n"
        "figure + h3, .wide + h3 { margin: 2.4rem 0 0.3rem; }\n"
        ".legend li { display: flex; align-items: center; }\n"
        ".legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; margin: 0.5rem 0 0; "
        "padding: 0; list-style: none; font-size: 0.87rem; }\n"
        ".legend svg { width: 22px; height: 10px; margin-right: 0.4rem; }\n"
        + "\n".join(_series_rules(_LIGHT.series))
        + f"\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
        + "@media print {\n"
        + "\n".join(_series_rules(_LIGHT.series))
        + "\n}\n"
    )


def _series_rules(colours: Seq[str]) -> Iterator[str]:
    for i, colour in enumerate(colours):
        yield f".s{i} {{ stroke: {colour}; }}"
        yield f".d{i} {{ fill: {colour}; }}"


def figure(chart: Chart) -> str:
    """A chart as a part of a page of HTML."""
    return (
        f"<figure><figcaption><h3>{text(chart.title)}</h3><p>{text(chart.note)}</p>"
        f"{_html_legend(chart)}</figcaption>"
        f'<svg class="chart xy" role="img" aria-labelledby="{chart.name}-t {chart.name}-d" '
        f'width="100%" height="{TOP + HEIGHT + BELOW}"><title id="{chart.name}-t">'
        f'{text(chart.title)}</title><desc id="{chart.name}-d">{text(chart.summary)}</desc>'
        f"{''.join(_inside(chart, None))}</svg></figure>"
    )


def file(chart: Chart) -> str:
    """A chart as a file of SVG that needs nothing beside it."""
    height = FILE_HEAD + TOP + HEIGHT + BELOW + 12
    width = FILE_WIDTH - FILE_LEFT - FILE_RIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{FILE_WIDTH}" height="{height}" '
        f'viewBox="0 0 {FILE_WIDTH} {height}" role="img">'
        f"<title>{text(chart.title)}</title><desc>{text(chart.summary)}</desc>"
        f"<style>{_file_style(_LIGHT)} @media (prefers-color-scheme: dark) {{"
        f"{_file_style(_DARK)}}}</style>"
        f'<rect class="paper" width="100%" height="100%"/>'
        f'<text class="title" x="{FILE_LEFT}" y="30">{text(chart.title)}</text>'
        f'<g transform="translate({FILE_LEFT},52)">{"".join(_legend(chart))}</g>'
        f'<svg class="chart xy" x="{FILE_LEFT}" y="{FILE_HEAD}" width="{width}" '
        f'height="{TOP + HEIGHT + BELOW}" overflow="visible">'
        f"{''.join(_inside(chart, width))}</svg></svg>\n"
    )


def _file_style(colours: _Colours) -> str:
    return (
        f".paper{{fill:{colours.paper}}} text{{fill:{colours.soft};"
        "font-size:11.5px;font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans',"
        "'DejaVu Sans',sans-serif;"
        "text-anchor:middle}"
        f" text.title{{fill:{colours.ink};font-size:17px;font-weight:600;text-anchor:start}}"
        " text.y,text.x-name,text.last{text-anchor:end} text.axis,text.first,text.key"
        "{text-anchor:start} text.point{font-size:10.5px}"
        f" text.mark-label{{fill:{colours.ink}}} line{{stroke:{colours.rule}}}"
        f" line.base{{stroke:{colours.soft}}}"
        f" line.mark{{stroke:{colours.ink};stroke-dasharray:2 3}}"
        " .curve{fill:none;stroke-width:1.8}"
        " .dashed{stroke-dasharray:5 4} " + " ".join(_series_rules(colours.series))
    )


def _keys(chart: Chart) -> list[Series]:
    """One series of each name, in the order of their colours."""
    found: dict[str, Series] = {}
    for one in sorted(chart.series, key=lambda one: (one.colour, one.dashed)):
        found.setdefault(one.name, one)
    return list(found.values())


def _swatch(one: Series) -> str:
    return f'<rect class="d{one.colour}" x="0" y="3.5" width="22" height="3"/>'


def _html_legend(chart: Chart) -> str:
    keys = _keys(chart)
    if len(keys) < 2:
        return ""
    items = "".join(
        f'<li><svg class="chart xy">{_swatch(one)}</svg>{text(one.name)}</li>' for one in keys
    )
    return f'<ul class="legend">{items}</ul>'


def _legend(chart: Chart) -> Iterator[str]:
    keys = _keys(chart)
    if len(keys) < 2:
        return
    x = 0.0
    for one in keys:
        yield (
            f'<g transform="translate({x:.0f},-9)">{_swatch(one)}'
            f'<text class="key" x="28" y="9">{text(one.name)}</text></g>'
        )
        x += 28 + _LETTER * len(one.name) + 20


def _inside(chart: Chart, width: int | None) -> Iterator[str]:
    """What is drawn; for a width in pixels where it is known."""
    yield from _grid(chart)
    for at, label in chart.marks:
        x = 100 * chart.x[0].at(at)
        yield f'<line class="mark" x1="{x:.2f}%" x2="{x:.2f}%" y1="{TOP - 4}" y2="{TOP + HEIGHT}"/>'
        yield _text("mark-label", x, TOP - 8, label)
    for one in chart.series:
        yield from _curve(chart, one, width)


def _grid(chart: Chart) -> Iterator[str]:
    """Lines across, labels at both axes, and what they count."""
    for at, label in chart.y[0].ticks():
        y = TOP + HEIGHT * (1 - at)
        kind = "grid" if at else "base"
        yield f'<line class="{kind}" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="y" x="-7" y="{y + 4:.1f}">{text(label)}</text>'
    for at, label in chart.x[0].ticks():
        x, bottom = 100 * at, TOP + HEIGHT
        yield (f'<line class="base" x1="{x:.2f}%" x2="{x:.2f}%" y1="{bottom}" y2="{bottom + 4}"/>')
        yield _text("x", x, bottom + 18, label)
    yield f'<text class="axis" x="0" y="{TOP - 10}">{text(chart.y[1])}</text>'
    yield f'<text class="x-name" x="100%" y="{TOP + HEIGHT + 36}">{text(chart.x[1])}</text>'


def _curve(chart: Chart, one: Series, width: int | None) -> Iterator[str]:
    radius = 4.2 if len(one.points) == 1 else 3.4
    places = [(100 * chart.x[0].at(x), 1 - chart.y[0].at(y)) for x, y in one.points]
    dashed = " dashed" if one.dashed else ""
    if len(places) > 1 and width is not None:  # without what only browsers draw
        path = "L".join(f"{x / 100 * width:.2f},{TOP + HEIGHT * y:.2f}" for x, y in places)
        yield f'<path class="curve s{one.colour}{dashed}" d="M{path}"/>'
    elif len(places) > 1:
        path = "L".join(f"{x:.3f},{100 * y:.3f}" for x, y in places)
        yield (
            f'<svg y="{TOP}" width="100%" height="{HEIGHT}" viewBox="0 0 100 100" '
            f'preserveAspectRatio="none" overflow="visible">'
            f'<path class="curve s{one.colour}{dashed}" d="M{path}"/></svg>'
        )
    if not one.marked:
        return
    labels = one.labels or [""] * len(places)
    for (x, y), (true_x, true_y), label in zip(places, one.points, labels, strict=True):
        at = TOP + HEIGHT * y
        yield (
            f'<circle class="d{one.colour}" cx="{x:.2f}%" cy="{at:.1f}" r="{radius}">'
            f"<title>{text(f'{one.name}: {true_x:.6g}, {true_y:.6g}')}</title></circle>"
        )
        if label:
            yield _text("point", x, at + (-8 if one.colour == 3 else 17), label)


def _text(kind: str, x: float, y: float, label: str) -> str:
    """A text across a place; at the ends of the chart it stays within."""
    end = " first" if x < 4 else " last" if x > 96 else ""
    return f'<text class="{kind}{end}" x="{x:.2f}%" y="{y:.1f}">{text(label)}</text>'
