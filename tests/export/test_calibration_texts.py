"""The calibration texts are whole, of every kind, and as many tokens as the rounding reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llama_decoder.gguf_file import GgufWeights
from llama_export.calibration import texts
from llama_export.calibration.texts import KINDS, calibration_texts
from llama_export.calibration.windows import OF_EACH, WINDOW, calibration_windows
from llama_export.gguf_tokenizer import read_gguf_tokenizer
from tests.real_texts import NOTICE, named_licences, noticed, odd_characters

FOLDER = Path(texts.__file__).parent
MAX_BYTES = 150_000  # a wheel carries them


def test_there_is_one_text_of_each_kind() -> None:
    files = {path.stem: path.read_bytes().decode() for path in (FOLDER / "texts").iterdir()}
    assert set(files) == {"prose", "code", "chat", "non_english"}
    assert calibration_texts() == tuple(files[kind] for kind in KINDS)


def test_the_real_model_reads_as_much_of_each_kind(real_gguf: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer_json = read_gguf_tokenizer(GgufWeights(real_gguf).metadata).tokenizer_json
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    for max_positions in (8192, 128):
        size = min(WINDOW, max_positions)
        windows = calibration_windows(tokenizer_json, max_positions)
        count = OF_EACH * WINDOW // size
        assert windows.shape == (len(KINDS) * count, size)
        for kind, start in zip(KINDS, range(0, len(windows), count), strict=True):
            text = calibration_texts()[KINDS.index(kind)]
            places = []
            for window in windows[start : start + count]:
                # A window may end within the bytes of a character.
                part = tokenizer.decode(window.tolist()).strip("\ufffd")
                assert part in text, kind
                places.append(text.index(part) / len(text))
            assert places == sorted(places)
            assert places[0] == 0
            assert places[-1] > 0.6


def test_a_wheel_stays_small() -> None:
    assert sum(len(text.encode()) for text in calibration_texts()) < MAX_BYTES


@pytest.mark.parametrize("text", calibration_texts(), ids=KINDS)
def test_a_text_is_plain_and_ends_with_a_line(text: str) -> None:
    assert odd_characters(text) == set()
    assert text == text.strip("\n") + "\n"
    assert "gutenberg" not in text.lower()


def test_notice_speaks_of_each_text_and_its_licences_are_there() -> None:
    notices = noticed("export/llama_export/calibration/texts")
    assert list(notices) == [f"{kind}.txt" for kind in KINDS]
    own = {f"calibration/licences/{path.name}" for path in (FOLDER / "licences").iterdir()}
    # Python's is beside the evaluation texts: one wheel carries both.
    assert named_licences(notices.values()) == own | {"evaluation/licences/python.txt"}
    root = NOTICE.parent
    assert (root / "runtime/llama_runtime/evaluation/licences/python.txt").is_file()


def test_what_a_tokenizer_cuts_off_and_fills_up_is_not_obeyed(real_gguf: Path) -> None:
    from tokenizers import Tokenizer

    plain = read_gguf_tokenizer(GgufWeights(real_gguf).metadata).tokenizer_json
    tokenizer = Tokenizer.from_str(plain.decode())
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding(length=200_000)
    changed = calibration_windows(tokenizer.to_str().encode(), 8192)
    assert np.array_equal(changed, calibration_windows(plain, 8192))
