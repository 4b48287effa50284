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
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

from llama_runtime.backends.ort_cpu import OrtCpu
from llama_runtime.bundle import open_bundle
from llama_runtime.chat_template import ChatTemplate
from llama_runtime.contract import SLOTS, cache_capacity
from llama_runtime.engine import Engine, TokenEvent
from llama_runtime.errors import CaravanError, RequestError
from llama_runtime.generation_config import default_params, eos_token_ids
from llama_runtime.machine import default_threads
from llama_runtime.params import SamplingParams, fresh_seed, row_seed
from llama_runtime.sequence import FinishReason, Sequence
from llama_runtime.shared_engine import Inbox, SharedEngine, Stats
from llama_runtime.tokenizer import Tokenizer

DEFAULT_MAX_BATCH = 32
DEFAULT_MAX_LEN = 4096
MAX_CHUNK = 128  # prompt tokens of one sequence in one step: longer ones stall the other streams
PROMPT_BUDGET = 256  # prompt tokens of one step, beside one token of each decoding sequence

Prompt = str | Seq[int]
Message = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to continue it.

    Attributes:
        prompt: raw text, or token ids, which are taken as they are.
        params: how to continue it.
    """

    prompt: Prompt
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of one request.

    Attributes:
        text: the completion, without its end token.
        token_ids: what was generated, an end token included.
        finish_reason: "stop", "length" or "error".
        num_prompt_tokens: length of the prompt; 0 if it never became tokens.
        seed: the random stream in use: the same request with this seed gives the same text.
        error: what went wrong, if ``finish_reason`` is "error".
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    num_prompt_tokens: int = 0
    seed: int | None = None
    error: CaravanError | None = None


class LLM:
    """A bundle, loaded and ready.

    Args:
        bundle: the directory that ``llama-export build`` wrote.
        max_batch: sequences that run at once.
        max_len: the most tokens of one sequence, prompt and completion; None takes the model's
            limit, at most 4,096.
        threads: threads of the kernels; None takes the processors this process may use.
        verify: how the bundle's files are checked; see ``open_bundle``.

    Raises:
        BundleError: the bundle can't be used.
        RequestError: an argument is out of range.
        DependencyError: onnxruntime is missing.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] = "bundle",
        *,
        max_batch: int = DEFAULT_MAX_BATCH,
        max_len: int | None = None,
        threads: int | None = None,
        verify: Literal["full", "size"] | None = None,
    ) -> None:
        self.bundle = open_bundle(Path(bundle), verify=verify)
        geometry, config = self.bundle.manifest.geometry, self.bundle.generation_config
        if max_len is None:
            max_len = min(DEFAULT_MAX_LEN, geometry.max_positions)
        self.max_batch = _in_range("max_batch", max_batch, 1024)
        self.max_len = _in_range("max_len", max_len, geometry.max_positions)
        self.threads = _in_range("threads", default_threads() if threads is None else threads, 1024)
        self.default_params = default_params(config)
        self.tokenizer = Tokenizer(self.bundle.tokenizer_path)
        source = self.bundle.chat_template
        special_tokens = self.bundle.manifest.special_tokens
        self._template = None if source is None else ChatTemplate(source, special_tokens)
        backend = OrtCpu(
            self.bundle.graph_path(SLOTS.name),
            geometry,
            num_slots=self.max_batch,
            capacity=cache_capacity(self.max_len, MAX_CHUNK),
            threads=self.threads,
        )
        engine = Engine(
            backend,
            self.tokenizer.byte_table,
            eos_token_ids(config),
            vocab_size=geometry.vocab_size,
            max_batch=self.max_batch,
            max_len=self.max_len,
            token_budget=self.max_batch + PROMPT_BUDGET,
            max_chunk=MAX_CHUNK,
        )
        self._engine = SharedEngine(engine)

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` can be used."""
        return self._template is not None

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
            One completion a prompt, in order.

        Raises:
            RequestError: a prompt or parameter is wrong.
            BackendError: the graph failed.
        """
        several = _as_list(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or self.default_params] * len(several)
        if len(params) != len(several):
            raise RequestError(
                f"{len(several)} prompts with {len(params)} parameters", param="params"
            )
        requests = [Request(*pair) for pair in zip(several, params, strict=True)]
        completions: dict[int, Completion] = {}
        for index, completion in self.run(requests):
            if completion.error is not None:
                raise completion.error
            completions[index] = completion
        return [completions[i] for i in range(len(requests))]

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
        rows = [replace(params, seed=row_seed(job, i)) for i in range(len(prompts))]
        return self.generate(list(prompts), rows)

    def chat(
        self,
        conversations: Seq[Message] | Seq[Seq[Message]],
        params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Answer conversations, laid out by the model's chat template.

        Args:
            conversations: one list of ``{"role": ..., "content": ...}``, or several.
            params: as for ``generate``.

        Returns:
            One completion a conversation, in order.

        Raises:
            RequestError: as for ``generate``; or the bundle has no chat template, or the template
                refuses the messages.
        """
        one = not conversations or isinstance(conversations[0], Mapping)
        several = [conversations] if one else conversations
        return self.generate([self.chat_prompt(messages) for messages in several], params)  # type: ignore[arg-type]

    def chat_prompt(self, messages: Seq[Message]) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins.

        Raises:
            RequestError: the bundle has no chat template, or it refuses the messages.
        """
        if self._template is None:
            raise RequestError(
                f"{self.bundle.path} has no chat template; give raw prompts", param="messages"
            )
        return self.tokenizer.encode_templated(self._template.render(messages))

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[TokenEvent]:
        """Continue one raw prompt, an event a token. Leaving the loop early frees the slot.

        Raises:
            RequestError: the prompt or a parameter is wrong; raised by the call itself.
            BackendError: the graph failed.
        """
        inbox = Inbox()
        seq = self._add(Request(prompt, params or self.default_params), inbox)
        return self._events(seq, inbox)

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """Run requests as they come, and give each back as it finishes.

        Requests are drawn when there is room for them, so the iterable may be endless. A request
        that can't run ends with "error", and the others go on.

        Yields:
            The index of a request, from 0, and its completion; in order of finishing.
        """
        inbox = Inbox()
        in_flight: dict[int, tuple[int, Sequence, list[str]]] = {}
        numbered = enumerate(requests)
        exhausted = False
        try:
            while in_flight or not exhausted:
                while not exhausted and len(in_flight) < 2 * self.max_batch:
                    index, request = next(numbered, (-1, None))
                    if request is None:
                        exhausted = True
                        break
                    try:
                        seq = self._add(request, inbox)
                    except RequestError as error:
                        yield index, Completion("", [], "error", error=error)
                    else:
                        in_flight[seq.id] = index, seq, []
                if in_flight:
                    self._engine.wait(inbox)
                while inbox:
                    event = inbox.popleft()
                    index, seq, texts = in_flight[event.sequence_id]
                    texts.append(event.text)
                    if event.finish_reason is not None:
                        del in_flight[event.sequence_id]
                        yield index, _completion(seq, "".join(texts), event)
        finally:
            for _, seq, _ in in_flight.values():
                self._engine.drop(seq)

    def warm_up(self) -> None:
        """Run a short request, so that the first real one finds everything paged in."""
        self.generate([[0, 0]], SamplingParams(max_tokens=2, ignore_eos=True))

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

    def _add(self, request: Request, inbox: Inbox) -> Sequence:
        prompt = request.prompt
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return self._engine.add(token_ids, request.params, inbox)

    def _events(self, seq: Sequence, inbox: Inbox) -> Iterator[TokenEvent]:
        try:
            while seq.finish_reason is None or inbox:
                self._engine.wait(inbox)
                event = inbox.popleft()
                if event.error is not None:
                    raise event.error
                yield event
        finally:
            self._engine.drop(seq)


def _completion(seq: Sequence, text: str, event: TokenEvent) -> Completion:
    return Completion(
        text=text,
        token_ids=seq.completion_token_ids,
        finish_reason=event.finish_reason or "error",
        num_prompt_tokens=seq.num_prompt_tokens,
        seed=seq.seed,
        error=event.error,
    )


def _as_list(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """A list of prompts, also from a single one."""
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _in_range(param: str, value: int, limit: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        raise RequestError(f"{param} must lie in 1 to {limit}, not {value!r}", param=param)
    return value
