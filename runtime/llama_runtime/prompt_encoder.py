"""The text side of a bundle: prompts and conversations to token ids, without the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llama_runtime.bundle import Bundle
from llama_runtime.chat_template import ChatTemplate
from llama_runtime.errors import CapacityError, RequestError
from llama_runtime.tokenizer import Tokenizer

NORMALIZED = 4  # how many times as long as what it is normalized to a text may be, generously


class PromptEncoder:
    """The tokenizer and chat template of a bundle; safe to share between threads.

    It opens at once, however large the model is, so requests can be measured before the model and
    its cache are made.

    Args:
        bundle: an open bundle.

    Raises:
        BundleError: the tokenizer or the template can't be used.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.tokenizer = Tokenizer(bundle.tokenizer_path)
        source = bundle.chat_template
        special_tokens = bundle.manifest.special_tokens
        self._template = None if source is None else ChatTemplate(source, special_tokens)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be encoded."""
        return self._template is not None

    def encode(self, text: str, *, max_len: int | None = None) -> list[int]:
        """Token ids of a raw prompt.

        Args:
            text: the prompt.
            max_len: the most tokens it may become; a text that is far too long for that is refused
                at once, since tokenizing megabytes takes seconds.

        Raises:
            RequestError: the text can't be written as UTF-8.
            CapacityError: it can't have as few tokens as ``max_len``.
        """
        if max_len is not None and len(text) > NORMALIZED * self.tokenizer.longest_token * max_len:
            raise CapacityError(
                f"the prompt has {len(text):,} characters, which can't be {max_len} tokens of "
                f"{self.tokenizer.longest_token} bytes at most: shorten it or raise max_len",
                param="prompt",
            )
        return self.tokenizer.encode(text)

    def encode_chat(self, messages: Sequence[Mapping[str, object]]) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins.

        Raises:
            RequestError: the bundle has no chat template, or it refuses the messages.
        """
        if self._template is None:
            raise RequestError(
                f"{self.bundle.path} has no chat template; give raw prompts", param="messages"
            )
        return self.tokenizer.encode_templated(self._template.render(messages))
