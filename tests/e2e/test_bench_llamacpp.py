"""llama.cpp's worker batches as it says, over a fake of the C API."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.peers import llamacpp
from scripts.peers.protocol import Options


@dataclass
class FakeLlama:
    """llama.cpp's API over a model whose next token follows from all that came before."""

    cache: dict[int, list[int]] = field(default_factory=dict)
    steps: list[set[int]] = field(default_factory=list)
    found: dict[int, int] = field(default_factory=dict)

    vocab_size = 97

    def next(self, tokens: list[int]) -> int:
        return sum((i + 1) * token for i, token in enumerate(tokens)) % self.vocab_size

    def llama_batch_init(self, size: int, *_: int) -> SimpleNamespace:
        names = ("token", "pos", "n_seq_id", "logits")
        lists = {name: [0] * size for name in names}
        return SimpleNamespace(n_tokens=0, seq_id=[[0] for _ in range(size)], **lists)

    def llama_decode(self, _: object, batch: SimpleNamespace) -> int:
        self.found.clear()
        used = range(batch.n_tokens)
        self.steps.append({batch.seq_id[i][0] for i in used})
        for i in used:
            known = self.cache.setdefault(batch.seq_id[i][0], [])
            assert batch.pos[i] == len(known)
            known.append(batch.token[i])
            if batch.logits[i]:
                self.found[i] = self.next(known)
        return 0 if used else 1

    def llama_get_logits_ith(self, _: object, place: int) -> Any:
        row = (ctypes.c_float * self.vocab_size)()
        row[self.found[place]] = 1.0
        return ctypes.cast(row, ctypes.POINTER(ctypes.c_float))

    def llama_memory_seq_rm(self, _: object, slot: int, *_range: int) -> None:
        self.cache.pop(slot)

    def llama_memory_clear(self, *_: object) -> None:
        self.cache.clear()

    def llama_vocab_n_tokens(self, _: object) -> int:
        return self.vocab_size

    def llama_context_default_params(self) -> SimpleNamespace:
        return SimpleNamespace()

    def __getattr__(self, name: str) -> Callable[..., object]:
        if not name.startswith("llama_"):
            raise AttributeError(name)
        return lambda *_: object()


def test_llama_cpp_rows_get_in_batches_what_they_get_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeLlama()
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    model = llamacpp.Model(Options(Path("any"), threads=1, slots=4, max_len=900))
    rows = [
        llamacpp.Row([(i * j) % 89 + 1 for j in range(length)], wanted)
        for i, (length, wanted) in enumerate([(3, 5), (700, 2), (1, 40), (9, 1), (300, 7), (5, 5)])
    ]
    model.run(rows)
    for row in rows:
        whole = list(row.tokens)
        for _ in range(row.wanted):
            whole.append(fake.next(whole))
        assert row.made == whole[len(row.tokens) :]
    assert max(map(len, fake.steps)) == 4  # as many at once as there are slots
    assert len(fake.steps) < 50  # and they ran together: one by one they'd take 61


def test_llama_cpp_s_logits_are_of_each_token_from_an_empty_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeLlama()
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    model = llamacpp.Model(Options(Path("any"), threads=1, slots=4, max_len=900))
    for length in (3, 700, 1):  # 700 take two steps
        tokens = [i % 89 + 1 for i in range(length)]
        found = model.logits(tokens)
        assert found.shape == (length, fake.vocab_size)
        wanted = [fake.next(tokens[: i + 1]) for i in range(length)]
        assert found.argmax(axis=1).tolist() == wanted
