"""What the pages name exists: links, headings, paths, commands and options in the text."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.docs import shell
from tests.docs.pages import PAGES, ROOT, read

EVERY = pytest.mark.parametrize("path", PAGES, ids=[path.name for path in PAGES])
ALL = {path.resolve(): read(path) for path in PAGES}
PATH = re.compile(r"(?:tests|scripts|docs|examples|deploy|runtime|export|models)/[\w./-]+")
# Options of other programs that the pages speak of.
FOREIGN = {"--read-only", "--tmpfs", "--no-index", "--find-links"}


@EVERY
def test_links_lead_somewhere(path: Path) -> None:
    for line, target in ALL[path.resolve()].links():
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        place = (path.parent / name).resolve() if name else path.resolve()
        assert place.exists(), f"{path.name}:{line}: {target}"
        if anchor:
            page = ALL.get(place) or read(place)
            assert anchor in page.anchors(), f"{path.name}:{line}: {target}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, left = set[Path](), [ROOT / "README.md"]
    while left:
        path = left.pop()
        reached.add(path)
        for _, target in read(path).links():
            place = (path.parent / target.partition("#")[0]).resolve()
            if place.suffix == ".md" and place.is_file() and place not in {*reached, *left}:
                left.append(place)
    pages = {path.resolve() for path in (ROOT / "docs").glob("*.md")}
    assert pages <= reached, pages - reached


@EVERY
def test_paths_in_the_text_exist(path: Path) -> None:
    for line, span in ALL[path.resolve()].spans():
        found = PATH.match(span)
        if found and "*" not in span:
            assert (ROOT / found[0]).exists(), f"{path.name}:{line}: {span}"


@EVERY
def test_commands_in_the_text_have_the_options_that_they_are_given(path: Path) -> None:
    for line, span in ALL[path.resolve()].spans():
        program, *args = shlex.split(span) if span.startswith("pip install ") else span.split()
        if program == "pip":
            shell.check(shell.Command([program, *args], None, {}))
        elif program.startswith("scripts/") and program != "scripts/" and "*" not in program:
            shell.check_script(program, args)
        elif program in shell.PROGRAMS and args and not args[0].startswith("-"):
            commands = shell.PROGRAMS[program].commands
            assert args[0] in commands, f"{path.name}:{line}: {span}"
            known = {option for one in commands[args[0]].params for option in one.opts}
            given = {
                arg.partition("=")[0] for arg in args[1:] if arg.startswith("-") and arg != "-"
            }
            assert given <= known | {"--help", "-h"}, f"{path.name}:{line}: {span}"


@EVERY
def test_options_in_the_text_exist(path: Path) -> None:
    known, seen = FOREIGN | {"--help", "--version"}, set[Path]()
    for group in shell.PROGRAMS.values():
        for command in group.commands.values():
            known |= {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
    for script in (ROOT / "scripts").iterdir():
        known |= shell.script_options(script, seen)
    for line, span in ALL[path.resolve()].spans():
        option = re.match(r"--[a-z][\w-]*", span)
        assert option is None or option[0] in known, f"{path.name}:{line}: {span}"
