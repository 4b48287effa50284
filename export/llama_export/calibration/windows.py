"""The calibration text as a model reads it: windows of its own tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llama_export.calibration.texts import calibration_texts

WINDOW = 512  # tokens
OF_EACH = 4  # windows of each kind of text, which lie evenly over it


def calibration_windows(tokenizer_json: bytes, max_positions: int) -> NDArray[np.int64]:
    """Token ids [W, S] of the texts, each window begun as the tokenizer begins a text.

    Args:
        tokenizer_json: the model's tokenizer.
        max_positions: the model's longest sequence.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    size = min(WINDOW, max_positions)
    windows = []
    for text in calibration_texts():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        prompt = tokenizer.encode(text).ids  # which may begin with BOS
        added = len(prompt) - len(ids)
        first = next(prompt[:n] for n in range(added + 1) if prompt[n : n + len(ids)] == ids)
        step = max(1, size - len(first))
        whole = range(0, len(ids) - step + 1, step)
        count = min(len(whole), OF_EACH * WINDOW // size)
        starts = [whole[i * len(whole) // count] for i in range(count)]
        windows += [first + ids[start : start + step] for start in starts]
    return np.array(windows, np.int64).reshape(-1, size)
