"""A tokenizer in which the text of a control token is plain text.

It is the bundle's own, but each control token has a text that nobody can guess instead of its own,
in the added tokens and in the vocabulary. So a prompt can hold both: what a template wrote gets the
secret text, what somebody typed stays as it is, and both are encoded in one go. Piece by piece
would be wrong: some tokenizers put a space before a text and none between its parts.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers


class ShadowTokenizer:
    """Encodes prompts whose control tokens are known by their place; safe to share.

    Args:
        backend: the tokenizer to shadow.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        from tokenizers import Tokenizer as Backend

        document = json.loads(backend.to_str())
        added = [token for token in document["added_tokens"] if token["special"]]
        # The ends stay: a token may be one only where no letter is beside it.
        self._secrets = {
            token["content"]: token["content"][0] + secrets.token_hex(16) + token["content"][-1]
            for token in added
        }
        self._ids = {token["content"]: int(token["id"]) for token in added}
        for token in added:
            token["content"] = self._secrets[token["content"]]
        _rename_entries(document["model"], self._secrets)
        document["post_processor"] = None
        self._backend = Backend.from_str(json.dumps(document))
        for text, token_id in self._ids.items():
            if self._backend.token_to_id(self._secrets[text]) != token_id:
                raise RuntimeError(f"the shadow of {text!r} isn't token {token_id}")

    def encode(self, pieces: Sequence[str]) -> list[int]:
        """Token ids of a prompt.

        Args:
            pieces: its texts at even places, its control tokens at odd ones.
        """
        text, spans = self._joined(pieces)
        encoding = self._backend.encode(text, add_special_tokens=False)
        missed = self._missed(pieces, spans, encoding)
        if missed:
            text, _ = self._joined(pieces, plain=missed)
            encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids

    def _joined(
        self, pieces: Sequence[str], plain: Collection[int] = ()
    ) -> tuple[str, dict[int, tuple[int, int]]]:
        """The text to encode, and where in it each control token is, by its place in the pieces."""
        parts, spans, end = [], {}, 0
        for place, piece in enumerate(pieces):
            part = self._secrets[piece] if place % 2 and place not in plain else piece
            parts.append(part)
            if place % 2:
                spans[place] = (end, end + len(part))
            end += len(part)
        return "".join(parts), spans

    def _missed(
        self,
        pieces: Sequence[str],
        spans: dict[int, tuple[int, int]],
        encoding: tokenizers.Encoding,
    ) -> set[int]:
        """Control tokens that the tokenizer doesn't take for one where they stand.

        Some want no letter beside them, or a space before them; the rest of the time their text is
        text, whoever wrote it.
        """
        special = set(self._ids.values())
        found = (
            (token_id, start, end)
            for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if token_id in special
        )
        missed: set[int] = set()
        token = next(found, None)
        for place, (start, end) in spans.items():
            while token is not None and token[2] <= start:
                token = next(found, None)
            if token is None or token[1] >= end or token[0] != self._ids[pieces[place]]:
                missed.add(place)
        return missed


def _rename_entries(model: dict[str, Any], names: dict[str, str]) -> None:
    """Give entries of the vocabulary other texts, so that no text but the new one becomes them.

    In Unigram an entry such as ``<s>`` has the best score there is, and in BPE it may be what two
    others merge to.
    """
    if model["type"] == "Unigram":
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
        return
    model["vocab"] = {names.get(text, text): rank for text, rank in model["vocab"].items()}
    model["merges"] = [
        [left, right]
        for left, right in model["merges"]
        if not {left, right, left + right} & names.keys()
    ]
    if model["unk_token"] is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
