"""OpenAI's API without a server: bodies in, requests of the engine, bodies out.

    request = parse_chat(body, llm.default_params)
    prepared = request.prepared(encoder)
    ...                                     # run prepared.requests, by whatever runs them
    answer_body(prepared, completions, Head("chatcmpl-1", int(time.time()), request.model))

``Chunks`` makes the same answer in pieces, of events as they come.

Everything that is wrong with a body is a ``RequestError`` whose ``param`` is the field's path;
``error_body`` makes any error the body that says so.
"""

from llama_runtime.openai_api.chunks import Chunks
from llama_runtime.openai_api.errors import ModelNotFoundError, error_body
from llama_runtime.openai_api.parsing import parse_chat, parse_completion
from llama_runtime.openai_api.requests import ApiRequest, Prepared
from llama_runtime.openai_api.responses import Head, answer_body, chat_body, completion_body

__all__ = [
    "ApiRequest",
    "Chunks",
    "Head",
    "ModelNotFoundError",
    "Prepared",
    "answer_body",
    "chat_body",
    "completion_body",
    "error_body",
    "parse_chat",
    "parse_completion",
]
