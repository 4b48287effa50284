"""Tables and lists of the pages are what the code and the folder say."""

from __future__ import annotations

import re
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import fields
from math import prod
from pathlib import Path

from llama_decoder.shapes import SHAPES
from llama_decoder.weights import parameter_shapes
from llama_runtime.contract import Geometry
from llama_runtime.cuda_loading import CUDA_MAX_BATCH, CUDA_PROMPT_BUDGET
from llama_runtime.cuda_plan import MARGIN, CudaPlan, block_size_of
from llama_runtime.machine import Memory
from llama_runtime.manifest import SCHEMA_VERSION, FileEntry, Graph, Licence, Manifest, Source
from tests.docs.pages import ROOT, read

README = ROOT / "README.md"
DOCS = ROOT / "docs"
NESTED = {
    "source": ("source.", Source),
    "licence": ("licence.", Licence),
    "geometry": ("geometry.", Geometry),
    "graphs": ("graphs[].", Graph),
    "files": ("files.NAME.", FileEntry),
}


def table_after(path: Path, comment: str) -> list[list[str]]:
    """The cells of the table behind a comment, its head first."""
    text = path.read_text(encoding="utf-8")
    assert text.count(f"<!-- {comment} -->\n") == 1
    _, _, rest = text.partition(f"<!-- {comment} -->\n")
    rows = re.match(r"(?:\|.*\n)+", rest)
    assert rows is not None
    head, _, *body = rows[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in (head, *body)]


def test_the_bundles_page_names_every_field_of_the_manifest() -> None:
    named = [row[0].strip("`") for row in table_after(DOCS / "bundle.md", "fields: manifest")[1:]]
    there = []
    for field in fields(Manifest):
        prefix, record = NESTED.get(field.name, (field.name, None))
        inner = fields(record) if record else ()
        there += [prefix + one.name for one in inner] if record else [prefix]
    assert sorted(named) == sorted(there)


def test_the_manifest_of_the_bundles_page_is_one() -> None:
    (block,) = (b for b in read(DOCS / "bundle.md").blocks if b.language == "json")
    assert Manifest.from_json(block.text.encode()).schema == SCHEMA_VERSION


def test_the_bundles_page_names_the_files_that_are_there(home: Path) -> None:
    text = (DOCS / "bundle.md").read_text(encoding="utf-8")
    for path in (home / "bundle").iterdir():
        assert f"`{path.name}`" in text


def test_batch_sizes_of_the_strategies_page_are_the_planners() -> None:
    head, *rows = table_after(DOCS / "strategies.md", "planned: gpu")
    names = [re.findall(r"Llama-[\w.-]+", cell)[0] for cell in head[1:]]
    for gpu, *cells in rows:
        memory = int(gpu.removesuffix(" GB")) * 10**9
        assert cells == [in_pool(name, memory) for name in names], gpu


def in_pool(name: str, memory: int) -> str:
    """How many sequences of 2,048 tokens a GPU of so many bytes holds; nothing for none."""
    config = SHAPES[name]
    geometry = config.geometry
    block = block_size_of(geometry.head_dim)
    plan = CudaPlan(
        geometry=geometry,
        weights=2 * sum(prod(shape) for shape in parameter_shapes(config).values()),
        available=Memory(int((1 - MARGIN) * memory), "a GPU"),
        max_batch=CUDA_MAX_BATCH,
        max_len=2048,
        prompt_budget=CUDA_PROMPT_BUDGET,
        block_size=block,
    )
    left = plan.available.num_bytes - plan.weights - plan.workspace
    count = max(0, left // plan.block_bytes // (2048 // block))
    return f"{count:,}" if count else ""


def test_the_readme_fits_a_minute() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) < 200


def test_figures_of_the_readme_are_those_of_the_performance_page() -> None:
    measured = (DOCS / "performance.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if "|" in line]
    start = rows.index("| runner | mean KL | B = 1 | 8 | 32 |")
    table = [row for row in rows[start + 2 :] if row.count("|") == 6]
    assert len(table) >= 5
    assert not set(table) - set(measured)


def test_the_tree_of_the_readme_is_the_folder() -> None:
    (tree,) = (b for b in read(README).blocks if b.language == "text")
    named = [line.split()[0] for line in tree.text.splitlines()]
    for name in named:
        path = ROOT / name
        assert path.is_dir() if name.endswith("/") else path.is_file(), name
    assert {name.partition("/")[0] for name in named} >= tracked()


def tracked() -> set[str]:
    """First parts of the paths that git has, but for those that begin with a dot."""
    args = ["git", "ls-files"]
    listed = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {line.partition("/")[0] for line in listed.splitlines() if not line.startswith(".")}


def test_images_of_the_pages_need_nothing_beside_them() -> None:
    images = list((DOCS / "images").glob("*.svg"))
    assert images
    for path in images:
        text = path.read_text(encoding="utf-8")
        root = ET.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "<script" not in text
        assert not re.search(r"(?:href|src)=\"(?!#)", text), path
