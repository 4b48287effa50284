"""A bundle's manifest as a page to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict

from llama_runtime.errors import one_line
from llama_runtime.manifest import Manifest


def describe(manifest: Manifest) -> str:
    """What a bundle holds, in aligned lines, ending in a newline."""
    return "\n".join(_lines(manifest)) + "\n"


def _lines(manifest: Manifest) -> Iterator[str]:
    source, licence = manifest.source, manifest.licence
    yield manifest.name
    yield from _section(
        "",
        {
            "source": f"{source.file} ({source.format})",
            "source sha256": source.sha256,
            "licence": licence.name or "not stated",
            "licence files": ", ".join(licence.files) or "none",
            "schema": manifest.schema,
        },
    )
    tools = {one_line(tool): version for tool, version in manifest.created_by.items()}
    yield from _section("Built with", tools)
    yield from _section("Geometry", _spaced(asdict(manifest.geometry)))
    yield from _section(
        "Graphs",
        {graph.dialect: f"{graph.precision}, {graph.file}" for graph in manifest.graphs},
    )
    sizes = {name: f"{entry.size:>15,} bytes" for name, entry in sorted(manifest.files.items())}
    total = sum(entry.size for entry in manifest.files.values())
    yield from _section("Files", {**sizes, "total": f"{total:>15,} bytes"})
    figures = dict(_flat(manifest.verification))
    yield from _section("Verification", _spaced(figures) or {"none": "recorded"})


def _section(title: str, entries: Mapping[str, object]) -> Iterator[str]:
    yield ""
    if title:
        yield title
    width = max(map(len, entries), default=0)
    for key, value in entries.items():
        yield f"  {key:<{width}}  {value}"


def _spaced(values: Mapping[str, object]) -> dict[str, object]:
    """Names of fields as words."""
    return {key.replace("_", " "): value for key, value in values.items()}


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Nested figures as one list, their names joined by spaces."""
    for key, value in values.items():
        name = f"{prefix}{one_line(key)}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name} ")
        else:
            yield name, one_line(value)
