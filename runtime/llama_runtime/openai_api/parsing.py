"""Bodies of OpenAI's ``/v1/chat/completions`` and ``/v1/completions``, read and checked.

A field has an effect, or is one of ``WITHOUT_EFFECT``, or is an error that names it. Beside
OpenAI's fields there are those that users of vLLM send: ``top_k``, ``min_p``,
``repetition_penalty``, ``min_tokens``, ``ignore_eos``, ``stop_token_ids``,
``include_stop_str_in_output``, ``structured_outputs``, ``priority`` and ``cache_salt``.

Source: the parameters of the ``openai`` package, which are made from OpenAI's own specification.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_runtime.completion import Prompt
from llama_runtime.errors import RequestError
from llama_runtime.openai_api.fields import Fields
from llama_runtime.openai_api.requests import ApiRequest
from llama_runtime.openai_api.sampling_fields import SamplingFields
from llama_runtime.params import SamplingParams

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions
MAX_PROMPTS = 2048  # of one body, as at OpenAI
# Taken with any value, or with the one that says what happens here anyway.
WITHOUT_EFFECT = ("user", "metadata", "store: false", "service_tier: auto")
# Fields of OpenAI's that nothing here can honour. They may be null.
UNSUPPORTED_CHAT = (
    "audio",
    "function_call",
    "functions",
    "moderation",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "reasoning_effort",
    "safety_identifier",
    "verbosity",
    "web_search_options",
)
UNSUPPORTED_MESSAGE = ("annotations", "audio", "function_call", "refusal")
_ADVICE = {
    "function_call": "give tool_choice instead",
    "functions": "give tools instead",
    "guided_choice": "give structured_outputs.choice instead",
    "guided_grammar": "give structured_outputs.grammar instead",
    "guided_json": "give structured_outputs.json instead",
    "guided_regex": "give structured_outputs.regex instead",
    "prompt_cache_key": "prompts are shared by themselves; cache_salt keeps them apart",
    "prompt_logprobs": "give echo and logprobs to /v1/completions instead",
}


def parse_chat(body: object, defaults: SamplingParams) -> ApiRequest:
    """Read the body of ``/v1/chat/completions``.

    Args:
        body: as ``json.loads`` gave it.
        defaults: what counts where the body is silent, ``max_tokens`` too: an answer is not as long
            as the context lets it be, as it is at OpenAI.

    Raises:
        RequestError: a field is wrong, unknown or not supported; ``param`` is its path. What only
            the model's tokenizer and template can say is said by ``ApiRequest.prepared``.
    """
    fields = Fields(body)
    model, messages = _model(fields), take_messages(fields)
    sampling = SamplingFields.of(fields)
    _take_chat_length(fields, sampling)
    sampling.put("logprobs", fields.flag("logprobs"), "logprobs")
    sampling.put("top_logprobs", fields.take("top_logprobs"), "top_logprobs")
    tools, choice = fields.take("tools"), fields.take("tool_choice")
    is_single = choice not in (None, "auto")  # else a grammar holds the answer to one call, or none
    if fields.flag("parallel_tool_calls") is False and tools is not None and not is_single:
        raise fields.wrong(
            "parallel_tool_calls",
            "can't be false while the model is free to call: leave it out, or set tool_choice to "
            "required or to a tool, which makes one call",
        )
    stream, include_usage = _stream(fields)
    _take_without_effect(fields)
    fields.only("modalities", ["text"], "text is all that comes out")
    fields.refuse(UNSUPPORTED_CHAT, _ADVICE)
    return ApiRequest(
        kind="chat",
        model=model,
        params=sampling.params(defaults),
        paths=sampling.paths,
        messages=messages,
        tools=tools,
        tool_choice=choice,
        stream=stream,
        include_usage=include_usage,
    )


def parse_completion(body: object, defaults: SamplingParams) -> ApiRequest:
    """Read the body of ``/v1/completions``.

    With ``echo``, ``max_tokens`` may be 0: the prompt is scored and nothing comes after it.

    Args:
        body: as ``json.loads`` gave it.
        defaults: what counts where the body is silent, but for ``max_tokens``, which is 16 then,
            as OpenAI's specification says.

    Raises:
        RequestError: as for ``parse_chat``.
    """
    fields = Fields(body)
    model, prompts = _model(fields), _prompts(fields)
    sampling = SamplingFields.of(fields)
    echo = bool(fields.flag("echo"))
    max_tokens = fields.take("max_tokens")
    generates = not (type(max_tokens) is int and max_tokens == 0)
    if not generates and not echo:
        raise fields.wrong("max_tokens", "can be 0 with echo only: there would be nothing to give")
    if max_tokens is None:
        max_tokens = DEFAULT_COMPLETION_TOKENS
    sampling.put("max_tokens", max_tokens if generates else 1, "max_tokens")
    if (top := fields.take("logprobs")) is not None:
        sampling.put("logprobs", True, "logprobs")
        sampling.put("prompt_logprobs", echo, "echo")
        sampling.put("top_logprobs", top, "logprobs")
    count = sampling.options.get("n", 1)
    fields.only("best_of", count, f"it can only be n, which is {count!r:.80}")
    fields.only("suffix", None, "text is continued, never filled in; leave it out")
    stream, include_usage = _stream(fields)
    _take_without_effect(fields)
    fields.refuse((), _ADVICE)
    params = sampling.params(defaults)
    if not generates and params.min_tokens > 0:
        raise fields.wrong("min_tokens", f"is {params.min_tokens}, over max_tokens 0")
    return ApiRequest(
        kind="completion",
        model=model,
        params=params,
        paths=sampling.paths,
        prompts=prompts,
        echo=echo,
        generates=generates,
        stream=stream,
        include_usage=include_usage,
    )


def _model(fields: Fields) -> str:
    model = fields.text("model")
    if model is None:
        raise fields.wrong("model", "is missing: name the model")
    return model


def _take_chat_length(fields: Fields, sampling: SamplingFields) -> None:
    """Both spellings of ``max_tokens``, the newer one first."""
    newer, older = fields.take("max_completion_tokens"), fields.take("max_tokens")
    if newer is not None and older is not None and newer != older:
        raise fields.wrong(
            "max_completion_tokens",
            f"is {newer!r:.80} and max_tokens {older!r:.80}: give one of them",
        )
    sampling.put("max_tokens", older, "max_tokens")
    sampling.put("max_tokens", newer, "max_completion_tokens")


def _stream(fields: Fields) -> tuple[bool, bool]:
    """Whether to stream, and whether the stream ends with the usage."""
    stream, options = bool(fields.flag("stream")), fields.nested("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise fields.wrong("stream_options", "needs stream to be true")
    include_usage = bool(options.flag("include_usage"))
    options.only("include_obfuscation", False, "nothing is added to hide lengths; leave it out")
    options.refuse((), {})
    return stream, include_usage


def _take_without_effect(fields: Fields) -> None:
    fields.text("user")
    fields.nested("metadata")
    fields.only("store", False, "nothing is kept; leave it out")
    fields.only("service_tier", "auto", "there is one for all; leave it out")


def take_messages(fields: Fields) -> tuple[Mapping[str, Any], ...]:
    """The turns, of which no field is unknown; the rest is for ``conversation`` to check.

    Args:
        fields: of a body.

    Raises:
        RequestError: there are none, or a field of one can't be read.
    """
    messages = fields.need("messages")
    if not isinstance(messages, list):
        raise fields.wrong("messages", f"must be a list of turns, not {type(messages).__name__}")
    if not messages:
        raise fields.wrong("messages", "is empty; at least one turn is needed")
    for index, message in enumerate(messages):
        turn = Fields(message, f"messages[{index}]")
        for key in ("role", "content"):
            turn.take(key)
        for key in ("name", "tool_call_id"):
            turn.text(key)
        calls = turn.take("tool_calls")
        if calls is not None and not isinstance(calls, list):
            raise turn.wrong("tool_calls", f"must be a list, not {calls!r:.80}")
        turn.refuse(UNSUPPORTED_MESSAGE, {"function_call": "give tool_calls instead"})
    return tuple(messages)


def _prompts(fields: Fields) -> tuple[Prompt, ...]:
    given = fields.need("prompt")
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, list) or not given:
        kind = "an empty list" if given == [] else type(given).__name__
        raise fields.wrong(
            "prompt", f"must be a text, a list of token ids, or a list of either, not {kind}"
        )
    if _is_id(given[0]):
        return (_token_ids(given, "prompt"),)
    if len(given) > MAX_PROMPTS:
        raise fields.wrong("prompt", f"has {len(given):,} prompts, and {MAX_PROMPTS:,} at most")
    return tuple(_prompt(one, f"prompt[{index}]") for index, one in enumerate(given))


def _prompt(value: object, path: str) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _token_ids(value, path)
    raise RequestError(
        f"{path} must be a text or a list of token ids, not {value!r:.80}", param=path
    )


def _token_ids(values: list[Any], path: str) -> tuple[int, ...]:
    if not values:
        raise RequestError(f"{path} is empty: it has no tokens", param=path)
    for index, value in enumerate(values):
        if not _is_id(value):
            place = f"{path}[{index}]"
            raise RequestError(f"{place} must be a token id, not {value!r:.80}", param=place)
    return tuple(values)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
