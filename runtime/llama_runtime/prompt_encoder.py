"""The text side of a bundle: prompts and conversations to token ids, without the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from llama_runtime.bundle import Bundle
from llama_runtime.chat_fixture import ChatFixture
from llama_runtime.chat_template import ChatTemplate
from llama_runtime.control_tokens import MarkedConversation
from llama_runtime.conversation import Conversation
from llama_runtime.errors import CapacityError, RequestError
from llama_runtime.tokenizer import Tokenizer
from llama_runtime.tool_use import ToolUse
from llama_runtime.tools import has_place_for_tools, tool_dialect

NORMALIZED = 4  # how many times as long as what it is normalized to a text may be, generously


class PromptEncoder:
    """The tokenizer and chat template of a bundle; safe to share between threads.

    It opens at once, however large the model is, so requests can be measured before the model and
    its cache are made.

    Args:
        bundle: an open bundle.

    Raises:
        BundleError: the tokenizer or the template can't be used, or the template writes other
            prompts than when the bundle was built.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.tokenizer = Tokenizer(bundle.tokenizer_path)
        source = bundle.chat_template
        special_tokens = bundle.manifest.special_tokens
        self._template = None if source is None else ChatTemplate(source, special_tokens)
        fixture = bundle.chat_fixture
        if self._template is not None and fixture is not None:
            ChatFixture.from_json(fixture).check(self._template)
        self._has_place_for_tools = self._template is not None and has_place_for_tools(
            lambda messages, tools: self._required().render(messages, tools=tools)
        )

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
        self._check_length(len(text), max_len, "prompt")
        return self.tokenizer.encode(text)

    def _check_length(self, num_characters: int, max_len: int | None, param: str) -> None:
        longest = self.tokenizer.longest_token
        if max_len is not None and num_characters > NORMALIZED * longest * max_len:
            raise CapacityError(
                f"the {param} of {num_characters:,} characters can't be {max_len} tokens of "
                f"{longest} bytes at most: shorten it or raise max_len",
                param=param,
            )

    def tool_use(self, tools: object = None, tool_choice: object = None) -> ToolUse:
        """What a request says of tools, checked, and how this model is told.

        Args:
            tools: definitions in the form of OpenAI's API, or None.
            tool_choice: "auto", "none", "required" or one tool; None is "auto".

        Raises:
            RequestError: they are wrong.
        """
        source = self.bundle.chat_template
        in_template = source is not None and self._has_place_for_tools
        dialect = tool_dialect(source) if in_template and source is not None else "hermes"
        return ToolUse.of(tools, tool_choice, dialect, in_template=in_template)

    def _required(self) -> ChatTemplate:
        if self._template is None:
            raise RequestError(
                f"{self.bundle.path} has no chat template; give raw prompts", param="messages"
            )
        return self._template

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        use: ToolUse | None = None,
        *,
        add_generation_prompt: bool = True,
        allow_control_tokens: bool = False,
        max_len: int | None = None,
    ) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins.

        Args:
            messages: the turns; see `ChatTemplate.render`.
            use: the tools of the request; None for none.
            add_generation_prompt: whether to open the assistant's next turn.
            allow_control_tokens: whether the text of a control token in messages and tools becomes
                that token, with which whoever wrote it can end a turn or begin another. Otherwise
                only the template's become tokens, and what came in stays text.
            max_len: as for ``encode``; a conversation that can't have as few tokens is a
                ``CapacityError``.

        Raises:
            RequestError: the bundle has no chat template, or it refuses the messages or leaves some
                of them out.
        """
        if not isinstance(allow_control_tokens, bool):  # "no" would be true
            raise RequestError(
                f"allow_control_tokens must be true or false, not {allow_control_tokens!r:.80}",
                param="allow_control_tokens",
            )
        template = self._required()
        conversation = (use or self.tool_use()).conversation(messages)
        texts = (message.get("content") for message in conversation.messages)
        self._check_length(sum(len(t) for t in texts if isinstance(t, str)), max_len, "messages")
        render = partial(template.render_conversation, add_generation_prompt=add_generation_prompt)
        if allow_control_tokens:
            token_ids = self.tokenizer.encode_templated(render(conversation))
        else:
            token_ids = self._encode_apart(conversation, render)
        template.check_complete(conversation, add_generation_prompt=add_generation_prompt)
        return token_ids

    def _encode_apart(
        self, conversation: Conversation, render: Callable[[Conversation], str]
    ) -> list[int]:
        """Token ids of a conversation, control tokens being those that the template wrote."""
        control = self.tokenizer.control_tokens
        control.check_roles(conversation)
        marked = MarkedConversation(conversation, control)
        if not marked.has_marks and not self.tokenizer.has_disguised_tokens:
            return self.tokenizer.encode_templated(render(conversation))
        pieces, opaque = control.split(render(marked.exact)), control.split(render(marked.opaque))
        if pieces[1::2] != opaque[1::2]:
            pieces = opaque
        pieces[::2] = [marked.unmark(text) for text in pieces[::2]]
        return self.tokenizer.encode_pieces(pieces)
