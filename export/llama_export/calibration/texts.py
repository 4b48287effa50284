"""The texts from which the rounding of weights learns how large activations get.

Real texts of the kinds that a model meets, shipped with the package, so that a build needs no
download and gives the same weights everywhere. None shares a passage with the evaluation texts of
the runtime. ``NOTICE`` says who wrote them, under which licence, and what was left out.
"""

from __future__ import annotations

from importlib.resources import files

KINDS = ("prose", "code", "chat", "non_english")


def calibration_texts() -> tuple[str, ...]:
    r"""The texts, one of each of `KINDS`, in that order: UTF-8 with ``\n`` line ends.

    Raises:
        FileNotFoundError: if the package was installed without its texts.
    """
    folder = files("llama_export.calibration") / "texts"
    return tuple((folder / f"{kind}.txt").read_bytes().decode() for kind in KINDS)
