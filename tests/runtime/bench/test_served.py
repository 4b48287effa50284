"""A server under load: ours, and some that do all that a server must not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llama_runtime.bench.api_client import ApiClient, read_key
from llama_runtime.bench.http_client import Server
from llama_runtime.bench.trace import Trace
from llama_runtime.bench.workload import Ask
from llama_runtime.cli import cli
from llama_runtime.errors import RequestError
from llama_runtime.server import ServerSettings
from tests.runtime.bench import scripted_server as play
from tests.runtime.bench.scripted_server import Script, chunk, scripted, stream_head, text, usage
from tests.runtime.conftest import write_fake_bundle
from tests.runtime.server.serving import Serving, serving

KEY = "k-1234"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    bundle = write_fake_bundle(tmp_path_factory.mktemp("served") / "bundle")
    with serving(bundle, ServerSettings(api_keys=(KEY,)), max_batch=4) as running:
        yield running


def bench(*args: object, **environment: str) -> Result:
    line = ["bench", "--rounds", "1", *map(str, args)]
    return CliRunner().invoke(cli, line, env=environment, prog_name="llama-run")


def figures(*args: object, **environment: str) -> dict[str, Any]:
    result = bench(*args, "--json", "-", **environment)
    assert result.exit_code in (0, 1), result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_our_server_counts_as_many_tokens_as_were_asked_for(
    server: Serving, endpoint: str, tmp_path: Path
) -> None:
    args = ("--serve", server.url, "--endpoint", endpoint, "--num-prompts", 6)
    lengths = ("--input-len", "80:120", "--output-len", 7, "--max-concurrency", "1,3")
    record = figures(*args, *lengths, LLAMA_RUN_API_KEY=KEY)
    assert [run["max_concurrency"] for run in record["runs"]] == [1, 3]
    for run in record["runs"]:
        assert (run["completed"], run["failed"], run["errors"]) == (6, 0, {})
        assert run["total_output_tokens"] == 6 * 7
        assert 6 * 75 <= run["total_input_tokens"] <= 6 * 125  # as the server counts them
        assert run["max_concurrent_requests"] <= run["max_concurrency"]
        assert run["model_id"] == "fake-llama"
        assert run["short_completions"] == 0
    assert record["notes"] == []


def test_a_rate_spreads_requests_over_time(server: Serving) -> None:
    args = ("--serve", f"{server.url}/v1/", "--num-prompts", 10, "--output-len", 1)
    (run,) = figures(*args, "--request-rate", 40, LLAMA_RUN_API_KEY=KEY)["runs"]
    assert run["request_rate"] == 40
    assert 0.05 < run["duration"] < 2
    assert run["completed"] == 10


def test_the_key_comes_from_a_file_or_the_environment(server: Serving, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(f"# ours\n{KEY}\n")
    args = ("--serve", server.url, "--num-prompts", 1, "--output-len", 1)
    assert bench(*args, "--api-key-file", path, LLAMA_RUN_API_KEY="other").exit_code == 0
    refused = bench(*args, LLAMA_RUN_API_KEY="other")
    assert refused.exit_code == 1
    assert "wants a key (HTTP 401): put it into LLAMA_RUN_API_KEY" in refused.stderr
    assert "other" not in refused.stderr
    with pytest.raises(RequestError, match="holds no key"):
        read_key(None, "# nothing\n\n")


def test_too_long_requests_fail_and_are_said_to(server: Serving) -> None:
    args = ("--serve", server.url, "--num-prompts", 2, "--output-len", 1000)
    result = bench(*args, LLAMA_RUN_API_KEY=KEY)
    assert result.exit_code == 1
    said = " ".join(result.stdout.split())
    assert "2 requests failed: HTTP 400, 2, such as: " in said
    assert "over the limit" in said or "model's limit" in said


def test_no_server_is_one_sentence() -> None:
    with scripted(lambda *_: []) as gone:
        url = gone.url
    result = bench("--serve", url)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: no server of OpenAI's API answers at 127.0.0.1:")
    assert "(connection refused): start it, or give its address to --serve" in line


def complete(script: Script, timeout: float = 5.0, endpoint: Any = "completions") -> Trace:
    """One request to a server that follows a script."""
    with scripted(script) as server:
        client = ApiClient(
            Server.at(server.url), endpoint, key=None, timeout=timeout, model="served"
        )
        return asyncio.run(client.complete(Ask("Hello", 3)))


USAGE = usage(5, 3)
FAILURES: dict[str, tuple[list[bytes], str]] = {
    "in the middle of a stream": (
        [stream_head(), chunk(text("a"))],
        "the connection was closed in the middle of the answer",
    ),
    "in the middle of a chunk": (
        [stream_head(), b"50\r\ndata: "],
        "the connection was closed in the middle of the answer",
    ),
    "before an answer": ([], "the connection was closed in the middle of the answer"),
    "an error as an event": (
        [stream_head(), chunk(text("a")), chunk(play.event({"error": {"message": "out"}}))],
        "an error in the stream",
    ),
    "no end": (
        [stream_head(), chunk(text("a")), b"0\r\n\r\n"],
        "the stream ended without [DONE]",
    ),
    "not JSON": ([stream_head(), chunk(b"data: {\n\n")], "an event isn't JSON"),
    "a list": ([stream_head(), chunk(b"data: []\n\n")], "an event isn't a JSON object"),
    "choices of text": (
        [stream_head(), chunk(play.event({"choices": ["a"]}))],
        "a choice isn't a JSON object",
    ),
    "a chunk of no size": ([stream_head(), b"zz\r\n"], "the size of a chunk is no number"),
    "not HTTP": ([b"hello\r\n\r\n"], "the answer isn't HTTP/1.1"),
    "no token": (play.whole(USAGE), "an answer without a token"),
    "too many": ([play.answer(429, b'{"error": {"message": "later"}}')], "HTTP 429"),
    "a page": ([play.answer(502, b"<html>")], "HTTP 502"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_server_that_fails_is_counted_by_kind(name: str) -> None:
    pieces, kind = FAILURES[name]
    trace = complete(lambda *_: pieces)
    assert trace.error == kind


def test_a_server_that_says_nothing_times_out() -> None:
    def wait(*_: object) -> list[bytes]:
        import time

        time.sleep(0.4)
        return []

    assert complete(wait, timeout=0.1).error == "timed out"


def test_bytes_may_come_in_any_pieces() -> None:
    stream = b"".join(play.whole(text("a"), text("b"), text("c"), USAGE))
    for size in (1, 7, len(stream)):
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        trace = complete(lambda *_, pieces=pieces: pieces)
        assert (trace.error, trace.input_len, trace.output_len) == (None, 5, 3)
        assert len(trace.times) == 3
        assert trace.ttft + sum(trace.itls) == pytest.approx(trace.e2el)


def test_a_stream_may_come_without_chunks_and_after_a_first_answer() -> None:
    body = text("a") + b": a comment\n\n" + text("b") + USAGE + play.DONE
    plain = [b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", body]
    trace = complete(lambda *_: plain)
    assert (trace.error, len(trace.times)) == (None, 2)


def test_a_role_is_no_token_and_reasoning_is_one() -> None:
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm"},
        {"content": "yes"},
        {},
    ]
    events = [play.event({"choices": [{"delta": delta}]}) for delta in deltas]
    trace = complete(lambda *_: play.whole(*events, USAGE), endpoint="chat")
    assert (trace.error, len(trace.times), trace.output_len) == (None, 2, 3)


def served(*streams: list[bytes]) -> Script:
    """Models, then streams in turn, the last again and again."""
    number = count()

    def script(line: str, _: object) -> list[bytes]:
        if line.startswith("GET"):
            return [play.models()]
        return streams[min(next(number), len(streams) - 1)]

    return script


def test_failures_beside_answers_are_in_the_figures_and_the_exit_status() -> None:
    good = play.whole(text("a"), text("b"), USAGE)
    broken = [stream_head(), chunk(text("a"))]
    script = served(good, good, good, broken, [play.answer(500, b"")], good)
    with scripted(script) as server:
        args = ("--serve", server.url, "--num-prompts", 4, "--max-concurrency", 1)
        result = bench(*args, "--output-len", 3, "--json", "-")
    assert result.exit_code == 1
    record = json.loads(result.stdout)
    (run,) = record["runs"]
    assert (run["completed"], run["failed"]) == (2, 2)
    assert run["errors"] == {
        "the connection was closed in the middle of the answer": 1,
        "HTTP 500": 1,
    }
    assert run["total_output_tokens"] == 2 * 3
    assert record["notes"][0].startswith("2 requests failed: ")


def test_without_usage_pieces_are_counted_and_that_is_said() -> None:
    with scripted(served(play.whole(text("a"), text("b")))) as server:
        record = figures("--serve", server.url, "--num-prompts", 1, "--output-len", 9)
    assert record["runs"][0]["total_output_tokens"] == 2
    assert record["runs"][0]["short_completions"] == 1
    assert "pieces were counted" in record["notes"][-1]


def test_a_server_that_does_not_know_ignore_eos_is_asked_without() -> None:
    def script(line: str, body: Any) -> list[bytes]:
        if line.startswith("GET"):
            return [play.models()]
        if "ignore_eos" in body:
            return [play.answer(400, b'{"error": {"message": "unknown field"}}')]
        return play.whole(text("a"), usage(5, 1))

    with scripted(script) as server:
        record = figures("--serve", server.url, "--num-prompts", 2, "--output-len", 1)
    assert record["runs"][0]["completed"] == 2
    assert any("doesn't take ignore_eos" in note for note in record["notes"])
    bodies = [body for _, body in server.asked if body]
    assert bodies[-1]["stream_options"] == {"include_usage": True}
    assert (bodies[-1]["temperature"], bodies[-1]["model"]) == (0, "served")


@pytest.mark.parametrize("body", [b"", b"{}", b'{"data": []}', b"[1]"])
def test_a_server_without_models_is_one_sentence(body: bytes) -> None:
    with scripted(lambda *_: [play.answer(200, body)]) as server:
        result = bench("--serve", server.url)
    assert result.exit_code == 1
    assert "doesn't say which models it has" in result.stderr
    assert result.stderr.count("\n") == 1


def test_talks_are_asked_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "talks.json"
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "b" * 40}]
    path.write_text(json.dumps([{"conversations": turns}]))
    with scripted(served(play.whole(text("a"), usage(2, 10)))) as server:
        args = ("--serve", server.url, "--dataset-path", path)
        (run,) = figures(*args, "--num-prompts", 1)["runs"]
        refused = bench(*args, "--num-prompts", 2)
    assert (run["completed"], run["total_output_tokens"]) == (1, 10)
    assert server.asked[2][1]["prompt"] == "Why?"
    assert server.asked[2][1]["max_tokens"] == 10  # four characters a token
    assert refused.exit_code == 2
    assert "the file has 1 conversations" in refused.stderr


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("http://a", Server("a", 80, "", False)),
        ("https://a/", Server("a", 443, "", True)),
        ("http://[::1]:8000/v1", Server("::1", 8000, "", False)),
        ("http://a:1/llm/v1/", Server("a", 1, "/llm", False)),
    ],
)
def test_an_address_may_end_in_v1_or_not(url: str, server: Server) -> None:
    assert Server.at(url) == server


@pytest.mark.parametrize(
    "url",
    ["", "a:8000", "ftp://a", "http://", "http://a:x", "http://u:p@a", "http://a b", "http://a?q"],
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    result = bench("--serve", url)
    assert (result.exit_code, "--serve" in result.stderr) == (2, True)
