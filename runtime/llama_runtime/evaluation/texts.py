r"""The texts on which a precision is measured: real ones, of four kinds, shipped with the package.

They are UTF-8 with ``\n`` line ends, and none shares a passage with the calibration texts of the
exporter: numbers measured on a text that the rounding has seen would flatter it. ``NOTICE`` says
who wrote them, under which licence, and what was left out.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

KINDS = ("prose", "code", "chat", "non_english")


@dataclass(frozen=True)
class EvaluationText:
    """One text.

    Attributes:
        kind: one of `KINDS`.
        text: what is predicted, token by token.
    """

    kind: str
    text: str


def evaluation_texts() -> tuple[EvaluationText, ...]:
    """The texts, one of each kind, in the order of `KINDS`.

    Raises:
        FileNotFoundError: if the package was installed without its texts.
    """
    return tuple(EvaluationText(kind, _bytes(kind).decode()) for kind in KINDS)


def texts_sha256() -> str:
    """SHA-256 in hex over kind, length and bytes of each text, in order.

    A manifest holds it beside what was measured, so that numbers of other texts aren't compared.

    Raises:
        FileNotFoundError: if the package was installed without its texts.
    """
    digest = hashlib.sha256()
    for kind in KINDS:
        data = _bytes(kind)
        # With the length, a passage moved from one text to the next is another hash.
        digest.update(f"{kind} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def _bytes(kind: str) -> bytes:
    return (files("llama_runtime.evaluation") / "texts" / f"{kind}.txt").read_bytes()
