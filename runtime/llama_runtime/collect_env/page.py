"""The facts as a page to read, and to paste into a bug report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llama_runtime.errors import one_line

_NAMES = ("libraries", "environment")  # whose keys are names of others, and stay as they are
_LONGEST = 300  # characters of a line


def as_text(facts: Mapping[str, Mapping[str, object]]) -> str:
    """A title a section, a line a fact; ends in a newline."""
    return "\n\n".join(_section(title, facts[title]) for title in facts) + "\n"


def _section(title: str, section: Mapping[str, object]) -> str:
    rows = list(_libraries(section) if title == "libraries" else _rows(section))
    if title not in _NAMES:
        rows = [(name.replace("_", " ").removesuffix(" bytes"), text) for name, text in rows]
    width = max((len(name) for name, _ in rows), default=0)
    lines = [f"  {name:<{width}}  {text}" for name, text in rows]
    return "\n".join([title, *(lines or ["  none is set"])])


def _libraries(section: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """The version of each, and what is wrong with it; those that aren't there on one line."""
    absent = []
    for name, facts in section.items():
        if not isinstance(facts, Mapping):
            continue
        if facts["version"] is None and "error" not in facts:
            absent.append(name)
            continue
        yield (
            name,
            f"{facts['version'] or 'not installed'}"
            + (f", broken: {facts['error']}" if "error" in facts else ""),
        )
        more = {key: facts[key] for key in facts if key not in ("version", "error")}
        yield from ((f"{name} {key}", text) for key, text in _rows(more))
    if absent:
        yield "not installed", ", ".join(absent)


def _rows(section: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as one list, their names joined by spaces."""
    for key, value in section.items():
        name = f"{prefix}{one_line(key)}"
        if isinstance(value, Mapping):
            yield from _rows(value, f"{name} ")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield from _rows({f"{key} {index}": item for index, item in enumerate(value)}, prefix)
        else:
            yield name, _shown(key, value)


def _shown(key: str, value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return one_line(", ".join(map(str, value)), _LONGEST) or "none"
    if key.endswith("bytes") and isinstance(value, int):
        return f"{value / 1e6:,.0f} MB"
    return one_line(value, _LONGEST)
