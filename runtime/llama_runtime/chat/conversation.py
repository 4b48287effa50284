"""A conversation: what was said, and how the next answer is made."""

from __future__ import annotations

from dataclasses import dataclass, field

from llama_runtime.errors import RequestError
from llama_runtime.params import SamplingParams

Message = dict[str, str]


@dataclass(slots=True)
class Conversation:
    """What was said so far; the model sees all of it with every message.

    Attributes:
        params: how the next answer is made.
        system: what the model is told first; None leaves it to the chat template.
        messages: those of the user and the assistant, in order.
    """

    params: SamplingParams
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def with_system(self, messages: list[Message]) -> list[Message]:
        """Messages as the chat template takes them."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *messages]

    def before_last_answer(self) -> list[Message]:
        """The messages up to the last one of the user.

        Raises:
            RequestError: there is none.
        """
        return self.messages[: self._last_question() + 1]

    def undo(self) -> None:
        """Take back the last message of the user, and its answer.

        Raises:
            RequestError: there is none.
        """
        del self.messages[self._last_question() :]

    def _last_question(self) -> int:
        for index in reversed(range(len(self.messages))):
            if self.messages[index]["role"] == "user":
                return index
        raise RequestError("nothing has been asked yet", param="messages")
