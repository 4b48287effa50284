"""TensorRT itself: which of its two libraries is used, what it builds for, and what it says."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from llama_runtime.errors import DependencyError, RequestError

INSTALL = (
    "pip install 'llama-caravan[tensorrt-rtx]' from PyPI, or pip install 'llama-caravan[tensorrt]' "
    "--extra-index-url https://pypi.nvidia.com from NVIDIA's own index"
)
CURRENT = "current"  # the target that is this machine's GPU

# The first whose parser has TensorScatter, RMSNormalization and RotaryEmbedding; of TensorRT-RTX
# no earlier version was tried. The preferred library comes first.
_LEAST = {"tensorrt": (10, 15), "tensorrt_rtx": (1, 7)}


@dataclass(frozen=True, slots=True)
class Library:
    """One of the two libraries.

    Attributes:
        name: ``tensorrt``, or ``tensorrt_rtx`` for TensorRT-RTX.
        version: as it calls itself; an engine belongs to one version.
        module: the imported module.
    """

    name: str
    version: str
    module: Any

    @property
    def builds_ahead(self) -> bool:
        """Whether it builds for GPUs that this machine needn't have."""
        return self.name == "tensorrt_rtx"

    def targets(self) -> tuple[str, ...]:
        """What it can build for, in its own order."""
        if not self.builds_ahead:
            return (CURRENT,)
        names = self.module.ComputeCapability.__members__
        return tuple(name.lower() for name in names if name != "NONE")


def import_tensorrt(name: str | None = None) -> Library:
    """Import TensorRT.

    Args:
        name: of the library; None for TensorRT if it is installed, and else TensorRT-RTX.

    Raises:
        RequestError: there is no library of that name.
        DependencyError: it isn't installed, is broken, or too old.
    """
    if name is not None and name not in _LEAST:
        raise RequestError(f"library must be {' or '.join(_LEAST)}, not {name!r:.80}", param="name")
    wanted = list(_LEAST) if name is None else [name]
    found = next((one for one in wanted if importlib.util.find_spec(one) is not None), None)
    if found is None:
        raise DependencyError(f"{' and '.join(wanted)} can't be found: {INSTALL}")
    try:
        module = importlib.import_module(found)
    except (ImportError, OSError, RuntimeError) as error:  # the latter of its shared libraries
        raise DependencyError(f"{found} can't be imported ({error}): {INSTALL}") from error
    version = str(module.__version__)
    least = _LEAST[found]
    if _numbers(version)[: len(least)] < least:
        raise DependencyError(
            f"{found} is of version {version}, and {'.'.join(map(str, least))} is the first that "
            f"will do: {INSTALL}"
        )
    return Library(found, version, module)


def parse_targets(text: str, library: Library) -> tuple[str, ...]:
    """The GPUs that an engine is built for.

    Args:
        text: names with commas between, such as ``sm86,sm89``, or ``current``.
        library: what will build it.

    Returns:
        Each once, in the order of the library, so that one set is spelled one way.

    Raises:
        RequestError: the library doesn't build for one of them.
    """
    has = library.targets()
    wanted = [name.strip().lower() for name in text.split(",")]
    for name in wanted:
        if name not in has:
            more = "" if library.builds_ahead else ", the GPU of the machine that builds"
            raise RequestError(
                f"{library.name} {library.version} can't build for {name!r:.80}: it has "
                f"{', '.join(has)}{more}",
                param="for",
            )
    if CURRENT in wanted and len(set(wanted)) > 1:
        raise RequestError(f"{CURRENT} can't be combined with other GPUs", param="for")
    return tuple(name for name in has if name in wanted)


class Messages:
    """What TensorRT says while somebody listens.

    Attributes:
        lines: with their severity, which is 0 or 1 for errors and grows as they matter less.
    """

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []

    @property
    def errors(self) -> list[str]:
        """What was wrong, in order."""
        return [text for severity, text in self.lines if severity <= _ERROR]

    @property
    def text(self) -> str:
        """All of it, a line each."""
        return "".join(f"{_SEVERITIES[level]}: {line}\n" for level, line in self.lines)


_SEVERITIES = ("internal error", "error", "warning", "info")
_ERROR = 1
_listeners: list[Messages] = []
_listening = threading.Lock()


@cache
def process_logger(library: Library) -> Any:
    """The one logger of this process, for builders and runtimes.

    TensorRT keeps a pointer to the first that it is given and uses that one for everything that
    follows, so there is one, and it is never given up.
    """
    base: Any = library.module.ILogger

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            level = int(severity)
            if level < len(_SEVERITIES):  # not what is verbose
                with _listening:
                    for listener in _listeners:
                        listener.lines.append((level, text))

    return Logger()


@contextmanager
def messages() -> Iterator[Messages]:
    """Listen to TensorRT, whatever thread it works in, until the block ends."""
    listener = Messages()
    with _listening:
        _listeners.append(listener)
    try:
        yield listener
    finally:
        with _listening:
            _listeners.remove(listener)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
