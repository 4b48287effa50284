"""What the grammar of calls lets through are calls of the tools, with arguments they can take.

Random walks over the real tokenizer draw any token that the masks allow, so they try what no model
would write.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, get_args

import jsonschema
import llguidance
import numpy as np
import pytest

from llama_decoder.gguf_file import GgufWeights
from llama_export.gguf_tokenizer import read_gguf_tokenizer
from llama_runtime.errors import RequestError
from llama_runtime.tool_calls import parse_tool_calls
from llama_runtime.tool_grammar import tool_grammar
from llama_runtime.tools import Tool, ToolDialect, check_tools

DIALECTS: tuple[ToolDialect, ...] = get_args(ToolDialect)
END = 2  # <|im_end|>
MOST_TOKENS = 300

NODE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
    "required": ["value"],
    "additionalProperties": False,
}
PARAMETERS: dict[str, Any] = {
    "get": {"properties": {"city": {"type": "string", "maxLength": 6}}, "required": ["city"]},
    "get_weather": {
        "type": "object",
        "properties": {
            "unit": {"enum": ["celsius", 'a "quoted" one', "Grad é"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "when": {"type": ["string", "null"], "format": "date"},
        },
        "required": ["unit", "days"],
    },
    "tree": {
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/node"}},
        "required": ["root"],
        "$defs": {"node": NODE},
    },
    "tree2": {  # the same name stands for something else
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/node"}},
        "required": ["root"],
        "$defs": {"node": {"enum": ["leaf"]}},
    },
    "itself": {
        "type": "object",
        "properties": {"inner": {"$ref": "#"}, "n": {"type": "boolean"}},
        "required": ["n"],
        "additionalProperties": False,
    },
    "either": {
        "anyOf": [
            {"properties": {"id": {"type": "integer"}}, "required": ["id"]},
            {"properties": {"key": {"const": "</tool_call>"}}, "required": ["key"]},
        ],
    },
    "list": {
        "type": "object",
        "properties": {"items": {"type": "array", "items": {"enum": [1, 2.5, None]}}},
        "additionalProperties": {"type": "boolean"},
        "required": ["items"],
    },
    "nothing": None,
    "anything": {"type": "object"},
}


def tools_of(**parameters: Any) -> tuple[Tool, ...]:
    return check_tools(
        [
            {"type": "function", "function": {"name": name, "parameters": schema}}
            for name, schema in parameters.items()
        ]
    )


TOOLS = tools_of(**PARAMETERS)


@pytest.fixture(scope="module")
def tokenizer(real_gguf: Path) -> llguidance.LLTokenizer:
    source = read_gguf_tokenizer(GgufWeights(real_gguf).metadata)
    return llguidance.LLTokenizer(source.tokenizer_json.decode("utf-8"), eos_token=END)


class Walks:
    """Random texts of one grammar."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, grammar: str | None) -> None:
        assert grammar is not None
        self._tokenizer = tokenizer
        self._start = llguidance.LLMatcher(
            tokenizer, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0
        )
        assert not self._start.is_error(), self._start.get_error()
        assert not self._start.get_grammar_warnings()

    def texts(self, count: int) -> list[str]:
        """Those of so many walks that ended; each prefers to end, and then what closes JSON."""
        walked = [self._walk(random.Random(seed)) for seed in range(count)]
        return [text for text in walked if text is not None]

    def _walk(self, draw: random.Random) -> str | None:
        matcher = self._start.deep_copy()
        token_ids: list[int] = []
        while not matcher.is_stopped():
            if len(token_ids) == MOST_TOKENS:
                return None
            bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
            assert len(allowed) > 0
            if END in allowed and draw.random() < 0.7:
                break
            if END in allowed and len(allowed) > 1:
                allowed = allowed[allowed != END]
            token_id = int(draw.choice(self._closing(allowed, draw)))
            assert matcher.consume_token(token_id)
            token_ids.append(token_id)
        return self._tokenizer.decode_str(token_ids)

    def _closing(self, allowed: Any, draw: random.Random) -> Any:
        if len(allowed) < 100 or draw.random() < 0.6:
            return allowed
        closing = np.intersect1d(allowed, [self._tokenizer.tokenize_str(c)[0] for c in '"}]'])
        return closing if len(closing) else allowed


