"""One call of OpenAI's API, and what it asks of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from llama_runtime.completion import Prompt, Request
from llama_runtime.errors import CapacityError, CaravanError, RequestError
from llama_runtime.openai_api.fields import named
from llama_runtime.params import SamplingParams
from llama_runtime.prompt_encoder import PromptEncoder
from llama_runtime.tokenizer import Tokenizer
from llama_runtime.tool_use import ToolUse


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiRequest:
    """What a body asks for, as ``parsing`` reads it.

    Attributes:
        kind: which of the two routes the body is for.
        model: the model that it names; whether it is there is for whoever serves it to say.
        params: how to continue each prompt.
        paths: where in the body each option of ``params`` comes from, if it does.
        messages: the turns of a chat.
        prompts: those of a completion, texts or token ids.
        tools: definitions, unchecked; None for none.
        tool_choice: in OpenAI's form, unchecked; None for "auto".
        echo: whether the text of a prompt comes before that of its completion.
        generates: False if nothing is to come after the prompts (``max_tokens`` 0). The engine
            makes a token all the same, because that is what scores a prompt, and it is dropped.
        stream: whether events are wanted.
        include_usage: whether a stream ends with the usage.
    """

    kind: Literal["chat", "completion"]
    model: str
    params: SamplingParams
    paths: Mapping[str, str] = field(default_factory=dict)
    messages: tuple[Mapping[str, Any], ...] = ()
    prompts: tuple[Prompt, ...] = ()
    tools: Any = None
    tool_choice: Any = None
    echo: bool = False
    generates: bool = True
    stream: bool = False
    include_usage: bool = False

    def prepared(self, encoder: PromptEncoder, *, allow_control_tokens: bool = False) -> Prepared:
        """The same as requests of the engine.

        Args:
            encoder: of the model.
            allow_control_tokens: see ``PromptEncoder.encode_chat``.

        Raises:
            CapacityError: a prompt with its ``max_tokens`` is longer than the model can take.
            RequestError: a prompt, a message or a tool is wrong; ``param`` is its path.
        """
        if self.kind == "chat":
            with self._explaining():
                return self._chat(encoder, allow_control_tokens)
        prompts = []
        for number, prompt in enumerate(self.prompts):
            with self._explaining(number):
                token_ids = _token_ids(prompt, encoder)
                _check_length(token_ids, self.params, encoder)
                prompts.append(token_ids)
        return Prepared(self, tuple(prompts), self.params, None, encoder.tokenizer)

    def explained(self, error: RequestError, number: int = 0) -> RequestError:
        """The error, said of a field of the body.

        Args:
            error: of the modules that the prompts and parameters were given to.
            number: the prompt that it is about, from 0.
        """
        prompt = "messages" if self.kind == "chat" else "prompt"
        if len(self.prompts) > 1:
            prompt = f"prompt[{number}]"
        return named(error, {"prompt": prompt, **self.paths})

    def _chat(self, encoder: PromptEncoder, allow_control_tokens: bool) -> Prepared:
        if not encoder.has_chat_template:
            raise RequestError(
                "messages can't be used: the model has no chat template; give a prompt to "
                "/v1/completions",
                param="messages",
            )
        use = encoder.tool_use(self.tools, self.tool_choice)
        params = use.hold(self.params)
        token_ids = encoder.encode_chat(
            self.messages,
            use,
            allow_control_tokens=allow_control_tokens,
            max_len=encoder.bundle.manifest.geometry.max_positions,
        )
        _check_length(token_ids, params, encoder)
        return Prepared(self, (token_ids,), params, use, encoder.tokenizer)

    @contextmanager
    def _explaining(self, number: int = 0) -> Iterator[None]:
        try:
            yield
        except RequestError as error:
            explained = self.explained(error, number)
            if explained is error:
                raise
            raise explained from error


@dataclass(frozen=True, slots=True)
class Prepared:
    """A call, ready to run.

    Attributes:
        request: the call.
        prompts: token ids of each prompt, in order; a chat is one.
        params: how to continue them, held to a call of a tool where the chat asks for one.
        use: the tools of a chat.
        tokenizer: of the model.
    """

    request: ApiRequest
    prompts: tuple[list[int], ...]
    params: SamplingParams
    use: ToolUse | None
    tokenizer: Tokenizer

    @property
    def requests(self) -> tuple[Request, ...]:
        """What to run: one request a prompt, in order."""
        return tuple(Request(prompt, self.params) for prompt in self.prompts)

    def explained(self, error: CaravanError, number: int = 0) -> CaravanError:
        """An error of running a request, said of a field of the body.

        Args:
            error: as it was raised, or stood in a completion.
            number: which of ``requests`` it is about.

        Returns:
            An error of the same kind; one that isn't about the request comes back as it is.
        """
        if not isinstance(error, RequestError):
            return error
        if self.use is not None:
            try:
                with self.use.blamed():
                    raise error
            except RequestError as blamed:
                error = blamed
        return self.request.explained(error, number)


def _token_ids(prompt: Prompt, encoder: PromptEncoder) -> list[int]:
    if isinstance(prompt, str):
        return encoder.encode(prompt, max_len=encoder.bundle.manifest.geometry.max_positions)
    return list(prompt)


def _check_length(token_ids: list[int], params: SamplingParams, encoder: PromptEncoder) -> None:
    limit = encoder.bundle.manifest.geometry.max_positions
    if not token_ids:
        raise RequestError("the prompt is empty: it has no tokens", param="prompt")
    if (needed := len(token_ids) + params.max_tokens) > limit:
        raise CapacityError(
            f"{len(token_ids)} prompt tokens and max_tokens {params.max_tokens} need {needed} "
            f"tokens, over the model's limit {limit}: shorten the prompt or lower max_tokens",
            param="max_tokens" if len(token_ids) < limit else "prompt",
        )
