"""The way into ``llama-export``, also as ``python -m llama_export``."""

from __future__ import annotations

from llama_runtime import interrupts


def main() -> None:
    """Run the command line. An interrupt ends it at once, also while it is being imported."""
    interrupts.end_at_once()
    try:
        from llama_runtime.command_line import open_closed_streams

        open_closed_streams()
        from llama_export.cli import main as cli

        cli(prog_name="llama-export")
    finally:
        interrupts.leave_in_peace()


if __name__ == "__main__":
    main()
