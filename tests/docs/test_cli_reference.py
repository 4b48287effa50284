"""docs/cli.md is what the commands say of themselves."""

from __future__ import annotations

from scripts.make_cli_reference import PAGE, reference


def test_the_reference_is_what_help_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run scripts/make_cli_reference"
