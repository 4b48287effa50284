"""The server's document says what its parsers take, what its routes answer, and no more."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import openapi_spec_validator
import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from llama_runtime.bundle import open_bundle
from llama_runtime.errors import CapacityError, RequestError
from llama_runtime.openai_api import parse_chat, parse_completion
from llama_runtime.openai_api.fields import Fields
from llama_runtime.params import SamplingParams
from llama_runtime.prompt_encoder import PromptEncoder
from llama_runtime.server import ServerSettings
from llama_runtime.server.app import app_of
from llama_runtime.server.openapi import openapi_document
from llama_runtime.server.service import Service
from llama_runtime.server.shell import OPEN_PATHS
from llama_runtime.server.text_routes import detokenize, tokenize
from tests.runtime.server.serving import HELLO, Serving

DOCUMENT: dict[str, Any] = json.loads(json.dumps(openapi_document(has_keys=True)))
COMPONENTS = DOCUMENT["components"]
FUNCTION = {"name": "look", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
HELD = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
CHAT: dict[str, Any] = {"model": "m", "messages": HELLO}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "Hello"}
LONGEST = 2**31 - 1


def schema_of(*path: str) -> dict[str, Any]:
    """The schema of a field, by the names that lead to it from one of the components."""
    name, *keys = path
    found = COMPONENTS["schemas"][name]
    for key in keys:
        found = found["properties"][key]
    return {**found, "components": COMPONENTS}


def test_the_document_is_one_of_openapi() -> None:
    assert DOCUMENT["openapi"] == "3.1.0"
    openapi_spec_validator.validate(DOCUMENT)
    assert "security" in DOCUMENT
    assert "security" not in openapi_document(has_keys=False)


def test_every_route_is_in_it_and_no_other(server: Serving) -> None:
    assert server.get("/openapi.json").json() == json.loads(
        json.dumps(openapi_document(has_keys=False))
    )
    routes = {
        (method.lower(), route.path.replace(":path}", "}"))
        for route in app_of(server.service).routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    operations = {
        (method, path): operation
        for path, item in DOCUMENT["paths"].items()
        for method, operation in item.items()
        if method != "parameters"
    }
    assert set(operations) == routes
    for (_, path), operation in operations.items():
        assert (operation.get("security") == []) is (path in OPEN_PATHS)
        assert ("401" in operation["responses"]) is (path not in OPEN_PATHS)
        for status, answer in operation["responses"].items():
            error = {"schema": {"$ref": "#/components/schemas/Error"}}
            assert status == "200" or answer["content"] == {"application/json": error}


def test_it_is_there_while_the_model_loads() -> None:
    with TestClient(app_of(Service(ServerSettings(api_keys=("key",))))) as client:
        assert client.get("/openapi.json").status_code == 401
        answer = client.get("/openapi.json", headers={"Authorization": "Bearer key"})
        assert answer.json() == DOCUMENT


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, set[str]]:
    """The fields that are looked for while a test runs, by the path of their object."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    take, refuse = Fields.take, Fields.refuse

    def noted_take(self: Fields, key: str) -> Any:
        found[self._path].add(key)
        return take(self, key)

    def noted_refuse(self: Fields, unsupported: Collection[str], advice: Mapping[str, str]) -> None:
        found[self._path].update(unsupported)
        refuse(self, unsupported, advice)

    monkeypatch.setattr(Fields, "take", noted_take)
    monkeypatch.setattr(Fields, "refuse", noted_refuse)
    return found


def test_every_field_that_is_read_is_in_it_and_no_other(
    known: Mapping[str, set[str]], server: Serving
) -> None:
    nested = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "response_format": HELD,
        "structured_outputs": {},
    }
    parse_chat(CHAT | nested, SamplingParams())
    objects = {
        "": ("ChatCompletionRequest",),
        "messages[0]": ("Message",),
        "stream_options": ("StreamOptions",),
        "structured_outputs": ("StructuredOutputs",),
        "response_format.json_schema": ("NamedSchema",),
    }
    for path, names in objects.items():
        assert known[path] == set(schema_of(*names)["properties"]), path
    held = COMPONENTS["schemas"]["ResponseFormat"]["anyOf"]
    assert known["response_format"] == {name for one in held for name in one["properties"]}
    schemas = COMPONENTS["schemas"]
    of_text, of_chat = schemas["TokenizeRequest"]["anyOf"]
    service, llm = server.service, server.llm
    reads: list[tuple[dict[str, Any], Callable[[], object]]] = [
        (schemas["CompletionRequest"], lambda: parse_completion(COMPLETION, SamplingParams())),
        (of_text, lambda: tokenize(service, llm, Fields({"prompt": "a"}))),
        (of_chat, lambda: tokenize(service, llm, Fields({"messages": HELLO}))),
        (schemas["DetokenizeRequest"], lambda: detokenize(service, llm, Fields({"tokens": []}))),
    ]
    for schema, read in reads:
        known[""].clear()
        read()
        taken_before = set() if schema is schemas["CompletionRequest"] else {"model"}
        assert known[""] | taken_before == set(schema["properties"])


