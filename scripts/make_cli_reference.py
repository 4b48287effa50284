"""See ``scripts/make_cli_reference``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from llama_export.cli import main as llama_export
from llama_runtime.cli import cli as llama_run

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
WIDTH = 80
INTRODUCTION = """\
# Commands

What `--help` says of each command, written by `scripts/make_cli_reference`; a test compares them.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"wrote {PAGE.name}")


def reference() -> str:
    """The page: a list of the commands, then the help of each."""
    groups: dict[str, click.Group] = {"llama-export": llama_export, "llama-run": llama_run}
    return "".join([INTRODUCTION, *_contents(groups), *_sections(groups)])


def _contents(groups: dict[str, click.Group]) -> Iterator[str]:
    for program, group in groups.items():
        links = ", ".join(f"[{name}](#{program}-{name})" for name in sorted(group.commands))
        yield f"\n`{program}`: {links}\n"


def _sections(groups: dict[str, click.Group]) -> Iterator[str]:
    for program, group in groups.items():
        parent = click.Context(group, info_name=program)
        for name, command in sorted(group.commands.items()):
            settings = {**command.context_settings, "help_option_names": ["-h", "--help"]}
            context = click.Context(
                command, parent, info_name=name, max_content_width=WIDTH, **settings
            )
            context.terminal_width = WIDTH
            yield f"\n## {program} {name}\n\n```text\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    main()
