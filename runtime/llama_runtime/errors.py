"""The tree of errors that Caravan raises on purpose.

Every message is one sentence a user can act on: what is wrong, the value, the limit, what to do.

    CaravanError
    ├── BundleError       a bundle is missing something, altered, or of another schema
    ├── RequestError      one request is wrong; carries the parameter's name
    │   └── CapacityError a request is fine but larger than what was set up, or memory too small
    ├── BackendError      the compiled graph can't be loaded or failed while running
    └── DependencyError   an optional package is missing; names the command that installs it

``llama_decoder.CheckpointError`` and ``llama_export.ExportError`` derive from the root too.
"""

from __future__ import annotations


class CaravanError(Exception):
    """Root of everything that is raised on purpose."""


class BundleError(CaravanError):
    """A bundle can't be used: a file is missing, altered, extra or of an unknown schema."""


class RequestError(CaravanError, ValueError):
    """A request is wrong; the other requests are unharmed.

    Attributes:
        param: name of the offending parameter, as the caller spelled it.
    """

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


class CapacityError(RequestError):
    """More was asked for than was set up at start, or than memory allows."""


class QueueFullError(CaravanError):
    """Too much waits for a slot already; the same request may be taken later."""


class DeadlineError(CaravanError, TimeoutError):
    """A request has not ended by its deadline."""


class BackendError(CaravanError):
    """The compiled graph could not be loaded, or failed while running."""


class DependencyError(CaravanError):
    """An optional package is missing."""


def backend_error(error: Exception) -> BackendError:
    """An error of the backend, from whatever it raised."""
    if isinstance(error, BackendError):
        return error
    failure = BackendError(f"the backend failed: {error!r}")
    failure.__cause__ = error
    return failure


def one_line(text: object, limit: int = 500) -> str:
    """What somebody else wrote, as it may stand in a message: one short line that prints.

    Args:
        text: anything; a control character in it could change a terminal.
        limit: the most characters.
    """
    parts = "".join(c if c.isprintable() else "\n" for c in str(text)).split("\n")
    line = " ".join(part.strip() for part in parts if part.strip())
    return line if len(line) <= limit else f"{line[:limit]}..."


def rust_reason(error: BaseException) -> str:
    """What went wrong in a library written in Rust, as one line.

    A panic derives from ``BaseException``, as what must be passed on does; that is raised again.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return one_line(error)
