"""Bodies of requests as JSON schemas: each field that is read, with its bounds, and no other.

The names of schemas are those of ``components.schemas`` in the server's OpenAPI document. A test
holds them against the modules that read bodies. What no schema can say (a prompt that is too long
for the context, a field that needs another one beside it) is in descriptions.
"""

from __future__ import annotations

from llama_runtime.constraints import MAX_CHOICES, MAX_CONSTRAINT_BYTES
from llama_runtime.contract import MAX_TOP_LOGPROBS
from llama_runtime.conversation import MAX_ROLE_CHARACTERS
from llama_runtime.openai_api.parsing import (
    DEFAULT_COMPLETION_TOKENS,
    MAX_PROMPTS,
    UNSUPPORTED_CHAT,
    UNSUPPORTED_MESSAGE,
)
from llama_runtime.params import (
    MAX_BIASED,
    MAX_NAME_CHARACTERS,
    MAX_PRIORITY,
    MAX_SAMPLES,
    MAX_SEED,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
)
from llama_runtime.server.openapi_schema import (
    MAX_INT,
    Schema,
    array,
    integer,
    nullable,
    number,
    only,
    record,
    ref,
    unsupported,
)
from llama_runtime.tools import MAX_TOOLS

_NAME_PATTERN = "^[A-Za-z0-9_-]{1,64}$"
_BOOLEAN: Schema = {"type": "boolean"}
_TEXT: Schema = {"type": "string"}
_OBJECT: Schema = {"type": "object"}
_STOP_TEXT: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
_CONSTRAINT: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_CONSTRAINT_BYTES}
_TOKEN_IDS = array(integer(0, MAX_INT), 1)

_SAMPLING: dict[str, Schema] = {
    "temperature": number(0, 100),
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "n": integer(1, MAX_SAMPLES),
    "stop": {"anyOf": [_STOP_TEXT, array(_STOP_TEXT, 0, MAX_STOPS)]},
    "seed": integer(0, MAX_SEED),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
        "additionalProperties": number(-100, 100),
        "maxProperties": MAX_BIASED,
        "description": "Token ids and what is added to their logits.",
    },
    "min_p": number(0, 1),
    "repetition_penalty": number(0.01, 100),
    "min_tokens": integer(0, MAX_INT),
    "ignore_eos": _BOOLEAN,
    "stop_token_ids": array(integer(0, MAX_INT)),
    "priority": integer(-MAX_PRIORITY, MAX_PRIORITY),
    "cache_salt": {"type": "string", "maxLength": MAX_NAME_CHARACTERS},
    "top_k": integer(-1, MAX_INT, "0 and -1 turn it off."),
    "include_stop_str_in_output": _BOOLEAN,
    "response_format": ref("ResponseFormat"),
    "structured_outputs": ref("StructuredOutputs"),
    "stream": _BOOLEAN,
    "stream_options": ref("StreamOptions") | {"description": "Needs stream to be true."},
    "user": {"type": "string", "description": "Has no effect."},
    "metadata": {"type": "object", "description": "Has no effect."},
    "store": only(False, "Nothing is kept."),
    "service_tier": only("auto", "There is one for all."),
}

_COMPLETION = record(
    {
        "model": _TEXT,
        "prompt": {
            "anyOf": [
                _TEXT,
                _TOKEN_IDS,
                array({"anyOf": [_TEXT, _TOKEN_IDS]}, 1, MAX_PROMPTS),
            ],
            "description": "A text, token ids, or a list of either.",
        },
    },
    _SAMPLING
    | {
        "max_tokens": integer(
            0, MAX_INT, f"{DEFAULT_COMPLETION_TOKENS} if left out; 0 with echo only."
        ),
        "echo": _BOOLEAN,
        "logprobs": integer(0, MAX_TOP_LOGPROBS),
        "best_of": integer(1, MAX_SAMPLES, "Can only be n."),
        "suffix": unsupported(),
    },
)

_CHAT = record(
    {"model": _TEXT, "messages": array(ref("Message"), 1)},
    _SAMPLING
    | {
        "max_tokens": integer(1, MAX_INT),
        "max_completion_tokens": integer(1, MAX_INT, "A newer name of max_tokens."),
        "logprobs": _BOOLEAN,
        "top_logprobs": integer(0, MAX_TOP_LOGPROBS, "Needs logprobs to be true."),
        "tools": array(ref("Tool"), 1, MAX_TOOLS),
        "tool_choice": ref("ToolChoice"),
        "parallel_tool_calls": _BOOLEAN
        | {"description": "Can be false only where tool_choice asks for a call."},
        "modalities": only(["text"], "Text is all that comes out."),
        **{name: unsupported() for name in UNSUPPORTED_CHAT},
    },
)

