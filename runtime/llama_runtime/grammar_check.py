"""Whether a grammar can be compiled without taking the process with it.

What a schema unfolds to is bounded by nothing: a chain of references ends the stack, definitions
that each use another one twice double their number, a large divisor makes millions of states. So a
constraint is compiled in a process with limits first, where nothing is lost if it ends.
"""

from __future__ import annotations

import threading

from llama_runtime.limited_process import LimitedProcess, can_start, serve

CPU_SECONDS = 1.0  # the largest schema of the tests takes a hundredth of that
MEMORY_BYTES = 512 * 2**20  # of addresses; 150 are there at first
STACK_BYTES = 2**20  # the threads of this program have more
OVER_LIMIT = f"it needs more than {CPU_SECONDS:g} s or {MEMORY_BYTES // 2**20} MB"


def ends(grammar: str) -> bool:
    """Whether a grammar is compiled within the limits, or refused within them.

    Where there is no interpreter to start, this is believed.

    Args:
        grammar: in the language of ``llguidance``.

    Raises:
        CaravanError: the process can't be started.
    """
    return not can_start() or _compiler.ask(grammar.encode()) is not None


def main() -> None:
    """Compile what comes until standard input ends."""
    import llguidance  # noqa: F401 - so that its import isn't part of the first request

    threading.stack_size(STACK_BYTES)
    serve(_answer, cpu_seconds=CPU_SECONDS, memory_bytes=MEMORY_BYTES)


def _answer(request: bytes) -> bytes:
    thread = threading.Thread(target=_compile, args=(request.decode(),))
    thread.start()
    thread.join()
    return b"it ends"


def _compile(grammar: str) -> None:
    from llguidance import LLMatcher, LLTokenizer

    state = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)  # over bytes, as good as any
    if not state.is_error():
        state.compute_bitmask()


_compiler = LimitedProcess("llama_runtime.grammar_check", "compiles grammars")
