"""The facade for asyncio: a bundle, and prompts in, completions out, while the loop goes on.

    async with await AsyncLLM.load("bundle") as llm:
        async for event in llm.stream("Gravity is"):
            print(event.text, end="")

An ``AsyncLLM`` may be used from the event loops of several threads: calls that overlap share the
batch. The model runs in a thread of its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from functools import partial
from types import TracebackType
from typing import Literal

from llama_runtime.arguments import (
    Message,
    as_conversations,
    as_list,
    is_list,
    params_of_each,
    wrong_type,
)
from llama_runtime.async_calls import Call, Item, settled
from llama_runtime.async_request import AsyncRequest, Deadline, Source
from llama_runtime.async_stream import AsyncStream
from llama_runtime.completion import Completion, Prompt
from llama_runtime.loading import load
from llama_runtime.params import SamplingParams
from llama_runtime.prompt_encoder import PromptEncoder
from llama_runtime.settings import Settings, in_range
from llama_runtime.shared_engine import Stats
from llama_runtime.tool_use import ToolUse
from llama_runtime.worker import Worker

logger = logging.getLogger(__name__)

MAX_QUEUED_REQUESTS = 1_000_000
MAX_QUEUED_TOKENS = 10**9


class AsyncLLM:
    """A bundle, loaded and ready. Loading blocks: in a running loop, await ``load``.

    Args:
        bundle: the directory that ``llama-export build`` wrote, or its text side where that is
            open already.
        max_batch: sequences that run at once; None takes 32, and 128 on CUDA. With "auto" there are
            slots for up to 128, and 256 on CUDA, as memory allows, and how many of them are used
            follows from what steps are seen to take: ``stats().batch_limit``. The attribute
            ``max_batch`` is the number of slots. TensorRT has no "auto".
        max_len: the most tokens of one sequence, prompt and completion; None takes the model's
            limit, at most 4,096 and no more than fits into memory.
        threads: threads of the kernels on the CPU; None takes the processors this process may use.
        devices: numbers of the CUDA devices that a bundle built for CUDA runs on, an engine on each
            with ``max_batch`` sequences and one queue for all; None takes device 0.
        prefix_tokens: tokens of prompts that are kept, so that prompts which begin alike needn't
            compute them again; 0 keeps none. None keeps 4,096, or what fits into memory. On CUDA
            it is None, for as many as the cache has room for, or 0; with TensorRT none are kept.
        stream_budget: prompt tokens that a step may hold while somebody reads a stream: fewer keep
            the gaps between its tokens small, more answer prompts sooner. It is never less than
            twice as many as sequences run. 33 to 256, and to 2,048 on CUDA; None takes 33, and 512
            on CUDA. TensorRT has none.
        verify: how the bundle's files are checked; see ``open_bundle``.
        max_queued_requests: so many requests may wait for a slot; one more is refused at once.
        max_queued_tokens: with so many prompt tokens waiting, no more requests are taken.

    Raises:
        BundleError: the bundle can't be used.
        CapacityError: it doesn't fit into memory with these settings; nothing was loaded.
        RequestError: an argument is out of range.
        DependencyError: onnxruntime is missing, or lacks the provider that the bundle needs.
        BackendError: there is no such CUDA device, or its driver is too old.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | PromptEncoder = "bundle",
        *,
        max_batch: int | Literal["auto"] | None = None,
        max_len: int | None = None,
        threads: int | None = None,
        devices: Seq[int] | None = None,
        prefix_tokens: int | None = None,
        stream_budget: int | None = None,
        verify: Literal["full", "size"] | None = None,
        max_queued_requests: int = 1024,
        max_queued_tokens: int = 1_000_000,
    ) -> None:
        in_range("max_queued_requests", max_queued_requests, MAX_QUEUED_REQUESTS)
        in_range("max_queued_tokens", max_queued_tokens, MAX_QUEUED_TOKENS)
        loaded = load(
            bundle,
            Settings(
                max_batch=max_batch,
                max_len=max_len,
                threads=threads,
                devices=devices,
                prefix_tokens=prefix_tokens,
                stream_budget=stream_budget,
            ),
            verify=verify,
        )
        self._encoder = loaded.encoder
        self.bundle, self.tokenizer = loaded.encoder.bundle, loaded.encoder.tokenizer
        self.memory_plan, self.threads = loaded.memory_plan, loaded.threads
        self.max_batch, self.max_len = self.memory_plan.max_batch, self.memory_plan.max_len
        self.default_params = loaded.default_params
        self._grammars = loaded.grammars
        self._worker = Worker(
            loaded.engine,
            max_queued_requests=max_queued_requests,
            max_queued_tokens=max_queued_tokens,
        )
        # At the end of the program the worker sees to itself, and waits for its thread.
        weakref.finalize(self, self._worker.stop).atexit = False

    @classmethod
    async def load(
        cls,
        bundle: str | os.PathLike[str] | PromptEncoder = "bundle",
        *,
        max_batch: int | Literal["auto"] | None = None,
        max_len: int | None = None,
        threads: int | None = None,
        devices: Seq[int] | None = None,
        prefix_tokens: int | None = None,
        stream_budget: int | None = None,
        verify: Literal["full", "size"] | None = None,
        max_queued_requests: int = 1024,
        max_queued_tokens: int = 1_000_000,
    ) -> AsyncLLM:
        """Load a bundle while the loop goes on; arguments and errors are those of the class."""
        return await asyncio.to_thread(
            cls,
            bundle,
            max_batch=max_batch,
            max_len=max_len,
            threads=threads,
            devices=devices,
            prefix_tokens=prefix_tokens,
            stream_budget=stream_budget,
            verify=verify,
            max_queued_requests=max_queued_requests,
            max_queued_tokens=max_queued_tokens,
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` and ``stream_chat`` can be used."""
        return self._encoder.has_chat_template

    @property
    def encoder(self) -> PromptEncoder:
        """The text side of the bundle; what takes long there is best called in a thread."""
        return self._encoder

    def check_room(self, requests: int = 0, tokens: int = 0) -> None:
        """Raise what the next request would be refused with, before anything is done for it.

        Args:
            requests: that many others are about to be given to this.
            tokens: of their prompts.

        Raises:
            QueueFullError: with those as much waits for a slot as may.
            BackendError: the graph failed.
            CaravanError: the LLM drains or is closed, or was loaded by the parent process.
        """
        self._worker.check_process()
        self._worker.admission.check(requests, tokens)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        max_wait: float | None = None,
    ) -> AsyncStream:
        """Continue one raw prompt, an event a token.

        Args:
            prompt: text, or token ids.
            params: how to continue it; None takes the bundle's defaults.
            timeout: seconds from this call on, in the queue too, after which the slot is given
                back and ``TimeoutError`` raised.
            max_wait: seconds from this call on after which the same happens if it has had no slot.

        Returns:
            An asynchronous iterator. It begins when the first event is asked for, and what is wrong
            with the request is raised then.

        Raises:
            RequestError: the prompt, ``params``, ``timeout`` or ``max_wait`` is of a wrong type.
        """
        return AsyncStream(self.request(prompt, params, timeout=timeout, max_wait=max_wait), self)

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        max_wait: float | None = None,
        streamed: bool = True,
    ) -> AsyncRequest:
        """One raw prompt for those who read the messages of several requests from one mailbox.

        Args:
            prompt: as for ``stream``.
            params: as for ``stream``.
            timeout: as for ``stream``.
            max_wait: as for ``stream``.
            streamed: whether somebody reads the tokens as they come. If so, the steps that compute
                others' prompts are short while it runs.

        Returns:
            A request that is yet to begin.

        Raises:
            RequestError: as for ``stream``.
        """
        return self._request(prompt, self._source, params, timeout, max_wait, streamed=streamed)

    def stream_chat(
        self,
        messages: Seq[Message],
        params: SamplingParams | None = None,
        *,
        tools: Seq[Mapping[str, object]] | None = None,
        tool_choice: str | Mapping[str, object] | None = None,
        allow_control_tokens: bool = False,
        timeout: float | None = None,
    ) -> AsyncStream:
        """Answer one conversation, an event a token; otherwise as ``stream``.

        Args:
            messages: the turns.
            params: as for ``stream``.
            tools: as for ``chat``; calls are part of the text.
            tool_choice: as for ``chat``.
            allow_control_tokens: as for ``chat``.
            timeout: as for ``stream``.

        Raises:
            RequestError: as for ``stream``, or the tools are wrong.
        """
        use = self._encoder.tool_use(tools, tool_choice)
        source = partial(self._chat_source, use, allow_control_tokens)
        params = self.default_params if params is None else params
        if not isinstance(params, SamplingParams):
            raise wrong_type("params", "SamplingParams", params)
        return AsyncStream(self._request(messages, source, use.hold(params), timeout), self)

    async def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        timeout: float | None = None,
    ) -> list[Completion]:
        """Continue raw prompts, beside each other.

        At most twice ``max_batch`` of them are in flight at once, so there may be any number: when
        the first has its place in the queue, the others wait for theirs.

        Args:
            prompts: one or several; text, or token ids.
            params: for all of them, or one for each; None takes the bundle's defaults.
            timeout: seconds from this call on, in the queue too, after which all is given up.

        Returns:
            One completion a prompt and sample, in order.

        Raises:
            RequestError: a prompt or parameter is wrong.
            QueueFullError: as much waits for a slot as may; raised before any prompt has begun.
            TimeoutError: the timeout has passed.
            BackendError: the graph failed.
            CaravanError: the LLM drains or is closed, or was loaded by the parent process.
        """
        return await self._gather(as_list(prompts), self._source, params, timeout)

    async def chat(
        self,
        conversations: Seq[Message] | Seq[Seq[Message]],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        tools: Seq[Mapping[str, object]] | None = None,
        tool_choice: str | Mapping[str, object] | None = None,
        allow_control_tokens: bool = False,
        timeout: float | None = None,
    ) -> list[Completion]:
        """Answer conversations, laid out by the model's chat template.

        Args:
            conversations: one list of ``{"role": ..., "content": ...}``, or several.
            params: as for ``generate``.
            tools: functions that the model may call, in the form of OpenAI's API; what it calls is
                in ``Completion.tool_calls``.
            tool_choice: "auto", the model decides; "none"; "required", a grammar holds the answer
                to a call; or the one tool that is to be called, in OpenAI's form. None is "auto".
            allow_control_tokens: whether the text of a control token in messages and tools becomes
                that token. Otherwise it stays text: only the template ends turns and begins them.
            timeout: as for ``generate``.

        Returns:
            One completion a conversation and sample, in order.

        Raises:
            CaravanError: as for ``generate``; or the bundle has no chat template, or the template
                refuses the messages or leaves some out; or the tools are wrong, or can't be
                enforced.
        """
        use = self._encoder.tool_use(tools, tool_choice)
        several = as_conversations(conversations)
        each = params_of_each(params, self.default_params, len(several))
        source = partial(self._chat_source, use, allow_control_tokens)
        held = [use.hold(one) for one in each]
        with use.blamed():
            completions = await self._gather(several, source, held, timeout)
        return [completion.with_tool_calls(use) for completion in completions]

    def stats(self) -> Stats:
        """A copy of the counters, as the last step left them; it waits for none.

        A sequence waits from its admission on, until the step that gives it a slot has ended.

        Raises:
            CaravanError: the process is a fork of the one that loaded this.
        """
        return self._worker.stats()

    @property
    def step_seconds(self) -> float:
        """How long the step that runs now has taken; 0 while none runs. It waits for none."""
        return self._worker.busy_seconds

    def health(self) -> Literal["ok", "draining", "failed", "closed"]:
        """Whether requests can run; "failed" after an error of the backend.

        Raises:
            CaravanError: the process is a fork of the one that loaded this.
        """
        self._worker.check_process()
        admission = self._worker.admission
        if admission.closed:
            return "closed"
        if admission.failure is not None:
            return "failed"
        return "draining" if admission.draining else "ok"

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no new requests, and wait for those in flight.

        Args:
            timeout: seconds to wait, or None. What is left then goes on until ``close``.

        Returns:
            Whether all have ended.

        Raises:
            RequestError: ``timeout`` is wrong.
            CaravanError: the process is a fork of the one that loaded this.
        """
        deadline = Deadline(timeout)
        self._worker.drain()
        return await settled(self._worker.admission.drained, deadline.left)

    async def close(self, timeout: float = 30.0) -> None:
        """End what is in flight and free the cache and the graph; a second call does nothing.

        Args:
            timeout: seconds to wait for the step that runs. A step that hangs can't be ended: it
                keeps its memory, and nothing else waits for it.

        Raises:
            RequestError: ``timeout`` is wrong.
        """
        deadline = Deadline(timeout)
        self._worker.close()
        if self._worker.forked:
            return
        if await settled(self._worker.ended, deadline.left):
            self._worker.join()  # which has nothing left to do
        else:
            logger.warning("a step has not ended within %s s; its memory is still held", timeout)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _request(
        self,
        item: Item,
        source: Callable[[Item, SamplingParams], Source],
        params: SamplingParams | None,
        timeout: float | None,
        max_wait: float | None = None,
        *,
        streamed: bool = True,
    ) -> AsyncRequest:
        params = self.default_params if params is None else params
        if not isinstance(params, SamplingParams):
            raise wrong_type("params", "SamplingParams", params)
        return AsyncRequest(
            self._worker,
            source(item, params),
            params,
            deadline=Deadline(timeout),
            turn=Deadline(max_wait, "max_wait"),
            streamed=streamed,
        )

    async def _gather(
        self,
        items: Seq[Item],
        source: Callable[[Item, SamplingParams], Source],
        params: SamplingParams | Seq[SamplingParams] | None,
        timeout: float | None,
    ) -> list[Completion]:
        deadline = Deadline(timeout)
        each = params_of_each(params, self.default_params, len(items))
        call = Call(self._worker, items, source, each, window=2 * self.max_batch)
        async with deadline.kept():
            return await call.run()

    def _source(self, prompt: Prompt, params: SamplingParams) -> Source:
        """A prompt as token ids, or what makes them of text."""
        if isinstance(prompt, str):
            encode = partial(self._encoder.encode, prompt, max_len=self.max_len)
            return self._compiling(encode, params)
        if not is_list(prompt):
            raise wrong_type("prompt", "a list of whole numbers, or text", prompt)
        token_ids = list(prompt)
        return (
            token_ids if params.constraint is None else self._compiling(lambda: token_ids, params)
        )

    def _chat_source(
        self,
        use: ToolUse,
        allow_control_tokens: bool,
        messages: Seq[Message],
        params: SamplingParams,
    ) -> Source:
        encode = partial(
            self._encoder.encode_chat, messages, use, allow_control_tokens=allow_control_tokens
        )
        return self._compiling(encode, params, use)

    def _compiling(
        self, encode: Callable[[], list[int]], params: SamplingParams, use: ToolUse | None = None
    ) -> Source:
        """The same, after what the completion is held to has been compiled; both off the loop."""

        def prepared() -> list[int]:
            with use.blamed() if use is not None else nullcontext():
                self._grammars.prepare(params.constraint)
            return encode()

        return prepared
