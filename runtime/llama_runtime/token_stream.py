"""The completions of one request as they grow."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from types import TracebackType

from llama_runtime.events import TokenEvent
from llama_runtime.sequence import Sequence, TokenLogprob
from llama_runtime.shared_engine import Inbox, SharedEngine


class TokenStream:
    """Iterates over the events of one request, an event a token.

    With ``n`` above 1 those of all samples come as they are made; an event says whose it is.
    Closing it, leaving its ``with``, or dropping it unread ends the request and frees its slots.

    Args:
        engine: runs the request.
        seqs: its sequences, just added.
        inbox: where their events go.
    """

    def __init__(self, engine: SharedEngine, seqs: Seq[Sequence], inbox: Inbox) -> None:
        self._engine = engine
        self._seqs = seqs
        self._inbox = inbox
        self._running = len(seqs)

    @property
    def seed(self) -> int:
        """The random stream in use: the same request with this seed gives the same text."""
        return self._seqs[0].seed

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return self._seqs[0].num_prompt_tokens

    @property
    def prompt_logprobs(self) -> list[TokenLogprob | None]:
        """Those of the prompt's tokens, once the first event is there; if they are asked for."""
        return self._seqs[0].prompt_logprobs

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> TokenEvent:
        if not self._running:
            raise StopIteration
        try:
            self._engine.wait(self._inbox)
        except BaseException:
            self.close()
            raise
        if not self._inbox:  # another thread has closed this meanwhile
            raise StopIteration
        event = self._inbox.popleft()
        self._running -= event.finish_reason is not None
        if event.error is not None:
            self.close()
            raise event.error
        return event

    def close(self) -> None:
        """End what hasn't ended; a second call does nothing."""
        self._running = 0
        for seq in self._seqs:
            self._engine.drop(seq)

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
