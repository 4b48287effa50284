"""One completion as it grows."""

from __future__ import annotations

from types import TracebackType

from llama_runtime.engine import TokenEvent
from llama_runtime.sequence import Sequence
from llama_runtime.shared_engine import Inbox, SharedEngine


class TokenStream:
    """Iterates over the events of one sequence, an event a token.

    Closing it, leaving its ``with``, or dropping it unread ends the sequence and frees its slot.

    Args:
        engine: runs the sequence.
        seq: just added.
        inbox: where its events go.
    """

    def __init__(self, engine: SharedEngine, seq: Sequence, inbox: Inbox) -> None:
        self._engine = engine
        self._seq = seq
        self._inbox = inbox
        self._ended = False

    @property
    def seed(self) -> int:
        """The random stream in use: the same request with this seed gives the same text."""
        return self._seq.seed

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return self._seq.num_prompt_tokens

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> TokenEvent:
        if self._ended:
            raise StopIteration
        try:
            self._engine.wait(self._inbox)
        except BaseException:
            self.close()
            raise
        event = self._inbox.popleft()
        self._ended = event.finish_reason is not None
        if event.error is not None:
            raise event.error
        return event

    def close(self) -> None:
        """End the sequence if it hasn't ended; a second call does nothing."""
        self._ended = True
        self._engine.drop(self._seq)

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
