"""Compile one hostile schema and draw from it; a program, since some may end their process.

usage: python -m tests.structured.compile_hostile TOKENIZER NAME

Writes a line of JSON: what became of it, the seconds of compiling and of the slowest token.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from llama_runtime.errors import RequestError
from llama_runtime.grammar_masks import MaskFiller, Masks, mask_words
from llama_runtime.grammars import GrammarCompiler
from llama_runtime.params import SamplingParams
from tests.structured.hostile import HOSTILE

VOCAB_SIZE, EOS = 49_152, 2
NUM_TOKENS = 60


def main(tokenizer: str, name: str) -> None:
    """Compile, draw, and say what was found."""
    compiler = GrammarCompiler(Path(tokenizer), VOCAB_SIZE, [EOS])
    compiler.prepare(SamplingParams(json_schema=True).constraint)  # reads the vocabulary
    text = HOSTILE[name]()
    started, slowest = time.monotonic(), 0.0
    compiled_s = None
    try:
        constraint = SamplingParams(json_schema=text).constraint
        assert constraint is not None
        matcher = compiler.matcher(constraint)
        compiled_s = time.monotonic() - started
        rng, filler = np.random.default_rng(0), MaskFiller(threads=1)
        masks: Masks = np.zeros((1, mask_words(VOCAB_SIZE)), np.int32)
        for _ in range(NUM_TOKENS):
            before = time.monotonic()
            filler.fill([(0, matcher, ())], masks)
            bits = np.unpackbits(masks[0].view(np.uint8), bitorder="little", count=VOCAB_SIZE)
            bits[EOS] = 0
            if not bits.any():
                matcher.end()
                break
            matcher.accept(int(rng.choice(np.flatnonzero(bits))))
            slowest = max(slowest, time.monotonic() - before)
        outcome = "taken"
    except RequestError as error:
        outcome = f"{'refused' if compiled_s is None else 'ended'}: {error}"
    compiled_s = time.monotonic() - started if compiled_s is None else compiled_s
    found = {"outcome": outcome[:300], "compile_s": compiled_s, "token_s": slowest}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
