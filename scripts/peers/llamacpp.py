"""llama.cpp as a worker: its C API through llama-cpp-python, with continuous batching around it.

    python -m scripts.peers.llamacpp MODEL.gguf --threads N --slots N --max-len N

The package's own ``Llama`` runs one sequence at a time, so batches are made here as llama.cpp's
server makes them: every step holds a token of each running sequence, then as much of waiting
prompts as a batch has room for. The likeliest token is found by numpy, which is faster than the
library's greedy sampler.
"""

from __future__ import annotations

import ctypes
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from scripts.peers.protocol import Loaded, Options, Output, serve

BATCH = 512  # tokens of a step, llama.cpp's own n_ubatch
# One cache for all sequences: one for each seemed slower with 32 of them, on a busy machine.
UNIFIED = True


@dataclass
class Row:
    """A request: what of it is in the cache, and what came out."""

    tokens: list[int]
    wanted: int
    slot: int = -1
    done: int = 0
    made: list[int] = field(default_factory=list)


class Model:
    """A model with a context of so many sequences."""

    def __init__(self, options: Options) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self.slots = options.slots
        api = self.api
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(
            str(options.model).encode(), api.llama_model_default_params()
        )
        if not self._model:
            raise ValueError(f"llama.cpp can't load {options.model}")
        self._vocab = api.llama_model_get_vocab(self._model)
        self._vocab_size = api.llama_vocab_n_tokens(self._vocab)
        params = api.llama_context_default_params()
        params.n_ctx = options.slots * (-(-options.max_len // 256) * 256)
        params.n_seq_max = options.slots
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = options.threads
        params.kv_unified = UNIFIED
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError("llama.cpp can't make a context of that size")
        self._memory = api.llama_get_memory(self._context)
        self._batch = api.llama_batch_init(BATCH, 0, 1)

    def tokenize(self, text: str) -> list[int]:
        """A prompt's tokens, with what the model puts before every prompt."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 2))()
        count = self.api.llama_tokenize(self._vocab, data, len(data), ids, len(ids), True, True)
        return list(ids[:count])

    def detokenize(self, tokens: list[int]) -> str:
        """A completion's text."""
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        size = 32 * len(tokens) + 64
        data = ctypes.create_string_buffer(size)
        count = self.api.llama_detokenize(self._vocab, ids, len(tokens), data, size, False, True)
        return data.raw[:count].decode(errors="replace")

    def run(self, rows: list[Row]) -> None:
        """Answer all of them, ``slots`` at a time."""
        self.api.llama_memory_clear(self._memory, False)
        waiting, free = deque(rows), list(range(self.slots))
        running: list[Row] = []
        while waiting or running:
            while waiting and free:
                running.append(waiting.popleft())
                running[-1].slot = free.pop()
            ends = self._fill(running)
            self._decode()
            for row, place in ends:
                row.made.append(self._likeliest(place))
                if len(row.made) == row.wanted:
                    running.remove(row)
                    free.append(row.slot)
                    self.api.llama_memory_seq_rm(self._memory, row.slot, -1, -1)

    def logits(self, tokens: list[int]) -> Any:
        """What is predicted after each of some tokens, float32 [T, V], in the same steps."""
        import numpy as np

        self.api.llama_memory_clear(self._memory, False)
        parts = []
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            for place, token in enumerate(part):
                self._put(place, token, start + place, 0, wanted=True)
            self._batch.n_tokens = len(part)
            self._decode()
            parts.append(np.stack([self._row(place) for place in range(len(part))]))
        return np.concatenate(parts)

    def _fill(self, running: list[Row]) -> list[tuple[Row, int]]:
        """The next batch: rows whose next token it finds, with their places in it."""
        count, ends = 0, []
        # Those that decode come first: none waits for another's prompt.
        for row in sorted(running, key=lambda row: not row.made):
            whole = row.tokens + row.made
            part = whole[row.done : row.done + BATCH - count]
            for token in part:
                last = row.done + 1 == len(whole)
                self._put(count, token, row.done, row.slot, wanted=last)
                row.done += 1
                count += 1
            if part and row.done == len(whole):
                ends.append((row, count - 1))
        self._batch.n_tokens = count
        return ends

    def _put(self, place: int, token: int, position: int, slot: int, *, wanted: bool) -> None:
        """A token into the next batch; ``wanted`` is what it predicts."""
        batch = self._batch
        batch.token[place] = token
        batch.pos[place] = position
        batch.n_seq_id[place] = 1
        batch.seq_id[place][0] = slot
        batch.logits[place] = wanted

    def _decode(self) -> None:
        if status := self.api.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode failed with {status}")

    def _row(self, place: int) -> Any:
        import numpy as np

        logits = self.api.llama_get_logits_ith(self._context, place)
        return np.ctypeslib.as_array(logits, (self._vocab_size,))

    def _likeliest(self, place: int) -> int:
        return int(self._row(place).argmax())


def load(options: Options) -> Loaded:
    """Load the file; what llama.cpp found of the processor goes into the report."""
    model = Model(options)

    def generate(prompts: list[str], max_new_tokens: list[int]) -> Output:
        rows = [
            Row(model.tokenize(prompt), wanted)
            for prompt, wanted in zip(prompts, max_new_tokens, strict=True)
        ]
        model.run(rows)
        texts = [model.detokenize(row.made) for row in rows]
        return Output(texts, sum(len(row.made) for row in rows))

    def count(text: str) -> int:
        return len(model.tokenize(text))

    system = model.api.llama_print_system_info().decode()
    settings = {"batch": BATCH, "kv_unified": UNIFIED, "system": system}
    return Loaded(generate, count, model.logits, settings)


if __name__ == "__main__":
    serve(load)
