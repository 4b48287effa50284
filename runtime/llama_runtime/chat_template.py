"""Turn a conversation into a prompt with the model's own chat template.

Chat templates are Jinja, written by whoever made the model: programs of somebody else. They are
rendered by ``template_renderer`` in a process of their own, where they see copies of the messages
and have limits of time and memory. What they need beyond those is one error of the request, and the
next request finds a new process.

One difference from ``transformers``, the reference, is known: ``trim`` and ``strip`` leave U+001C
to U+001F alone, which Python counts as white space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from llama_runtime.conversation import Conversation, read_conversation
from llama_runtime.errors import BundleError, RequestError, one_line
from llama_runtime.left_out import Probes
from llama_runtime.template_process import ask
from llama_runtime.template_renderer import CPU_SECONDS, FUEL, MEMORY_BYTES

MAX_SOURCE_CHARACTERS = 2**18  # the longest that are published have a tenth
_OVER_LIMIT = f"more than {CPU_SECONDS:g} s or {MEMORY_BYTES // 2**20} MB"


class ChatTemplate:
    """A compiled chat template; safe to share between threads.

    Args:
        source: the Jinja source.
        special_tokens: text of the special tokens by the name the template has for them,
            such as ``bos_token``.

    Raises:
        BundleError: if the source doesn't compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise BundleError(
                f"the chat template has {len(source):,} characters and may have "
                f"{MAX_SOURCE_CHARACTERS:,} at most"
            )
        self._source = source
        self._special_tokens: dict[str, object] = dict(special_tokens)
        answer = ask(source, None)
        if answer is None:
            raise BundleError(f"the chat template doesn't compile: it needs {_OVER_LIMIT}")
        if "error" in answer:
            raise BundleError(f"the chat template doesn't compile: {one_line(answer['error'])}")

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> str:
        """Write a conversation as a prompt.

        Args:
            messages: the turns; each has a ``role``, a ``content``, and whatever else the template
                reads. A content is a text or a list of text parts; beside ``tool_calls`` it may be
                missing.
            add_generation_prompt: whether to open the assistant's next turn.
            tools: JSON schemas of the tools the model may call; None for none.

        Returns:
            The prompt, special tokens written out: for `Tokenizer.encode_templated`.

        Raises:
            RequestError: if the messages aren't well formed, or the template refuses them or
                leaves some of them out.
        """
        conversation = read_conversation(messages, tools)
        text = self.render_conversation(conversation, add_generation_prompt=add_generation_prompt)
        self.check_complete(conversation, add_generation_prompt=add_generation_prompt)
        return text

    def render_conversation(
        self,
        conversation: Conversation,
        *,
        add_generation_prompt: bool,
        now: datetime | None = None,
    ) -> str:
        """Write what has been read, even if the template leaves some of it out.

        Args:
            conversation: see ``read_conversation``.
            add_generation_prompt: whether to open the assistant's next turn.
            now: the time a template that asks for it gets; None for that of the clock.

        Raises:
            RequestError: the template refuses it, or costs too much.
        """
        variables = self._special_tokens | {
            "messages": conversation.messages,
            "tools": conversation.tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        answer = ask(self._source, variables, now)
        if answer is None:
            problem = f"the chat template needs {_OVER_LIMIT}: shorten the messages"
        elif "text" in answer:
            return answer["text"]
        elif answer["kind"] == "refused":
            problem = f"the chat template refuses these messages: {one_line(answer['error'])}"
        elif answer["kind"] == "fuel":
            problem = f"the chat template needs more than {FUEL} steps: shorten the messages"
        else:
            problem = f"the chat template can't render these messages: {one_line(answer['error'])}"
        raise RequestError(problem, param="messages")

    def check_complete(self, conversation: Conversation, *, add_generation_prompt: bool) -> None:
        """Refuse a conversation of which the template would leave something out.

        Raises:
            RequestError: names the message or tool.
        """
        probes = Probes(conversation)
        if probes.conversation is None:
            return
        text = self.render_conversation(
            probes.conversation, add_generation_prompt=add_generation_prompt
        )
        missing = probes.missing_from(text)
        if missing is not None:
            what, param = missing
            raise RequestError(f"{what}, which the chat template leaves out", param=param)
