"""What both commands share: an error is one sentence and an exit status, whatever it is."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import click

from llama_runtime.errors import (
    BundleError,
    CaravanError,
    DependencyError,
    RequestError,
    one_line,
)

FAILED = 1
USAGE = 2
INTERRUPTED = 128 + 2  # as a shell reports SIGINT
CLOSED_PIPE = 128 + 13  # as a shell reports SIGPIPE
_LONGEST_ERROR = 2_000  # characters


class Commands(click.Group):
    """Commands whose errors end as one sentence on standard error and an exit status.

    A pipe that nobody reads any more ends them quietly, as it ends others.
    """

    def main(  # type: ignore[override]  # click's own has overloads for the same arguments
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        standalone_mode: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Run, and end the process unless ``standalone_mode`` is False; see click."""
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **kwargs)
        status = self._status(args, prog_name, **kwargs)
        try:
            sys.stderr.flush()
        except OSError:
            _forget(sys.stderr)
        sys.exit(status)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Click itself answers both of these with other statuses."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            _forget(sys.stdout)
            ctx.exit(CLOSED_PIPE)

    def status_of(self, error: CaravanError) -> int:
        """The exit status of an error: wrong use, or a failure."""
        wrong_use = isinstance(error, (RequestError, BundleError, DependencyError))
        return USAGE if wrong_use else FAILED

    def _status(self, args: Sequence[str] | None, prog_name: str | None, **kwargs: Any) -> int:
        try:
            result = super().main(args, prog_name, standalone_mode=False, **kwargs)
        except click.ClickException as error:
            with contextlib.suppress(OSError):
                error.show()
            return error.exit_code
        except click.Abort:
            return INTERRUPTED
        except CaravanError as error:
            return _fail(str(error), self.status_of(error))
        except OSError as error:
            place = "can't write to standard output"
            if error.filename is not None:
                place = f"{error.filename} can't be used"
            return _fail(f"{place}: {error.strerror or error}", FAILED)
        except MemoryError:
            return _fail("not enough memory", FAILED)
        return result if isinstance(result, int) else 0


def examples(*lines: str) -> str:
    """The end of a help text; the first character keeps click from rewrapping the lines."""
    title = "Examples:" if len(lines) > 1 else "Example:"
    return "\b\n" + "\n".join([title, *(f"  {line}" for line in lines)])


def print_out(text: str) -> None:
    """Write to standard output, in UTF-8 whatever the terminal says, and at once.

    Raises:
        BrokenPipeError: nobody reads it any more.
        CaravanError: it can't be written.
    """
    try:
        click.echo(text.encode("utf-8"), nl=False)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CaravanError(f"can't write to standard output: {error.strerror}") from error


def _forget(stream: TextIO) -> None:
    """Keep the interpreter from writing at its end what could not be written before."""
    with contextlib.suppress(OSError):  # under test it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def open_closed_streams() -> None:
    """Give a process that was started without standard streams some that say so.

    Else Python has None in their place, and the next file that is opened takes their number. There
    is nothing to read from such a standard input, and nothing can be written to such an output.
    """
    modes = {0: os.O_RDONLY, 1: os.O_RDONLY, 2: os.O_WRONLY}  # each takes the lowest free number
    missing = [number for number in modes if not _is_open(number)]
    for number in missing:
        os.open(os.devnull, modes[number])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            file = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, file)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _fail(message: str, status: int) -> int:
    with contextlib.suppress(OSError):
        click.echo(f"Error: {one_line(message, _LONGEST_ERROR)}", err=True)
    _forget(sys.stdout)
    return status
