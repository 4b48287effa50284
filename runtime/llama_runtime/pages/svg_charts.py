"""Charts as SVG inside a page of HTML.

A chart is as wide as its place and of a fixed height: what lies along x is in percent, so its
texts keep their size on a phone. Labels of the y axis hang out on the left, where the page leaves
room. Colours and fonts are those of the page's style sheet.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import ceil

from llama_runtime.pages.page_text import clock, nice_step, nice_time, short, text

HEIGHT = 150  # of the plot, in CSS pixels; labels lie above and below
TOP = 22
_BELOW = 22
_Y_TICKS = 4
_LEAST = 1e-300  # of values: smaller ones have no round steps
_X_TICKS = 6
_LABEL_PERCENT = 10.0  # that the label of a mark takes of a narrow chart's width
_EDGE_PERCENT = 4  # from an end, where labels don't lie across their place but on one side of it
_MANY_MARKS = 16  # would hide the chart: they become ticks above it


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line across a chart.

    Attributes:
        at: where, in percent of the width.
        label: a few letters at its top, or none.
    """

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Axis:
    """The y axis, from 0.

    Attributes:
        top: its end, at a tick.
        step: between ticks.
    """

    top: float
    step: float

    @classmethod
    def to(cls, most: float, *, whole: bool = False) -> Axis:
        """The axis for values up to one.

        Args:
            most: the largest value; 0, and what is hardly more, is as good as 1.
            whole: whether only whole numbers may have ticks.
        """
        most = most if most > _LEAST else 1
        step = nice_step(most, _Y_TICKS)
        step = max(1.0, step) if whole else step
        return cls(max(1, ceil(round(most / step, 9))) * step, step)

    def y(self, value: float) -> float:
        """Where a value lies, in pixels from the top."""
        return TOP + HEIGHT * (1 - value / self.top)

    def ticks(self) -> list[float]:
        """The values of its ticks, from 0 up."""
        return [i * self.step for i in range(round(self.top / self.step) + 1)]


def over_time(
    name: str, title: str, summary: str, values: Seq[float], span: float, marks: Seq[Mark] = ()
) -> str:
    """A chart of means over equal pieces of time.

    Args:
        name: an id that no other chart of the page has.
        title: what it shows.
        summary: the same as a chart in words, for who can't see it.
        values: one for each piece, at least one.
        span: seconds of all pieces, above 0.
        marks: lines across it.
    """
    axis = Axis.to(max(values))
    width = 100 / len(values)
    points = []
    for i, value in enumerate(values):
        y = f"{100 * (1 - value / axis.top):.2f}"
        points += [f"{i * width:.3f},{y}", f"{(i + 1) * width:.3f},{y}"]
    step = nice_time(span, _X_TICKS)
    ticks = [(100 * i * step / span, clock(i * step, step)) for i in range(int(span / step) + 1)]
    line = "L".join(points)
    return _chart(
        name,
        title,
        summary,
        axis,
        [
            f'<svg y="{TOP}" width="100%" height="{HEIGHT}" viewBox="0 0 100 100" '
            f'preserveAspectRatio="none"><path class="area" d="M0,100L{line}L100,100Z"/>'
            f'<path class="line" d="M{line}"/></svg>',
            *_marks(marks),
            *_x_ticks(ticks),
        ],
    )


def bars(
    name: str,
    title: str,
    summary: str,
    counts: Seq[int],
    tips: Seq[str],
    ticks: Seq[tuple[float, str]],
    marks: Seq[Mark] = (),
) -> str:
    """A chart of counts as bars of one width, side by side.

    Args:
        name: an id that no other chart of the page has.
        title: what it shows.
        summary: the same as a chart in words, for who can't see it.
        counts: the heights, at least one.
        tips: what a pointer on each bar is told.
        ticks: of the x axis, in percent of the width, and their labels.
        marks: lines across it.
    """
    axis = Axis.to(max(counts), whole=True)
    width = 100 / len(counts)
    rects = [
        f'<rect class="bar" x="{i * width + 0.05 * width:.3f}%" y="{axis.y(count):.2f}" '
        f'width="{0.9 * width:.3f}%" height="{axis.y(0) - axis.y(count):.2f}">'
        f"<title>{text(tip)}</title></rect>"
        for i, (count, tip) in enumerate(zip(counts, tips, strict=True))
        if count
    ]
    return _chart(name, title, summary, axis, [*rects, *_marks(marks), *_x_ticks(ticks)])


def _chart(name: str, title: str, summary: str, axis: Axis, inside: Seq[str]) -> str:
    grid = []
    for value in axis.ticks():
        y = axis.y(value)
        kind = "grid" if value else "base"
        grid.append(f'<line class="{kind}" x1="0" x2="100%" y1="{y:.2f}" y2="{y:.2f}"/>')
        grid.append(f'<text class="y" x="-7" y="{y + 4:.2f}">{short(round(value, 9))}</text>')
    return (
        f'<svg class="chart" role="img" aria-labelledby="{name}-t {name}-d" '
        f'width="100%" height="{TOP + HEIGHT + _BELOW}">'
        f'<title id="{name}-t">{text(title)}</title><desc id="{name}-d">{text(summary)}</desc>'
        f"{''.join(grid)}{''.join(inside)}</svg>"
    )


def _marks(marks: Seq[Mark]) -> Iterator[str]:
    """The lines of marks, and the labels for which there is room."""
    free = 0.0
    few = len(marks) <= _MANY_MARKS
    for mark in marks:
        yield (
            f'<line class="mark{"" if few else " tick"}" x1="{mark.at:.3f}%" x2="{mark.at:.3f}%" '
            f'y1="{TOP - 6}" y2="{TOP + HEIGHT if few else TOP}"/>'
        )
        left = _left(mark.at)
        if few and mark.label and left >= free:
            free = left + _LABEL_PERCENT
            yield _label("mark-label", mark.at, TOP - 9, mark.label)


def _x_ticks(ticks: Seq[tuple[float, str]]) -> Iterator[str]:
    for at, label in ticks:
        yield (
            f'<line class="base" x1="{at:.3f}%" x2="{at:.3f}%" y1="{TOP + HEIGHT}" '
            f'y2="{TOP + HEIGHT + 4}"/>'
        )
        yield _label("x", at, TOP + HEIGHT + 18, label)


def _left(at: float) -> float:
    """Where the label of a mark begins."""
    if at < _EDGE_PERCENT:
        return at
    return at - _LABEL_PERCENT / (1 if at > 100 - _EDGE_PERCENT else 2)


def _label(kind: str, at: float, y: float, label: str) -> str:
    """A text below or above a place; at the ends it stays within the chart."""
    end = " first" if at < _EDGE_PERCENT else " last" if at > 100 - _EDGE_PERCENT else ""
    return f'<text class="{kind}{end}" x="{at:.3f}%" y="{y}">{text(label)}</text>'
