"""A page of HTML that is whole by itself, and the parts that several pages share.

No scripts, fonts or pictures from elsewhere. It follows the reader's light or dark setting, and
fits a phone and a sheet of paper. What comes in as text is escaped; what is called HTML is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from importlib.resources import files

from llama_runtime.pages.page_text import NONE, text


def page(title: str, body: Iterable[str], style: str = "") -> str:
    """The whole page.

    Args:
        title: text.
        body: pieces of HTML.
        style: rules of CSS beside those of ``report.css``.

    Returns:
        HTML, to be written as UTF-8.
    """
    common = files("llama_runtime.pages").joinpath("report.css").read_text("utf-8")
    inside = "\n".join(body)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>\n{common}{style}</style>\n</head>\n"
        f"<body>\n<main>\n{inside}\n</main>\n</body>\n</html>\n"
    )


def table(heads: Seq[str], lines: Seq[Seq[str]]) -> str:
    """A table whose first column names its lines and whose others hold numbers; all are text."""
    head = "".join(
        f'<th scope="col"{_numeric(i)}>{text(name)}</th>' for i, name in enumerate(heads)
    )
    body = "".join(
        f'<tr><th scope="row">{text(line[0])}</th>'
        + "".join(f'<td class="n">{text(cell)}</td>' for cell in line[1:])
        + "</tr>"
        for line in lines
    )
    inside = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table>{inside}</table></div>'


def _numeric(column: int) -> str:
    return ' class="n"' if column else ""


def details(label: str, inside: str) -> str:
    """HTML that is shown when its label is chosen."""
    return f"<details><summary>{label}</summary>{inside}</details>"


def facts(heading: str, named: Mapping[str, object]) -> Iterator[str]:
    """A section of facts by name; those within a mapping are named after both."""
    lines = list(_flat(named, ""))
    if not lines:
        return
    yield f'<section><h2>{heading}</h2><table class="facts"><tbody>'
    for name, value in lines:
        shown = NONE if value is None else value
        yield f'<tr><th scope="row">{text(name)}</th><td>{text(shown)}</td></tr>'
    yield "</tbody></table></section>"


def _flat(named: Mapping[str, object], above: str) -> Iterator[tuple[str, object]]:
    for name, value in named.items():
        shown = above + str(name).replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{shown}: ")
        else:
            yield shown, value
