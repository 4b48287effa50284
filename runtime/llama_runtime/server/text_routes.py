"""The routes that make tokens of text and text of tokens, as vLLM has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from starlette.types import Receive, Scope, Send

from llama_runtime.async_llm import AsyncLLM
from llama_runtime.errors import RequestError
from llama_runtime.openai_api.fields import Fields
from llama_runtime.openai_api.logprobs import token_name
from llama_runtime.openai_api.parsing import take_messages
from llama_runtime.server.connection import parse_json, read_body, while_connected
from llama_runtime.server.service import Service
from llama_runtime.server.shell import JsonResponse
from llama_runtime.server.sizes import check_bytes
from llama_runtime.tokenizer import Tokenizer

Work = Callable[[Service, AsyncLLM, Fields], Mapping[str, object]]


class TextRoute:
    """A route, as an ASGI application.

    Args:
        service: what all routes share.
        work: reads a body and answers it, in a thread.
    """

    def __init__(self, service: Service, work: Work) -> None:
        self._service = service
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        llm = self._service.llm
        data = await read_body(scope, receive, self._service.settings, self._service.bodies)
        async with while_connected(receive):
            with self._service.gate.enter(llm, len(data)) as place:
                body = await place.run(partial(self._answer, llm, data))
        await JsonResponse(body)(scope, receive, send)

    def _answer(self, llm: AsyncLLM, data: bytes) -> Mapping[str, object]:
        fields = Fields(parse_json(data))
        model = fields.text("model")
        if model is not None:
            self._service.check_model(model)
        return self._work(self._service, llm, fields)


def tokenize(service: Service, llm: AsyncLLM, fields: Fields) -> Mapping[str, object]:
    """``/tokenize``: a prompt, or messages as the chat template lays them out, to token ids.

    Raises:
        RequestError: the body is wrong.
    """
    prompt, messages = fields.text("prompt"), fields.take("messages")
    if (prompt is None) == (messages is None):
        raise RequestError("the body must have a prompt or messages, not both", param="prompt")
    with_names = bool(fields.flag("return_token_strs"))
    if prompt is not None:
        check_bytes("prompt", prompt, service.max_prompt_bytes)
        opens = fields.flag("add_special_tokens")
        fields.refuse((), {})
        tokenizer = llm.tokenizer
        encode = tokenizer.encode_templated if opens is False else tokenizer.encode
        token_ids = encode(prompt)
    else:
        token_ids = _tokens_of_chat(service, llm, messages, fields)
    return {
        "count": len(token_ids),
        "max_model_len": llm.max_len,
        "tokens": token_ids,
        "token_strs": [token_name(llm.tokenizer, i) for i in token_ids] if with_names else None,
    }


def _tokens_of_chat(service: Service, llm: AsyncLLM, messages: object, fields: Fields) -> list[int]:
    opens_turn, tools = fields.flag("add_generation_prompt"), fields.take("tools")
    fields.only("add_special_tokens", False, "the template writes its own; leave it out")
    fields.refuse((), {})
    turns = take_messages(Fields({"messages": messages}))
    check_bytes("messages", [*turns, tools], service.max_prompt_bytes)
    return llm.encoder.encode_chat(
        turns, llm.encoder.tool_use(tools), add_generation_prompt=opens_turn is not False
    )


def detokenize(_service: Service, llm: AsyncLLM, fields: Fields) -> Mapping[str, object]:
    """``/detokenize``: token ids to text, in which special tokens are spelled out.

    Raises:
        RequestError: the body is wrong.
    """
    tokens = fields.need("tokens")
    fields.refuse((), {})
    size = llm.bundle.manifest.geometry.vocab_size
    if not isinstance(tokens, list):
        raise RequestError("tokens must be a list of token ids", param="tokens")
    for index, one in enumerate(tokens):
        if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < size:
            raise RequestError(
                f"tokens[{index}] must be a token id, 0 to {size - 1}, not {one!r:.80}",
                param=f"tokens[{index}]",
            )
    return {"prompt": _spelled(llm.tokenizer, tokens)}


def _spelled(tokenizer: Tokenizer, tokens: list[int]) -> str:
    special = tokenizer.special_texts
    parts = (
        special[one].encode() if one in special else tokenizer.token_bytes(one) for one in tokens
    )
    return b"".join(parts).decode("utf-8", "replace")