def check(text: str, dialect: ToolDialect, tools: tuple[Tool, ...]) -> list[str]:
    """Read it back; return the names called."""
    read = parse_tool_calls(text, dialect, tools)
    assert read.content is None, text
    assert read.tool_calls, text
    schemas = {tool.name: tool.parameters for tool in tools}
    for call in read.tool_calls:
        assert call.arguments in text
        jsonschema.validate(
            json.loads(call.arguments),
            schemas[call.name],
            jsonschema.Draft202012Validator,
            format_checker=jsonschema.FormatChecker(),
        )
    return [call.name for call in read.tool_calls]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_required_gives_one_call_of_any_tool(
    tokenizer: llguidance.LLTokenizer, dialect: ToolDialect
) -> None:
    texts = Walks(tokenizer, tool_grammar(TOOLS, "required", dialect)).texts(60)
    assert len(texts) >= 45
    called = [check(text, dialect, TOOLS) for text in texts]
    assert all(len(names) == 1 for names in called)
    assert len({names[0] for names in called}) >= 6


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_named_tool_is_the_one_that_is_called(
    tokenizer: llguidance.LLTokenizer, dialect: ToolDialect, name: str
) -> None:
    choice = {"type": "function", "function": {"name": name}}
    texts = Walks(tokenizer, tool_grammar(TOOLS, choice, dialect)).texts(8)
    assert len(texts) >= 4
    for text in texts:
        assert check(text, dialect, TOOLS) == [name]


def accepts(tokenizer: llguidance.LLTokenizer, grammar: str | None, text: str) -> bool:
    assert grammar is not None
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(grammar))
    token_ids = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


@pytest.mark.parametrize("name", ["nothing", "get", "tree"])
def test_arguments_that_the_tool_does_not_have_are_not_made_up(
    tokenizer: llguidance.LLTokenizer, name: str
) -> None:
    grammar = tool_grammar(TOOLS, "required", "llama3_json")
    whole: dict[str, dict[str, Any]] = {
        "nothing": {},
        "get": {"city": "Rome"},
        "tree": {"root": {"value": 1}},
    }
    given = whole[name]
    for arguments, is_taken in ((given, True), ({**given, "other": 1}, False)):
        call = json.dumps({"name": name, "parameters": arguments})
        assert accepts(tokenizer, grammar, call) is is_taken


def test_arguments_that_the_schema_allows_by_other_means_stay_allowed(
    tokenizer: llguidance.LLTokenizer,
) -> None:
    for schema, arguments in (
        ({"type": "object"}, {"x": 1}),
        ({"properties": {"a": {}}, "additionalProperties": True}, {"x": 1}),
        ({"properties": {"a": {}}, "patternProperties": {"^x": {}}}, {"x": 1}),
        ({"properties": {"a": {}}, "allOf": [{"required": ["x"]}]}, {"x": 1}),
        ({"properties": {"a": {}}, "required": ["x"]}, {"x": 1}),
    ):
        grammar = tool_grammar(tools_of(t=schema), "required", "hermes")
        call = json.dumps({"name": "t", "arguments": arguments})
        assert accepts(tokenizer, grammar, f"<tool_call>\n{call}\n</tool_call>"), schema


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"x-guidance": {"lenient": True}}, "x-guidance"),
        ({"properties": {"a": {"items": {"x-guidance": {"item_separator": ";"}}}}}, "x-guidance"),
        ({"properties": {"a": {"const": 2**53 + 7}}}, "const"),
        ({"additionalProperties": True, "minProperties": 3}, "minProperties"),
    ],
)
def test_rules_that_would_not_be_kept_are_refused_by_the_name_of_the_tool(
    rule: dict[str, Any], said: str
) -> None:
    with pytest.raises(RequestError, match=f"the tool 't' can't be enforced: {said}") as refusal:
        tool_grammar(tools_of(t=rule), "required", "hermes")
    assert refusal.value.param == "tools"


def test_nobody_is_bound_where_the_model_decides() -> None:
    for choice in ("auto", "none"):
        assert tool_grammar(TOOLS, choice, "hermes") is None
    with pytest.raises(RequestError, match="isn't among the tools"):
        tool_grammar(TOOLS, {"type": "function", "function": {"name": "x"}}, "hermes")
