"""A whole chat: look at what was given, load the model, talk."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_runtime.async_llm import AsyncLLM
from llama_runtime.async_stream import AsyncStream
from llama_runtime.bundle import open_bundle
from llama_runtime.chat import saved
from llama_runtime.chat.conversation import Conversation
from llama_runtime.chat.readers import LineReader, PromptReader, Reader
from llama_runtime.chat.screen import Screen
from llama_runtime.chat.session import Session
from llama_runtime.chat.slash import State
from llama_runtime.chat.terminal import restored
from llama_runtime.errors import RequestError, one_line
from llama_runtime.generation_config import default_params
from llama_runtime.params import SamplingParams
from llama_runtime.progress import Console
from llama_runtime.prompt_encoder import PromptEncoder
from llama_runtime.shared_engine import Stats

MAX_TOKENS = 1024  # of an answer: somebody reads along, and can stop it


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the user asked of a chat.

    Attributes:
        bundle: the bundle's directory.
        options: sampling options that replace the bundle's own and those of a loaded file.
        system: what the model is told first; None takes that of the file, if there is one.
        load: a saved conversation to go on with.
        max_len: the most tokens of the conversation; None takes the default of ``LLM``.
        threads: None takes the processors this process may use.
        devices: CUDA devices; None takes the default of ``LLM``.
        prefix_tokens: tokens of prompts that are kept; None takes the default of ``LLM``.
        quiet: whether nothing is said that nobody asked for.
    """

    bundle: Path
    options: Mapping[str, Any]
    system: str | None = None
    load: Path | None = None
    max_len: int | None = None
    threads: int | None = None
    devices: Seq[int] | None = None
    prefix_tokens: int | None = None
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """An ``AsyncLLM`` as a chat uses it: Ctrl-C needn't wait for the end of a long prompt."""

    llm: AsyncLLM
    encoder: PromptEncoder

    @property
    def max_len(self) -> int:
        """See ``Model.max_len``."""
        return self.llm.max_len

    def chat_prompt(self, messages: Seq[Mapping[str, object]]) -> list[int]:
        """See ``Model.chat_prompt``."""
        return self.encoder.encode_chat(messages)

    def stream(self, prompt: list[int], params: SamplingParams) -> AsyncStream:
        """See ``Model.stream``."""
        return self.llm.stream(prompt, params)

    def stats(self) -> Stats:
        """See ``Model.stats``."""
        return self.llm.stats()


def run(settings: Settings) -> int:
    """Chat.

    Args:
        settings: what the user asked for.

    Returns:
        The exit status.

    Raises:
        CaravanError: the chat can't start; or something went wrong in a pipe.
    """
    encoder = PromptEncoder(open_bundle(settings.bundle))
    if not encoder.has_chat_template:
        raise RequestError(
            f"{settings.bundle} has no chat template, so there is no chat with it: llama-run "
            "generate continues raw prompts",
            param="bundle",
        )
    conversation = _conversation(encoder, settings)
    return asyncio.run(_chat(encoder, conversation, settings))


def _conversation(encoder: PromptEncoder, settings: Settings) -> Conversation:
    """What the chat begins with; options go before the file, and that before the bundle."""
    config = encoder.bundle.generation_config
    conversation = Conversation(replace(default_params(config), max_tokens=MAX_TOKENS))
    if settings.load is not None:
        conversation = saved.load(settings.load, conversation.params)
    conversation.params = replace(conversation.params, **settings.options)
    if conversation.params.n != 1:
        raise RequestError("-n must be 1: a chat has one answer at a time", param="n")
    if conversation.params.logprobs or conversation.params.prompt_logprobs:
        raise RequestError(
            "a chat shows no log-probabilities: llama-run generate --json does", param="logprobs"
        )
    if settings.system is not None:
        conversation.system = settings.system or None
    return conversation


async def _chat(encoder: PromptEncoder, conversation: Conversation, settings: Settings) -> int:
    console = Console(sys.stderr, quiet=settings.quiet, with_status=sys.stderr.isatty())
    with console.status(lambda: ["loading the model"]):
        llm = await AsyncLLM.load(
            encoder,
            max_batch=1,
            max_len=settings.max_len,
            threads=settings.threads,
            devices=settings.devices,
            prefix_tokens=settings.prefix_tokens,
        )
    async with llm:
        screen = Screen(sys.stdout, sys.stderr, quiet=settings.quiet)
        session = Session(
            State(LoadedModel(llm, encoder), conversation), reader := _reader(), screen
        )
        with ExitStack() as stack:
            if reader.interactive:
                stack.enter_context(restored())
                screen.remark(_greeting(encoder, conversation, llm))
            return await session.run()


def _reader() -> Reader:
    """A line editor where there is a terminal that can show one."""
    if not sys.stdin.isatty() or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return LineReader(sys.stdin.buffer, interactive=sys.stdin.isatty())
    return PromptReader()


def _greeting(encoder: PromptEncoder, conversation: Conversation, llm: AsyncLLM) -> str:
    name = one_line(encoder.bundle.manifest.name, 60)
    count = len(conversation.messages)
    loaded = f", {count} messages loaded" if count else ""
    return f"{name}, context {llm.max_len}{loaded}\n/help shows the commands, Ctrl-D ends\n"
