"""The blocking facade: a bundle, and prompts in, completions out.

    with LLM("bundle") as llm:
        for completion in llm.generate(["Gravity is", "Once upon a time"]):
            print(completion.text)

An ``LLM`` may be used from several threads: calls that overlap share the batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import count
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
from llama_runtime.completion import Completion, Prompt, Request
from llama_runtime.errors import RequestError
from llama_runtime.loading import load, opened, plan
from llama_runtime.memory_plan import MemoryPlan
from llama_runtime.params import SamplingParams, fresh_seed, row_seed
from llama_runtime.prompt_encoder import PromptEncoder
from llama_runtime.sequence import Sequence
from llama_runtime.settings import Settings
from llama_runtime.shared_engine import Inbox, SharedEngine, Stats
from llama_runtime.token_stream import TokenStream


class LLM:
    """A bundle, loaded and ready.

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
    ) -> None:
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
        self._engine = SharedEngine(loaded.engine)

    @classmethod
    def plan(
        cls,
        bundle: str | os.PathLike[str] | PromptEncoder = "bundle",
        *,
        max_batch: int | Literal["auto"] | None = None,
        max_len: int | None = None,
        devices: Seq[int] | None = None,
        prefix_tokens: int | None = None,
    ) -> MemoryPlan:
        """What a setting needs of memory, and whether it is there; nothing is loaded.

        Args:
            bundle: as for the class; its files are checked by their sizes.
            max_batch: as for the class.
            max_len: as for the class; None takes what the class would take.
            devices: as for the class.
            prefix_tokens: as for the class.

        Returns:
            The plan, which may not fit. Its ``check`` raises what the class would raise.

        Raises:
            BundleError: the bundle can't be used.
            RequestError: an argument is out of range.
        """
        opened_bundle = opened(bundle, verify="size").bundle
        settings = Settings(
            max_batch=max_batch, max_len=max_len, devices=devices, prefix_tokens=prefix_tokens
        )
        return plan(opened_bundle, settings)

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` can be used."""
        return self._encoder.has_chat_template

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Continue raw prompts.

        Args:
            prompts: one or several; text, or token ids.
            params: for all of them, or one for each; None takes the bundle's defaults.

        Returns:
            One completion a prompt, in order; with ``n`` above 1 that many, one after the other.

        Raises:
            RequestError: a prompt or parameter is wrong.
            BackendError: the graph failed.
        """
        several = as_list(prompts)
        each = params_of_each(params, self.default_params, len(several))
        requests = [Request(*pair) for pair in zip(several, each, strict=True)]
        completions: dict[tuple[int, int], Completion] = {}
        for index, completion in self.run(requests):
            if completion.error is not None:
                completion.error.add_note(f"prompt {index} of {len(requests)}")
                raise completion.error
            completions[index, completion.sample] = completion
        return [completions[key] for key in sorted(completions)]

    def generate_batch(
        self,
        prompts: Seq[str],
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> list[Completion]:
        """Continue raw prompts, each with a random stream of its own made from one seed.

        Args:
            prompts: texts.
            max_tokens: the most completion tokens of each.
            temperature: 0 is greedy.
            top_p: the nucleus to sample from, in (0, 1].
            seed: prompt i gets ``row_seed(seed, i)``; None draws a fresh one.

        Returns:
            One completion a prompt, in order.
        """
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        job = fresh_seed() if seed is None else seed
        if isinstance(prompts, str):
            raise RequestError("prompts must be a list of texts, not one text", param="prompts")
        if not is_list(prompts):
            raise wrong_type("prompts", "a list of texts", prompts)
        rows = [replace(params, seed=row_seed(job, i)) for i in range(len(prompts))]
        return self.generate(list(prompts), rows)

    def chat(
        self,
        conversations: Seq[Message] | Seq[Seq[Message]],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        tools: Seq[Mapping[str, object]] | None = None,
        tool_choice: str | Mapping[str, object] | None = None,
        allow_control_tokens: bool = False,
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

        Returns:
            One completion a conversation, in order.

        Raises:
            RequestError: as for ``generate``; or the bundle has no chat template, or the template
                refuses the messages or leaves some out; or the tools are wrong, or can't be
                enforced.
        """
        use = self._encoder.tool_use(tools, tool_choice)
        several = as_conversations(conversations)
        each = params_of_each(params, self.default_params, len(several))
        held = [use.hold(one) for one in each]
        with use.blamed():
            for one in held:
                self._grammars.prepare(one.constraint)
        prompts = [
            self._encoder.encode_chat(messages, use, allow_control_tokens=allow_control_tokens)
            for messages in several
        ]
        with use.blamed():
            return [completion.with_tool_calls(use) for completion in self.generate(prompts, held)]

    def chat_prompt(
        self,
        messages: Seq[Message],
        *,
        tools: Seq[Mapping[str, object]] | None = None,
        tool_choice: str | Mapping[str, object] | None = None,
        allow_control_tokens: bool = False,
    ) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins.

        Args:
            messages: as for ``chat``.
            tools: as for ``chat``.
            tool_choice: as for ``chat``; with "none" the model isn't told of the tools.
            allow_control_tokens: as for ``chat``.

        Raises:
            RequestError: the bundle has no chat template, or it refuses the messages or leaves some
                out; or the tools are wrong.
        """
        use = self._encoder.tool_use(tools, tool_choice)
        return self._encoder.encode_chat(messages, use, allow_control_tokens=allow_control_tokens)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> TokenStream:
        """Continue one raw prompt, an event a token. Closing or dropping the stream frees the slot.

        With ``n`` above 1 the events of all samples come as they are made.

        Raises:
            RequestError: the prompt or a parameter is wrong; raised by the call itself.
            BackendError: the graph failed.
        """
        inbox = Inbox()
        seqs = self._add(Request(prompt, params or self.default_params), inbox, streamed=True)
        return TokenStream(self._engine, seqs, inbox)

    def run(self, requests: Iterable[Request | None]) -> Iterator[tuple[int, Completion]]:
        """Run requests as they come, and give each back as it finishes.

        Requests are drawn when there is room for them, so the iterable may be endless. A request
        that can't run ends with "error", and the others go on.

        Args:
            requests: what to run. None among them says that no further one should begin yet, and
                is asked for again after the next step.

        Yields:
            The index of a request, from 0, and a completion of it; in order of finishing. A request
            has ``n`` of them, or one that is an error.
        """
        inbox = Inbox()
        in_flight: dict[int, tuple[int, Sequence, list[str]]] = {}
        pending, numbers, end = _checked(requests), count(), object()
        exhausted = False
        try:
            while in_flight or not exhausted:
                while not exhausted and len(in_flight) < 2 * self.max_batch:
                    request = next(pending, end)
                    if not isinstance(request, Request):
                        exhausted = request is end
                        break
                    index = next(numbers)
                    try:
                        seqs = self._add(request, inbox)
                    except RequestError as error:
                        yield index, Completion("", [], "error", error=error)
                    else:
                        in_flight |= {seq.id: (index, seq, []) for seq in seqs}
                if in_flight:
                    self._engine.wait(inbox)
                while inbox:
                    event = inbox.popleft()
                    index, seq, texts = in_flight[event.sequence_id]
                    texts.append(event.text)
                    if event.finish_reason is not None:
                        del in_flight[event.sequence_id]
                        yield index, Completion.of(seq, "".join(texts), event)
        finally:
            for _, seq, _ in in_flight.values():
                self._engine.drop(seq)

    def warm_up(self) -> None:
        """Run a short request, so that the first real one finds everything paged in."""
        self.generate([[0]], SamplingParams(max_tokens=min(2, self.max_len - 1), ignore_eos=True))

    def stats(self) -> Stats:
        """A copy of the counters."""
        return self._engine.stats()

    def health(self) -> Literal["ok", "failed", "closed"]:
        """Whether requests can run; "failed" after an error of the backend."""
        if self._engine.closed:
            return "closed"
        return "failed" if self._engine.failed else "ok"

    def close(self) -> None:
        """End what is in flight and free the cache and the graph; a second call does nothing."""
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _add(self, request: Request, inbox: Inbox, *, streamed: bool = False) -> list[Sequence]:
        prompt = request.prompt
        if not isinstance(prompt, str) and not is_list(prompt):
            raise wrong_type("prompt", "a list of whole numbers, or text", prompt)
        token_ids = (
            self._encoder.encode(prompt, max_len=self.max_len)
            if isinstance(prompt, str)
            else prompt
        )
        if isinstance(request.params, SamplingParams):  # else the engine says so
            self._grammars.prepare(request.params.constraint)  # while others' steps go on
        return self._engine.add(token_ids, request.params, inbox, streamed=streamed)


def _checked(requests: Iterable[Request | None]) -> Iterator[Request | None]:
    """The same, sure to be nothing else."""
    if not hasattr(requests, "__iter__"):
        raise wrong_type("requests", "an iterable of Request objects", requests)
    for request in requests:
        if request is not None and not isinstance(request, Request):
            raise wrong_type("requests", "Request objects, or None", request)
        yield request
