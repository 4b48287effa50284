"""The evaluation texts are whole, large enough for a measurement, and none of the calibration's."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_decoder.gguf_file import GgufWeights
from llama_export.calibration.texts import calibration_texts
from llama_export.gguf_tokenizer import read_gguf_tokenizer
from llama_runtime.evaluation import texts
from llama_runtime.evaluation.texts import KINDS, evaluation_texts, texts_sha256
from llama_runtime.tokenizer import Tokenizer
from tests.real_texts import (
    named_licences,
    noticed,
    odd_characters,
    shared_characters,
    shared_words,
)

FOLDER = Path(texts.__file__).parent
MAX_BYTES = 250_000  # a wheel carries them


def written(monkeypatch: pytest.MonkeyPatch, **changed: bytes) -> str:
    """The hash, were some of the texts others."""
    read = {kind: (FOLDER / "texts" / f"{kind}.txt").read_bytes() for kind in KINDS} | changed
    monkeypatch.setattr(texts, "_bytes", read.__getitem__)
    return texts_sha256()


def test_there_is_one_text_of_each_kind() -> None:
    assert [text.kind for text in evaluation_texts()] == ["prose", "code", "chat", "non_english"]
    assert {path.name for path in (FOLDER / "texts").iterdir()} == {f"{k}.txt" for k in KINDS}


def test_each_kind_has_tokens_enough_for_its_own_numbers(real_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(read_gguf_tokenizer(GgufWeights(real_gguf).metadata).tokenizer_json)
    tokenizer = Tokenizer(path)
    counts = {t.kind: len(tokenizer.encode_templated(t.text)) for t in evaluation_texts()}
    assert min(counts.values()) >= 4_500, counts
    # A vocabulary of 128,000 makes a sixth fewer of the same texts: 20,000 must be left of it.
    assert sum(counts.values()) >= 24_000, counts


def test_a_wheel_stays_small() -> None:
    assert sum(len(text.text.encode()) for text in evaluation_texts()) < MAX_BYTES


@pytest.mark.parametrize("text", evaluation_texts(), ids=KINDS)
def test_a_text_is_plain_and_ends_with_a_line(text: texts.EvaluationText) -> None:
    assert odd_characters(text.text) == set()
    assert text.text == text.text.strip("\n") + "\n"
    assert "gutenberg" not in text.text.lower()


def test_non_english_is_of_several_languages() -> None:
    (text,) = [text.text for text in evaluation_texts() if text.kind == "non_english"]
    for passage in ("toutes les nations", "Toda persona", "Eltern", "吾輩は"):
        assert passage in text


def test_nothing_is_shared_with_the_calibration_texts() -> None:
    ours, theirs = [text.text for text in evaluation_texts()], calibration_texts()
    assert shared_words(ours, theirs, 8) == set()
    assert shared_characters(ours, theirs, 60) == set()


def test_a_shared_passage_would_be_found() -> None:
    ours = [text.text for text in evaluation_texts()]
    passage = " ".join(ours[0].split()[100:112])
    assert len(passage) >= 60
    assert shared_words(ours, [passage.replace(" ", "\n")], 8)
    assert shared_characters(ours, [passage.replace(" ", "\n")], 60)


def test_the_hash_notices_every_change(monkeypatch: pytest.MonkeyPatch) -> None:
    prose, code = (FOLDER / "texts" / f"{kind}.txt" for kind in ("prose", "code"))
    whole = prose.read_bytes()
    same = texts_sha256()
    assert written(monkeypatch) == same
    others = [
        written(monkeypatch, prose=whole[:-1]),
        written(monkeypatch, prose=whole.replace(b"whale", b"Whale", 1)),
        written(monkeypatch, prose=code.read_bytes(), code=whole),
        written(monkeypatch, prose=whole[:-9], code=whole[-9:] + code.read_bytes()),
    ]
    assert len({same, *others}) == 5


def test_notice_speaks_of_each_text_and_its_licences_are_there() -> None:
    notices = noticed("runtime/llama_runtime/evaluation/texts")
    assert list(notices) == [f"{kind}.txt" for kind in KINDS]
    own = {f"evaluation/licences/{path.name}" for path in (FOLDER / "licences").iterdir()}
    assert named_licences(notices.values()) == own
