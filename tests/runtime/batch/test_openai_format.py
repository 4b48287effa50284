"""Rows of OpenAI's Batch API: their results have its shape, and errors lie apart, in order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion as OpenaiCompletion
from openai.types.chat import ChatCompletion

from llama_runtime.batch.forms.openai_format import OpenAiFormat
from llama_runtime.llm import LLM
from llama_runtime.params import SamplingParams, row_seed
from tests.runtime.batch.jobs import Given, recipe_of, records_of, results_in, run_job
from tests.runtime.conftest import write_roomy_bundle

TURNS = [{"role": "user", "content": "Hello"}]
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": NOTHING}}]


@pytest.fixture
def llm(fake_backend: None, tmp_path: Path) -> Iterator[LLM]:
    """A fake one with room for tools."""
    bundle = write_roomy_bundle(tmp_path / "roomy_bundle")
    with LLM(bundle, max_batch=4, max_len=2048, threads=1) as loaded:
        yield loaded


def row(custom_id: Any, kind: str = "chat", **body: Any) -> dict[str, Any]:
    url = {"chat": "/v1/chat/completions", "text": "/v1/completions"}[kind]
    asked = {"messages": TURNS} if kind == "chat" else {"prompt": "Hello"}
    body = {"model": "fake-llama", **asked, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def run(
    llm: LLM, rows: list[Given], folder: Path, **options: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The results, and the errors."""
    paths = [folder / "out.jsonl", folder / "out.errors.jsonl"]
    for path in paths:
        path.unlink(missing_ok=True)
    options = {"max_tokens": 24, "seed": 0, **options}
    form = OpenAiFormat(recipe_of(llm, None, **options), options)
    run_job(llm, rows, paths[0], form=form, errors=paths[1])
    results, errors = (results_in(path) if path.exists() else [] for path in paths)
    return results, errors


def body_of(line: dict[str, Any]) -> dict[str, Any]:
    """The answer of a line that has the shape of the API."""
    assert list(line) == ["id", "custom_id", "response", "error"]
    assert list(line["response"]) == ["status_code", "request_id", "body"]
    assert line["id"].startswith("batch_req_")
    assert line["response"]["request_id"]
    assert (line["response"]["status_code"] == 200) is (line["error"] is None)
    body: dict[str, Any] = line["response"]["body"]
    return body


def test_an_answer_is_that_of_the_chat_and_the_package_reads_it(llm: LLM, tmp_path: Path) -> None:
    rows = [row(f"n{i}", messages=[{"role": "user", "content": f"Hi {i}"}]) for i in range(6)]
    found, errors = run(llm, [*rows], tmp_path)
    assert [line["custom_id"] for line in found] == [f"n{i}" for i in range(6)]
    assert errors == []
    for index, line in enumerate(found):
        answer = ChatCompletion.model_validate(body_of(line), strict=True)
        messages = [{"role": "user", "content": f"Hi {index}"}]
        (alone,) = llm.chat(messages, SamplingParams(max_tokens=24))
        assert answer.choices[0].message.content == alone.text
        assert answer.model == "fake-llama"
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == alone.num_prompt_tokens
        assert answer.usage.completion_tokens == len(alone.token_ids)
    assert len({body_of(line)["id"] for line in found}) == 6


def test_several_prompts_and_samples_of_a_body_are_choices_in_order(
    llm: LLM, tmp_path: Path
) -> None:
    prompts = ["One", "Two " * 40, "Three"]
    several = row("a", "text", prompt=prompts, n=3, temperature=1.0, max_tokens=8, seed=5)
    (line,), _ = run(llm, [several], tmp_path)
    answer = OpenaiCompletion.model_validate(body_of(line), strict=True)
    assert [choice.index for choice in answer.choices] == list(range(9))
    params = SamplingParams(n=3, temperature=1.0, max_tokens=8, seed=5)
    alone = [completion for prompt in prompts for completion in llm.generate(prompt, params)]
    assert [choice.text for choice in answer.choices] == [one.text for one in alone]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(prompt) for prompt in prompts)
    assert answer.usage.completion_tokens == sum(len(one.token_ids) for one in alone)
    (line,), _ = run(llm, [row("b", n=3, temperature=1.0)], tmp_path)
    chat = ChatCompletion.model_validate(body_of(line), strict=True)
    assert len({choice.message.content for choice in chat.choices}) == 3


def test_a_tool_that_is_asked_for_is_called(llm: LLM, tmp_path: Path) -> None:
    (line,), _ = run(llm, [row("a", tools=TOOLS, tool_choice="required", max_tokens=100)], tmp_path)
    (choice,) = ChatCompletion.model_validate(body_of(line), strict=True).choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("look", {})
    read = OpenAiFormat(recipe_of(llm, None), {}).read(json.dumps(line).encode() + b"\n")
    assert read.finish_reasons == ("stop",), "as it is counted while the job runs"