_CALL: Schema = {  # other fields may come along, as clients send answers back
    "type": "object",
    "properties": {
        "id": _TEXT,
        "function": {
            "type": "object",
            "properties": {
                "name": _TEXT,
                "arguments": {
                    "anyOf": [_TEXT, _OBJECT],
                    "description": "An object, or an object as JSON text.",
                },
            },
            "required": ["name", "arguments"],
        },
    },
    "required": ["function"],
}

_MESSAGE = record(
    {"role": {"type": "string", "minLength": 1, "maxLength": MAX_ROLE_CHARACTERS}},
    {
        "content": {
            "anyOf": [_TEXT, array(ref("TextPart"), 1)],
            "description": "Needed where there are no tool_calls.",
        },
        "name": _TEXT,
        "tool_calls": array(_CALL) | {"description": "Of the assistant only."},
        "tool_call_id": _TEXT,
        **{name: unsupported() for name in UNSUPPORTED_MESSAGE},
    },
)

_TOOL: Schema = {  # the template shows all of it to the model, other fields too
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": _NAME_PATTERN},
                "description": nullable(_TEXT),
                "parameters": {
                    "type": ["object", "null"],
                    "properties": {
                        "type": {"const": "object"},
                        "properties": _OBJECT,
                        "required": array(_TEXT),
                    },
                    "description": "The JSON schema of the arguments.",
                },
                "strict": nullable(_BOOLEAN),
            },
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}

_CHAT_TOKENS = record(
    {"messages": array(ref("Message"), 1)},
    {
        "model": _TEXT,
        "prompt": {"type": "null"},
        "tools": array(ref("Tool"), 1, MAX_TOOLS),
        "add_generation_prompt": _BOOLEAN,
        "add_special_tokens": only(False, "The template writes its own."),
        "return_token_strs": _BOOLEAN,
    },
)

SCHEMAS: dict[str, Schema] = {
    "CompletionRequest": _COMPLETION,
    "ChatCompletionRequest": _CHAT,
    "Message": _MESSAGE,
    "TextPart": {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": _TEXT},
        "required": ["type", "text"],
        "additionalProperties": False,
    },
    "Tool": _TOOL,
    "ToolChoice": {
        "anyOf": [
            {"enum": ["auto", "none", "required"]},
            {
                "type": "object",
                "properties": {
                    "type": {"const": "function"},
                    "function": {
                        "type": "object",
                        "properties": {"name": _TEXT},
                        "required": ["name"],
                    },
                },
                "required": ["type", "function"],
            },
        ]
    },
    "StreamOptions": record(
        {},
        {"include_usage": _BOOLEAN, "include_obfuscation": only(False, "Nothing is added.")},
    ),
    "ResponseFormat": {
        "anyOf": [
            record({"type": {"enum": ["text", "json_object"]}}, {}),
            record({"type": {"const": "json_schema"}, "json_schema": ref("NamedSchema")}, {}),
        ]
    },
    "NamedSchema": record(
        {"name": {"type": "string", "pattern": _NAME_PATTERN}, "schema": _OBJECT},
        {"description": _TEXT, "strict": _BOOLEAN},
    ),
    "StructuredOutputs": record(
        {},
        {
            "json": {"anyOf": [_OBJECT, {"const": True}, _CONSTRAINT]},
            "json_object": _BOOLEAN,
            "regex": _CONSTRAINT,
            "choice": array(_CONSTRAINT, 1, MAX_CHOICES),
            "grammar": _CONSTRAINT,
        },
    )
    | {"description": "One of them, and not beside a response_format."},
    "TokenizeRequest": {
        "anyOf": [
            record(
                {"prompt": _TEXT},
                {
                    "model": _TEXT,
                    "messages": {"type": "null"},
                    "add_special_tokens": _BOOLEAN,
                    "return_token_strs": _BOOLEAN,
                },
            ),
            _CHAT_TOKENS,
        ]
    },
    "DetokenizeRequest": record({"tokens": array(integer(0, MAX_INT))}, {"model": _TEXT}),
}
