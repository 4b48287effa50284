"""Whether a grammar can be compiled without taking the process with it.

What a schema unfolds to is bounded by nothing: a chain of references ends the stack, definitions
that each use another one twice double their number, a large divisor makes millions of states. So a
constraint is compiled in a process with limits first, where nothing is lost if it ends.

It is compiled over single bytes there, which is as much work for all but the vocabulary itself, and
with the control tokens of the model, so that a grammar which names one isn't refused before it has
shown what it is.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from llama_runtime.limited_process import LimitedProcess, can_start, serve

if TYPE_CHECKING:
    import llguidance

CPU_SECONDS = 1.0  # the largest schema of the tests takes a hundredth of that
MEMORY_BYTES = 512 * 2**20  # of addresses; 150 are there at first
STACK_BYTES = 2**20  # the threads of this program have more
OVER_LIMIT = (
    f"it needs more than {CPU_SECONDS:g} s, {MEMORY_BYTES // 2**20} MB or "
    f"{STACK_BYTES // 2**20} MB of stack to be compiled"
)


def problem_with(grammar: str, vocab_size: int, control_tokens: Mapping[int, str]) -> str | None:
    """Why a grammar can't be compiled; None if it can, within the limits.

    Where there is no interpreter to start, that is believed.

    Args:
        grammar: in the language of ``llguidance``.
        vocab_size: V.
        control_tokens: the name of each by its id.

    Raises:
        CaravanError: the process can't be started.
    """
    if not can_start():
        return None
    asked = {"grammar": grammar, "size": vocab_size, "control_tokens": control_tokens}
    reply = _compiler.ask(json.dumps(asked).encode())
    return OVER_LIMIT if reply is None else json.loads(reply)["problem"] or None


def main() -> None:
    """Compile what comes until standard input ends."""
    import llguidance  # noqa: F401 - so that its import isn't part of the first request

    threading.stack_size(STACK_BYTES)
    serve(_answer, cpu_seconds=CPU_SECONDS, memory_bytes=MEMORY_BYTES)


def _answer(request: bytes) -> bytes:
    asked = json.loads(request)
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(_compiled(asked)))
    thread.start()
    thread.join()
    return json.dumps({"problem": found[0]}).encode()


def _compiled(asked: Mapping[str, object]) -> str:
    """The compiler's error; empty if there is none."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False)  # else errors carry the grammar
    state = LLMatcher(_tokenizer(asked), str(asked["grammar"]), log_level=0, limits=limits)
    if not state.is_error():
        state.compute_bitmask()
    return str(state.get_error())


def _tokenizer(asked: Mapping[str, object]) -> llguidance.LLTokenizer:
    """A tokenizer of bytes and control tokens, kept for the next request of the same model."""
    import llguidance

    size, names = asked["size"], asked["control_tokens"]
    if not isinstance(size, int) or not isinstance(names, dict):
        raise TypeError(f"a vocabulary of {size!r:.80}")
    key = json.dumps([size, names])
    if key not in _tokenizers:
        _tokenizers.clear()
        _tokenizers[key] = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Bytes(size, {int(i): name for i, name in names.items()}))
        )
    return _tokenizers[key]


class _Bytes:
    """What ``llguidance.TokenizerWrapper`` asks of a tokenizer."""

    bos_token_id: int | None = None

    def __init__(self, size: int, control_tokens: Mapping[int, str]) -> None:
        self.special_token_ids = sorted(control_tokens)
        self.eos_token_id = self.special_token_ids[0] if control_tokens else size + 256
        free = [i for i in range(size + 257) if i not in control_tokens]
        self._ids = free[:256]
        self.tokens = [control_tokens.get(i, "").encode() for i in range(size + 257)]
        for byte, token_id in enumerate(self._ids):
            self.tokens[token_id] = bytes([byte])

    def __call__(self, text: bytes) -> list[int]:
        return [self._ids[byte] for byte in text]


_tokenizers: dict[str, llguidance.LLTokenizer] = {}
_compiler = LimitedProcess("llama_runtime.grammar_check", "compiles grammars")
