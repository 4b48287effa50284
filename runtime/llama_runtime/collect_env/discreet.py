"""Keep to oneself what a report needn't tell: folders, keys."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping

from llama_runtime.errors import one_line

HIDDEN = "(set, not shown)"
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")
_SHOWN = ("LLAMA_RUN_", "LLAMA_EXPORT_", "OMP_", "KMP_", "MKL_", "OPENBLAS_", "ORT_", "CUDA_")
_FOLDERS = re.compile(r"(?<![\w.\0])(?:[A-Za-z]:)?[/\\](?:[^\s/\\:;,'\"()<>]+[/\\])*")
_LONGEST = 300  # characters of an error or a value


def error_text(error: BaseException | str, keep: str = "") -> str:
    """An error on one line, of its paths the names only.

    Args:
        error: as it was raised, or its text.
        keep: a path that stays whole, since whoever asks has named it.
    """
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return one_line(without_folders(text, keep), _LONGEST)


def without_folders(text: str, keep: str = "") -> str:
    """A text, of its absolute paths the names only.

    Args:
        text: any.
        keep: a path that stays whole.
    """
    known = {os.path.expanduser("~"), sys.prefix, sys.base_prefix} - {"~", os.sep}
    mark = "\0"  # in no path
    if keep:
        text = text.replace(keep, mark)
    for folder in sorted(known, key=len, reverse=True):  # they may hold spaces
        text = text.replace(folder, "/_")
    return _FOLDERS.sub(".../", text).replace(mark, keep)


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that change what Caravan and its libraries do, by name.

    Args:
        environment: all of them, such as ``os.environ``.

    Returns:
        Their values; of paths the names, and of what may be a key that it is set.
    """
    return {
        name: _value(name, value)
        for name, value in sorted(environment.items())
        if name.startswith(_SHOWN) or name == "NVIDIA_VISIBLE_DEVICES"
    }


def _value(name: str, value: str) -> str:
    if any(part in name.upper() for part in _SECRET) or "://" in value:
        return HIDDEN  # an address may hold a password
    return one_line(
        os.pathsep.join(without_folders(part) for part in value.split(os.pathsep)), _LONGEST
    )