TYPES: list[Any] = [None, True, False, 0, 1, 1.5, "", "a", [], ["a"], {}, {"a": 1}]
NUMBERS: list[Any] = [-1, -0.5, 0.5, 2, -2, 2.5, -2.5, 20, 21, 100, 101, -100, -101, 100.5]
NUMBERS += [128, 129, 0.01, 0.005, LONGEST, LONGEST + 1, 2**64 - 1, 2**64]
TEXTS: list[Any] = ["x" * count for count in (16, 64, 65, 256, 257, 65_536, 65_537)]
TEXTS += ["auto", "none", "flex", "a b", "text"]
LISTS: list[Any] = [[""], ["a"] * 16, ["a"] * 17, ["a"] * 1024, ["a"] * 1025, ["x" * 257]]
LISTS += [
    ["text"],
    [0],
    [-1],
    [LONGEST],
    [LONGEST + 1],
    [1.5],
    [[1], "a"],
    [[]],
    [True],
    ["a"] * 2049,
]
OBJECTS: list[Any] = [{"5": 1}, {"05": 1}, {"5": 101}, {"5": "a"}, {str(i): 1 for i in range(1025)}]
OBJECTS += [
    HELD,
    {"type": "text"},
    {"type": "json_object"},
    {"type": "xml"},
    {"type": "json_schema"},
]
OBJECTS += [{"type": "function", "function": {"name": "look"}}, {"type": "function"}, TOOLS * 2]
OBJECTS += [TOOLS, [{"type": "function", "function": {"name": "a b"}}], {"include_usage": 1}]
OBJECTS += [[{"type": "function", "function": FUNCTION | {"name": f"f{i}"}} for i in range(129)]]
OBJECTS += [HELLO, [*HELLO, {}], [{"type": "text", "text": "a"}], [{"type": "text"}]]
OBJECTS += [[CALL], [{"id": "a"}], [{"function": {"name": "a", "arguments": {}}}]]
POOL = [*TYPES, *NUMBERS, *TEXTS, *LISTS, *OBJECTS]

# What a field needs beside it.
BESIDE: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True},
    "stream_options": {"stream": True},
    "min_tokens": {"max_tokens": LONGEST},
    "max_tokens": {"echo": True},
    "tool_choice": {"tools": TOOLS},
}
# What a schema can't say: that a field goes with others, or what a text in it has to be.
BEYOND: dict[str, list[Any]] = {
    "best_of": [2, 20, 21, 100, 101, 128],
    "tools": [TOOLS * 2],
    "structured_outputs.json": [one for one in [*TYPES, *TEXTS] if isinstance(one, str)],
    "messages.role": ["a", "a b"],  # a part of a control token; no word
    "messages.content": [None],
}


def agree(path: str, schema: dict[str, Any], accepts: Callable[[Any], bool]) -> None:
    """Of all values, those that a schema allows are those that are taken."""
    validator = jsonschema.Draft202012Validator(schema)
    allowed = 0
    for value in POOL:
        if value in BEYOND.get(path, []) and type(value) is not bool:
            continue
        is_valid = validator.is_valid(value)
        assert accepts(value) is is_valid, f"{path}: {str(value)[:90]}, valid: {is_valid}"
        allowed += is_valid
    assert allowed, path


@pytest.fixture(scope="module")
def encoder(roomy: Path) -> PromptEncoder:
    return PromptEncoder(open_bundle(roomy))


EMPTY = "the prompt is empty: it has no tokens"


def taken(parse: Any, body: dict[str, Any], encoder: PromptEncoder) -> bool:
    try:
        prepared = parse(body, SamplingParams(max_tokens=4)).prepared(encoder)
    except CapacityError:
        return True  # of the model, of which the document knows nothing
    except RequestError as error:
        return str(error) == EMPTY  # which is said of a text
    ids: list[int] = [token_id for prompt in prepared.prompts for token_id in prompt]
    return min(ids) >= 0 and max(ids) <= LONGEST  # others are the engine's to refuse


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_what_a_field_may_be_is_what_is_taken(kind: str, encoder: PromptEncoder) -> None:
    parse: Any = parse_chat if kind == "chat" else parse_completion
    least = CHAT if kind == "chat" else COMPLETION
    name = "ChatCompletionRequest" if kind == "chat" else "CompletionRequest"
    of_chats = COMPONENTS["schemas"]["ChatCompletionRequest"]["properties"]
    for field, schema in COMPONENTS["schemas"][name]["properties"].items():
        if kind == "completion" and of_chats.get(field) == schema:
            continue  # and is read by the same functions
        beside = BESIDE.get(field, {}) if (kind, field) != ("chat", "max_tokens") else {}
        agree(
            field,
            schema_of(name, field),
            lambda value, field=field, beside=beside: taken(  # type: ignore[misc]
                parse, {**least, **beside, field: value}, encoder
            ),
        )


@pytest.mark.parametrize(
    ("path", "place"),
    [
        *((("StreamOptions", key), "stream_options") for key in ("include_usage",)),
        *((("StreamOptions", key), "stream_options") for key in ("include_obfuscation",)),
        *(
            (("StructuredOutputs", key), "structured_outputs")
            for key in ("json", "json_object", "regex", "choice", "grammar")
        ),
        *(
            (("NamedSchema", key), "json_schema")
            for key in ("name", "schema", "description", "strict")
        ),
        *(
            (("Message", key), "messages")
            for key in ("role", "content", "name", "tool_calls", "tool_call_id", "refusal")
        ),
    ],
)
def test_what_a_field_of_a_field_may_be_is_what_is_taken(
    path: tuple[str, str], place: str, encoder: PromptEncoder
) -> None:
    key = path[1]

    def body(value: Any) -> dict[str, Any]:
        if place == "messages":
            turn = {"role": "assistant", "content": "a", key: value}
            return CHAT | {"messages": [turn]}
        if place == "json_schema":
            held = HELD["json_schema"] | {key: value}  # type: ignore[operator]
            return CHAT | {"response_format": HELD | {"json_schema": held}}
        return CHAT | {"stream": True, place: {key: value}}

    agree(f"{place}.{key}", schema_of(*path), lambda value: taken(parse_chat, body(value), encoder))
