"""What is answered, as JSON schemas for the server's OpenAPI document.

Answers may come to have more fields; the tests hold them to these and no other.
"""

from __future__ import annotations

from llama_runtime.contract import MAX_TOP_LOGPROBS
from llama_runtime.server.metrics import NUM_FINE
from llama_runtime.server.openapi_schema import (
    MAX_INT,
    Schema,
    answer,
    array,
    integer,
    nullable,
    ref,
)
from llama_runtime.server.page_state import MAX_SHOWN

_TEXT: Schema = {"type": "string"}
_COUNT = integer(0, 2**63 - 1)
_SECONDS: Schema = {"type": "number", "minimum": 0}
_LOGPROB: Schema = {"type": "number", "maximum": 0}
_NULL: Schema = {"type": "null"}


def _one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def _head(prefix: str, kind: str) -> dict[str, Schema]:
    return {
        "id": {"type": "string", "pattern": f"^{prefix}-[0-9a-f]+$"},
        "object": {"const": kind},
        "created": _COUNT,
        "model": _TEXT,
        "system_fingerprint": nullable(_TEXT),
    }


def _chat_logprobs() -> Schema:
    entry = {
        "token": _TEXT,
        "logprob": _LOGPROB,
        "bytes": nullable(array(integer(0, 255))),
    }
    found = entry | {"top_logprobs": array(answer(entry), 0, MAX_TOP_LOGPROBS)}
    return nullable(answer({"content": array(answer(found)), "refusal": _NULL}))


def _completion_logprobs() -> Schema:
    top: Schema = {"type": ["object", "null"], "additionalProperties": _LOGPROB}
    return nullable(
        answer(
            {
                "tokens": array(_TEXT),
                "token_logprobs": array(nullable(_LOGPROB)),
                "top_logprobs": array(top),
                "text_offset": array(_COUNT),
            }
        )
    )


def _call(more: dict[str, Schema]) -> Schema:
    function = answer({"name": _TEXT, "arguments": _TEXT})
    return answer(more | {"id": _TEXT, "type": {"const": "function"}, "function": function})


_TOKEN_LENGTHS = _one_of("stop", "length")
_CHAT_ENDS = _one_of("stop", "length", "tool_calls")
_STREAMED_USAGE = nullable(ref("Usage"))

_CHAT_CHOICE = answer(
    {
        "index": _COUNT,
        "message": answer(
            {
                "role": {"const": "assistant"},
                "content": nullable(_TEXT),
                "refusal": _NULL,
            },
            {"tool_calls": array(_call({}), 1)},
        ),
        "logprobs": _chat_logprobs(),
        "finish_reason": _CHAT_ENDS,
    }
)
_CHAT_PART = answer(
    {
        "index": _COUNT,
        "delta": answer(
            {},
            {
                "role": {"const": "assistant"},
                "content": _TEXT,
                "refusal": _NULL,
                "tool_calls": array(_call({"index": _COUNT}), 1),
            },
        ),
        "logprobs": _chat_logprobs(),
        "finish_reason": nullable(_CHAT_ENDS),
    }
)
_COMPLETION_CHOICE = {
    "index": _COUNT,
    "text": _TEXT,
    "logprobs": _completion_logprobs(),
    "finish_reason": _TOKEN_LENGTHS,
}
_MODEL = answer(
    {
        "id": _TEXT,
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": _TEXT,
        "max_model_len": integer(1, MAX_INT, "Tokens of a prompt and its completion."),
    }
)
_DURATIONS = answer(
    {
        "first_bucket": _SECONDS,
        "per_doubling": integer(1, 100),
        "counts": array(_COUNT, NUM_FINE, NUM_FINE),
    }
)
_SHOWN = {"id": _COUNT, "request": _TEXT, "prompt": _COUNT, "age": _SECONDS}
_RUNNING = answer(
    _SHOWN | dict.fromkeys(("slot", "read", "tokens", "max_tokens"), _COUNT),
)
_PAGE_STATE = answer(
    {
        "state": _one_of("loading", "ready", "draining", "stopped", "failed", "engine_hangs"),
        "time": _SECONDS,
    },
    {
        "models": array(_TEXT, 1),
        "chat": {"type": "boolean"},
        **dict.fromkeys(
            (
                *("max_len", "slots", "limit", "num_waiting"),
                *("prompt_tokens", "completion_tokens", "finished"),
            ),
            _COUNT,
        ),
        "running": array(_RUNNING),
        "waiting": array(answer(_SHOWN), 0, MAX_SHOWN),
        "first_token": _DURATIONS,
        "between": _DURATIONS,
    },
)

SCHEMAS: dict[str, Schema] = {
    "Error": answer(
        {
            "error": answer(
                {
                    "message": {"type": "string", "minLength": 1},
                    "type": _one_of(
                        *("invalid_request_error", "rate_limit_error"),
                        *("server_error", "timeout_error"),
                    ),
                    "param": nullable(_TEXT) | {"description": "The path of a field, or a header."},
                    "code": nullable(_TEXT),
                }
            )
        }
    ),
    "Usage": answer(
        {
            **dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _COUNT),
            "prompt_tokens_details": answer({"cached_tokens": _COUNT}),
        }
    ),
    "Completion": answer(
        _head("cmpl", "text_completion")
        | {"choices": array(answer(_COMPLETION_CHOICE), 1), "usage": ref("Usage")}
    ),
    "CompletionChunk": answer(
        _head("cmpl", "text_completion")
        | {
            "choices": array(
                answer(_COMPLETION_CHOICE | {"finish_reason": nullable(_TOKEN_LENGTHS)}), 0, 1
            )
        },
        {"usage": _STREAMED_USAGE},
    ),
    "ChatCompletion": answer(
        _head("chatcmpl", "chat.completion")
        | {"choices": array(_CHAT_CHOICE, 1), "usage": ref("Usage")}
    ),
    "ChatCompletionChunk": answer(
        _head("chatcmpl", "chat.completion.chunk") | {"choices": array(_CHAT_PART, 0, 1)},
        {"usage": _STREAMED_USAGE},
    ),
    "Model": _MODEL,
    "ModelList": answer({"object": {"const": "list"}, "data": array(ref("Model"), 1)}),
    "Tokens": answer(
        {
            "count": _COUNT,
            "max_model_len": integer(1, MAX_INT),
            "tokens": array(integer(0, MAX_INT)),
            "token_strs": nullable(array(_TEXT)),
        }
    ),
    "Text": answer({"prompt": _TEXT}),
    "Status": answer({"status": _one_of("ok", "ready")}),
    "Version": answer({"version": _TEXT}),
    "PageState": _PAGE_STATE,
}
