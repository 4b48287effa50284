"""How large a request is, before its prompts are made of tokens."""

from __future__ import annotations

from collections.abc import Mapping

from llama_runtime.errors import CapacityError
from llama_runtime.openai_api import ApiRequest

BYTES_PER_TOKEN = 4  # of most texts


def estimated_tokens(num_bytes: int) -> int:
    """About how many tokens a text of so many bytes has."""
    return -(-num_bytes // BYTES_PER_TOKEN)


def text_bytes(value: object) -> int:
    """The bytes of all texts in what JSON has said, names included."""
    size, left = 0, [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            size += len(one.encode("utf-8", "surrogatepass"))
        elif isinstance(one, Mapping):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple)):
            left += one
    return size


def check_bytes(param: str, value: object, limit: int) -> int:
    """The bytes of a prompt.

    Args:
        param: what it is called.
        value: a text, or messages.
        limit: the most that it may have.

    Raises:
        CapacityError: it has more.
    """
    size = text_bytes(value)
    if size > limit:
        raise CapacityError(
            f"{param} of {size:,} bytes can't be used: {limit:,} are the most that is taken for "
            "the context of this model",
            param=param,
        )
    return size


def check_request(request: ApiRequest, limit: int) -> int:
    """About how many prompt tokens a call has, all samples taken together.

    Args:
        request: the call.
        limit: the most bytes of each prompt.

    Raises:
        CapacityError: one has more.
    """
    if request.kind == "chat":
        given = [*request.messages, request.tools]
        return estimated_tokens(check_bytes("messages", given, limit)) * request.params.n
    tokens = 0
    for number, prompt in enumerate(request.prompts):
        if isinstance(prompt, str):
            param = "prompt" if len(request.prompts) == 1 else f"prompt[{number}]"
            tokens += estimated_tokens(check_bytes(param, prompt, limit))
        else:
            tokens += len(prompt)
    return tokens * request.params.n
