"""Requests of every kind over HTTP, and what ``LLM`` makes of the same: for comparison, both plain.

An answer becomes a list of choices: text, why it ended, and its tokens by name with their
log-probabilities, where those were asked for.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_runtime.completion import Completion
from llama_runtime.llm import LLM
from llama_runtime.openai_api.logprobs import token_name
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import TokenLogprob
from llama_runtime.tokenizer import Tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
WORDS = (
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog,", "é", "and", "狐"),
    *("too.", "Why?", "Because", "it", "can"),
)
Choice = tuple[str, str, list[Any] | None]


@dataclass(frozen=True, slots=True)
class Asked:
    """One request.

    Attributes:
        path: of the route.
        body: without the model's name.
        prompt: a text, token ids, or the turns of a chat.
        params: what it asks for, in the terms of the facade.
    """

    path: str
    body: dict[str, Any]
    prompt: Any
    params: SamplingParams = field(repr=False)


def requests(count: int, *, seed: int, longest: int, most: int) -> list[Asked]:
    """Requests that differ in all that tokens depend on.

    Args:
        count: how many.
        seed: of the choice.
        longest: the most characters of a prompt.
        most: the most tokens of a completion.
    """
    numbers = random.Random(seed)
    return [_request(numbers, index, longest, most) for index in range(count)]


def _request(numbers: random.Random, index: int, longest: int, most: int) -> Asked:
    text = " ".join(numbers.choices(WORDS, k=12))[: numbers.randint(1, longest)].strip() or "a"
    options: dict[str, Any] = {"max_tokens": numbers.randint(1, most)}
    if index % 3:  # else greedy
        options |= {"temperature": numbers.choice([0.5, 1.0, 1.5]), "seed": numbers.getrandbits(50)}
        options |= numbers.choice([{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.02}])
    else:
        options["temperature"] = 0.0
    options |= numbers.choice([{}, {"n": 2}, {"stop": ["e", "qu"]}, {"presence_penalty": 1.5}])
    options |= numbers.choice([{}, {}, {"logit_bias": {numbers.randint(5, 90): 4.0}}])
    params = SamplingParams(**options)
    body = options | {"stream": numbers.random() < 0.5}
    if "logit_bias" in body:
        body["logit_bias"] = {str(key): value for key, value in body["logit_bias"].items()}
    top = numbers.choice([None, 0, 3])
    if top is not None:
        params = SamplingParams(**options, logprobs=True, top_logprobs=top)
    if numbers.random() < 0.5:
        if top is not None:
            body |= {"logprobs": True, "top_logprobs": top}
        turns = [{"role": "user", "content": text}]
        return Asked(CHAT, body | {"messages": turns}, turns, params)
    if top is not None:
        body["logprobs"] = top
    prompt = text if numbers.random() < 0.5 else [numbers.randint(5, 200) for _ in range(9)]
    return Asked(COMPLETIONS, body | {"prompt": prompt}, prompt, params)


def expected(llm: LLM, asked: Sequence[Asked]) -> list[list[Choice]]:
    """What the facade makes of requests, of all at once, the last ones first.

    Args:
        llm: the model.
        asked: the requests.
    """
    turned = list(reversed(asked))
    prompts = [llm.chat_prompt(one.prompt) if one.path == CHAT else one.prompt for one in turned]
    completions = llm.generate(prompts, [one.params for one in turned])
    made: list[list[Choice]] = []
    start = 0
    for one in turned:
        some = completions[start : start + one.params.n]
        start += one.params.n
        made.append([_choice(one, completion, llm.tokenizer) for completion in some])
    return made[::-1]


def _choice(one: Asked, completion: Completion, tokenizer: Tokenizer) -> Choice:
    tokens: list[Any] | None = None
    if one.params.logprobs:
        assert completion.logprobs is not None
        assert [item.token_id for item in completion.logprobs] == list(completion.token_ids)
        tokens = [_token(one, item, tokenizer) for item in completion.logprobs]
    return completion.text, completion.finish_reason, tokens


def _token(one: Asked, item: TokenLogprob, tokenizer: Tokenizer) -> tuple[str, float, list[Any]]:
    """A token; a completion's likeliest have the token itself among them, a chat's may not."""
    likely = [(token_name(tokenizer, token_id), logprob) for token_id, logprob in item.top]
    name = token_name(tokenizer, item.token_id)
    if one.path == COMPLETIONS and name not in dict(likely):
        likely.append((name, item.logprob))
    return name, item.logprob, likely


def served(one: Asked, body: bytes) -> list[Choice]:
    """The answer to a request, read as plain JSON or as the events of a stream.

    Args:
        one: the request.
        body: of the answer.
    """
    if not one.body["stream"]:
        choices = json.loads(body)["choices"]
        return [_whole(choice) for choice in choices]
    found: dict[int, Choice] = {}
    for chunk in _events(body):
        for part in chunk["choices"]:
            text, reason, tokens = _whole(part)
            before = found.get(part["index"], ("", "", None))
            together = before[2] if tokens is None else [*(before[2] or []), *tokens]
            found[part["index"]] = before[0] + text, reason or before[1], together
    return [found[index] for index in sorted(found)]


def _events(body: bytes) -> Iterator[Any]:
    *lines, last = [line for line in body.decode().split("\n\n") if line.startswith("data: ")]
    if last != "data: [DONE]":
        raise ValueError(f"the stream ended with {last:.300}")
    yield from (json.loads(line.removeprefix("data: ")) for line in lines)


def _whole(choice: dict[str, Any]) -> Choice:
    said = choice.get("message", choice.get("delta"))
    text = choice["text"] if said is None else said.get("content") or ""
    return text, choice["finish_reason"], _tokens(choice["logprobs"])


def _tokens(logprobs: dict[str, Any] | None) -> list[Any] | None:
    if logprobs is None:
        return None
    if "content" in logprobs:
        return [
            (
                item["token"],
                item["logprob"],
                [(likely["token"], likely["logprob"]) for likely in item["top_logprobs"]],
            )
            for item in logprobs["content"]
        ]
    rows = zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    )
    return [(name, logprob, list(likely.items())) for name, logprob, likely in rows]