BAD: list[tuple[Given, int, str | None, str]] = [
    ("{broken", 400, None, "line 2 is not a JSON row"),
    ({**row("x"), "extra": 1}, 400, "x", "line 4 has an unknown key 'extra'"),
    ({**row("x"), "custom_id": ""}, 400, None, "line 6: custom_id must be a text of 1 to 512"),
    ({**row("x"), "custom_id": 5}, 400, None, "line 8: custom_id must be"),
    ({**row("x3"), "method": "GET"}, 400, "x3", "line 10: method must be POST, not 'GET'"),
    ({**row("x4"), "url": "/v1/embeddings"}, 400, "x4", "url must be /v1/chat/completions or"),
    ({**row("x5"), "body": None}, 400, "x5", "the body must be a JSON object"),
    (row("x6", model="gpt-9"), 404, "x6", "there is no model 'gpt-9' here: ask for 'fake-llama'"),
    (row("x7", temperature=101.0), 400, "x7", "temperature"),
    (row("x8", nonsense=1), 400, "x8", "nonsense"),
    (row("x9", messages=[]), 400, "x9", "messages"),
    (row("x10", stream=True), 400, "x10", "stream"),
    (row("x11", max_tokens=5000), 400, "x11", "max_tokens"),
    (row("x12", "text", prompt=["fits", "x" * 2040]), 400, "x12", "over max_len 2048"),
    ('{"custom_id": "\\ud800"}', 400, None, "custom_id must be"),
]


def test_errors_lie_apart_in_order_and_harm_no_other_row(llm: LLM, tmp_path: Path) -> None:
    good: list[Given] = [row(f"good {i}", "text", prompt=f"Hi {i}") for i in range(len(BAD))]
    mixed = [each for pair in zip(good, (bad for bad, *_ in BAD), strict=True) for each in pair]
    alone, no_errors = run(llm, good, tmp_path)
    found, errors = run(llm, mixed, tmp_path)
    assert no_errors == []
    assert [line["custom_id"] for line in found] == [f"good {i}" for i in range(len(BAD))]
    for one, other in zip(alone, found, strict=True):
        assert body_of(one)["choices"] == body_of(other)["choices"]
    assert [line["id"] for line in errors] == [
        f"batch_req_{2 * number + 1:012}" for number in range(len(BAD))
    ]
    for line, (_, status, custom_id, words) in zip(errors, BAD, strict=True):
        error = body_of(line)["error"]
        assert line["error"] == error
        assert list(error) == ["message", "type", "param", "code"]
        assert line["response"]["status_code"] == status
        assert line["custom_id"] == custom_id
        assert words in error["message"], error
    assert errors[7]["error"]["code"] == "model_not_found"


def test_what_a_body_leaves_out_is_the_jobs(llm: LLM, tmp_path: Path) -> None:
    rows: list[Given] = [row("a"), row("b", max_tokens=5), row("c", "text"), row("d", "text")]
    found, _ = run(llm, rows, tmp_path, max_tokens=9, temperature=1.0, seed=3)
    used = [body_of(line)["usage"]["completion_tokens"] for line in found]
    assert [count <= limit for count, limit in zip(used, (9, 5, 9, 9), strict=True)] == [True] * 4
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=row_seed(3, 2))
    assert body_of(found[2])["choices"][0]["text"] == llm.generate("Hello", params)[0].text
    assert body_of(found[2])["choices"] != body_of(found[3])["choices"], "each has its own seed"
    form = OpenAiFormat(recipe_of(llm, None), {})
    (record,) = records_of(json.dumps(row("a", "text")).encode())
    assert form.task(record).requests[0].params.max_tokens == 16, "as OpenAI's specification says"


def test_a_result_is_read_back_as_what_became_of_its_row(llm: LLM, tmp_path: Path) -> None:
    found, errors = run(llm, [row("a", n=2), row("b", top_p=7)], tmp_path)
    form = OpenAiFormat(recipe_of(llm, None), {})
    done, failed = (
        form.read(json.dumps(line, ensure_ascii=False).encode() + b"\n") for line in found + errors
    )
    assert (done.index, done.error, len(done.finish_reasons)) == (0, None, 2)
    usage = body_of(found[0])["usage"]
    assert (done.prompt_tokens, done.completion_tokens) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    assert (failed.index, failed.finish_reasons) == (1, ("error",))
    assert failed.error == errors[0]["error"]["message"]
    whole = json.dumps(found[0]).encode()
    deep = b'{"id": ' + b"[" * 100_000 + b"}\n"
    for line in (whole, b"{}\n", b'{"id": "batch_req_"}\n', b"[]\n", b"\xff}\n", deep):
        with pytest.raises(ValueError, match=r"^(it|'|Expecting|.utf-8. codec)"):
            form.read(line)
    assert form.read(whole + b"\n").index == 0
