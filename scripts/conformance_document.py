"""The server's OpenAPI document, changed so that a check of a server against it is a strict one."""

from __future__ import annotations

import copy
from typing import Any

from llama_runtime.server.openapi_answers import SCHEMAS as ANSWERS

Document = dict[str, Any]

MAX_TOKENS = 6  # of what narrowed documents ask for
_NOT_BOTH = ("best_of", "stream_options", "top_logprobs", "cache_salt", "tool_choice")
_TEXT = {"type": "string", "minLength": 1, "maxLength": 12}


def closed(document: Document) -> Document:
    """A copy in which an answer has no field that isn't named there."""
    made = copy.deepcopy(document)
    for name in ANSWERS:
        _close(made["components"]["schemas"][name])
    return made


def narrowed(document: Document, model: str, vocab_size: int) -> Document:
    """A copy that allows less: what a small model answers soon, and seldom refuses.

    Args:
        document: the server's.
        model: the name to ask for.
        vocab_size: of the model.
    """
    made = copy.deepcopy(document)
    schemas = made["components"]["schemas"]
    token_id = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    fields: dict[str, Any] = {
        "model": {"const": model},
        "n": {"enum": [1, 2]},
        "max_tokens": {"enum": [4, MAX_TOKENS]},
        "max_completion_tokens": {"type": "null"},
        "min_tokens": {"enum": [0, None]},
        "ignore_eos": {"enum": [False, None]},
        "stop_token_ids": {"type": "array", "items": token_id, "maxItems": 3},
        "logit_bias": {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        "prompt": {
            "anyOf": [
                _TEXT,
                {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 2},
                {"type": "array", "items": token_id, "minItems": 1, "maxItems": 4},
            ]
        },
        "response_format": {"enum": [None, {"type": "text"}, {"type": "json_object"}]},
        "structured_outputs": {"enum": [None, {}]},
        **{name: {"type": "null"} for name in _NOT_BOTH},
    }
    for name in ("CompletionRequest", "ChatCompletionRequest"):
        properties = schemas[name]["properties"]
        properties.update({key: value for key, value in fields.items() if key in properties})
    for one in schemas["TokenizeRequest"]["anyOf"]:
        one["properties"]["model"] = {"enum": [model, None]}
    detokenize = schemas["DetokenizeRequest"]["properties"]
    detokenize["model"] = {"enum": [model, None]}
    detokenize["tokens"]["items"] = token_id
    schemas["Message"] = {
        "type": "object",
        "properties": {"role": {"enum": ["user", "assistant"]}, "content": _TEXT},
        "required": ["role", "content"],
        "additionalProperties": False,
    }
    made["paths"]["/v1/models/{name}"]["parameters"][0]["schema"] = {"const": model}
    return made


def _close(schema: Any) -> None:
    if isinstance(schema, list):
        for one in schema:
            _close(one)
    elif isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict):
            schema["additionalProperties"] = False
        for one in schema.values():
            _close(one)
