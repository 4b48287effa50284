"""Metrics are true: of the types and names that are documented, and as many as were asked for."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, Metric
from prometheus_client.parser import text_string_to_metric_families as parse

from llama_runtime import __version__
from llama_runtime.errors import RequestError
from llama_runtime.server import ServerSettings
from llama_runtime.server.metrics import Histogram
from tests.runtime.server.serving import HELLO, MODEL, Serving, serving, stream_bytes
from tests.watched_backend import wait_for

PAGE = Path(__file__).parents[3] / "docs" / "serving.md"
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
COMPATIBLE = ServerSettings(metrics_compat="vllm")

# Of reference pages of vLLM and of the model server protocol of Kubernetes' inference extension:
# boards and routers know these names, and rely on their types.
OF_VLLM = {
    "gauge": ("num_requests_running num_requests_waiting kv_cache_usage_perc cache_config_info"),
    "counter": (
        "prefix_cache_queries prefix_cache_hits prompt_tokens generation_tokens "
        "request_success num_preemptions spec_decode_num_draft_tokens "
        "spec_decode_num_accepted_tokens"
    ),
    "histogram": (
        "time_to_first_token_seconds inter_token_latency_seconds "
        "e2e_request_latency_seconds request_queue_time_seconds "
        "request_prefill_time_seconds request_decode_time_seconds "
        "request_inference_time_seconds request_prompt_tokens request_generation_tokens "
        "request_params_max_tokens request_params_n"
    ),
}
GAUGES = ("sequences_running", "sequences_waiting", "requests_preparing", "cache_use_ratio")


class Scrape:
    """What one look at the metrics gave; every sample has the model's name, and no other."""

    def __init__(self, server: Serving) -> None:
        answer = server.get("/metrics")
        assert answer.status == 200
        self.families: dict[str, Metric] = {}
        self._values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in parse(answer.body.decode("utf-8")):
            assert family.name not in self.families
            assert family.documentation
            assert family.samples
            self.families[family.name] = family
            for sample in family.samples:
                assert sample.labels["model_name"] == MODEL
                labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
                key = sample.name, frozenset(labels.items())
                assert key not in self._values
                self._values[key] = sample.value

    def __call__(self, name: str, **labels: str) -> float:
        name = name if ":" in name else f"caravan_{name}"
        return self._values[name, frozenset(labels.items())]

    def since(self, before: Scrape, name: str, **labels: str) -> float:
        return self(name, **labels) - before(name, **labels)


@pytest.fixture(scope="module")
def compatible(roomy: Path) -> Iterator[Serving]:
    with serving(roomy, COMPATIBLE, max_len=512) as running:
        yield running


def ask(server: Serving, path: str = COMPLETIONS, **more: object) -> Any:
    prompt: Mapping[str, object] = {"messages": HELLO} if path == CHATS else {"prompt": "Hello"}
    answer = server.post(path, {"model": MODEL, "ignore_eos": True, **prompt, **more})
    return answer.json() if answer.status == 200 else answer.error


def test_counts_are_what_was_asked_for(compatible: Serving) -> None:
    before = Scrape(compatible)
    started = time.monotonic()
    asked = [
        ask(compatible, prompt=["one", "two two"], n=2, max_tokens=5),
        ask(compatible, CHATS, max_tokens=7),
        ask(compatible, max_tokens=0, echo=True, logprobs=0),
    ]
    compatible.send_raw(stream_bytes(9))
    seconds = time.monotonic() - started
    after = Scrape(compatible)

    given = sum(one["usage"]["completion_tokens"] for one in asked) + 9
    assert given == 4 * 5 + 7 + 9
    generated = given + 1  # which a prompt that is only scored costs
    (pair, *others) = (one["usage"]["prompt_tokens"] for one in asked)
    prompts = 2 * pair + sum(others) + len("Hello")  # of each sequence
    for name, expected in {
        "prompt_tokens_total": prompts,
        "generated_tokens_total": generated,
        "sequence_prompt_tokens_sum": prompts,
        "sequence_generated_tokens_sum": generated,
        "time_to_first_token_seconds_count": 7,
        "inter_token_latency_seconds_count": generated - 7,
        "request_latency_seconds_count": 7,
        "queue_seconds_count": 7,
        "prefill_seconds_count": 7,
        "decode_seconds_count": 7,
        "vllm:prompt_tokens_total": prompts,
        "vllm:generation_tokens_total": generated,
        "vllm:prefix_cache_queries_total": prompts,
        "vllm:request_params_n_sum": 2 + 2 + 1 + 1 + 1,
        "vllm:request_params_n_count": 5,
        "vllm:request_params_max_tokens_sum": generated,
        "vllm:request_inference_time_seconds_count": 7,
        "vllm:num_preemptions_total": 0,
    }.items():
        assert after.since(before, name) == expected, name
    assert after.since(before, "sequences_finished_total", reason="length") == 7
    assert after.since(before, "vllm:request_success_total", finished_reason="length") == 7
    for reason in ("stop", "abort", "error", "late"):
        assert after.since(before, "sequences_finished_total", reason=reason) == 0
    parts = ("queue_seconds_sum", "prefill_seconds_sum", "decode_seconds_sum")
    spans = [after.since(before, name) for name in parts]
    assert min(spans) >= 0
    assert sum(spans) <= after.since(before, "request_latency_seconds_sum") <= 7 * seconds
    gaps = after.since(before, "inter_token_latency_seconds_sum")
    assert gaps == pytest.approx(spans[2], abs=1e-6)


def test_prefixes_that_others_had_are_counted(compatible: Serving) -> None:
    prompt = "a prefix that is long enough to fill a block or several of them, and so it is kept"
    ask(compatible, prompt=prompt, max_tokens=2)
    before = Scrape(compatible)
    ask(compatible, prompt=prompt + "!", max_tokens=2)
    after = Scrape(compatible)
    reused = compatible.llm.stats().reused_tokens
    assert after("reused_prompt_tokens_total") == after("vllm:prefix_cache_hits_total") == reused
    assert after.since(before, "prefix_hits_total") == 1
    assert 0 < after.since(before, "reused_prompt_tokens_total") < len(prompt)


def test_the_first_token_is_timed_from_the_arrival_of_the_request(
    compatible: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenising is part of it, and of nothing else but the whole."""
    check = compatible.service.check_model

    def slow(name: str) -> None:
        time.sleep(0.2)
        check(name)

    monkeypatch.setattr(compatible.service, "check_model", slow)
    before = Scrape(compatible)
    ask(compatible, max_tokens=3)
    after = Scrape(compatible)
    assert after.since(before, "time_to_first_token_seconds_sum") >= 0.2
    assert after.since(before, "request_latency_seconds_sum") >= 0.2
    assert after.since(before, "queue_seconds_sum") < 0.2
    assert after.since(before, "prefill_seconds_sum") < 0.2


def test_time_in_the_queue_is_told_from_time_in_a_slot(roomy: Path) -> None:
    with serving(roomy, max_batch=1) as server, ThreadPoolExecutor(2) as pool:
        server.backend.seconds = 0.05
        first = pool.submit(ask, server, max_tokens=12)
        wait_for(lambda: server.llm.stats().running == 1)
        second = pool.submit(ask, server, max_tokens=1)
        wait_for(lambda: server.llm.stats().waiting == 1)
        now = Scrape(server)
        assert (now("sequences_running"), now("sequences_waiting")) == (1, 1)
        first.result()
        second.result()
        done = Scrape(server)
        assert done("queue_seconds_sum") >= 0.2
        assert done("queue_seconds_bucket", le="0.05") == 1, "the first didn't wait"
        assert done("decode_seconds_sum") >= 11 * 0.05


def test_gauges_say_what_runs_and_return_to_zero_after_a_storm(roomy: Path) -> None:
    with serving(roomy, max_batch=4) as server, ExitStack() as clients:
        server.backend.hang_after(2)
        for _ in range(40):
            clients.enter_context(server.connect()).sendall(stream_bytes(200))
        server.backend.wait_until_it_hangs()
        wait_for(lambda: server.llm.stats().running + server.llm.stats().waiting == 40)
        full = Scrape(server)
        assert 0 < full("sequences_running") <= full("sequences_limit") == 4
        assert full("cache_use_ratio") == full("sequences_running") / 4
        server.backend.seconds = 0.01
        server.backend.go_on()
        wait_for(lambda: sum(server.service.tally.samples.counts) == 40)  # the engine has them all
        clients.close()
        server.wait_until_idle()
        last = Scrape(server)
        assert {name: last(name) for name in GAUGES} == dict.fromkeys(GAUGES, 0)
        assert last("sequences_finished_total", reason="abort") == 40
        assert last("sequences_finished_total", reason="error") == 0


def test_refusals_are_counted_by_their_status(compatible: Serving) -> None:
    before = Scrape(compatible)
    ask(compatible, max_tokens="many")
    ask(compatible, temperature=-1)
    compatible.get("/nothing")
    compatible.get("/health")
    after = Scrape(compatible)
    assert after.since(before, "requests_refused_total", status="400") == 2
    assert after("requests_refused_total", status="404") == 1
    assert after.since(before, "requests_refused_total", status="429") == 0


def test_what_is_late_is_told_from_what_was_left(roomy: Path) -> None:
    settings = ServerSettings(request_timeout=0.2, metrics_compat="vllm")
    with serving(roomy, settings) as server:
        server.backend.hang_after(2)
        assert ask(server, n=2, max_tokens=9)["code"] == "deadline_exceeded"
        server.backend.go_on()
        server.wait_until_idle()
        after = Scrape(server)
        assert after("sequences_finished_total", reason="late") == 2
        assert after("vllm:request_success_total", finished_reason="abort") == 2
        assert after("requests_refused_total", status="504") == 1
        assert after("request_latency_seconds_count") == 0


def test_a_row_that_fails_is_counted_and_a_dead_engine_still_tells(roomy: Path) -> None:
    with serving(roomy) as server:
        server.backend.spoiled.add(7)
        ask(server, prompt=[7, 8], max_tokens=5)
        assert Scrape(server)("sequences_finished_total", reason="error") == 1
        server.backend.failure = RuntimeError("the device is gone")
        ask(server, n=2, max_tokens=5)
        wait_for(lambda: server.get("/health").status == 503)
        dead = Scrape(server)
        assert {name: dead(name) for name in GAUGES} == dict.fromkeys(GAUGES, 0)
        ask(server, max_tokens=5)
        assert Scrape(server)("requests_refused_total", status="503") >= 1


def test_names_of_vllm_have_its_types(compatible: Serving) -> None:
    families = Scrape(compatible).families
    found = {name: one.type for name, one in families.items() if name.startswith("vllm:")}
    known = {f"vllm:{name}": kind for kind, names in OF_VLLM.items() for name in names.split()}
    assert found == known
    (config,) = families["vllm:cache_config_info"].samples
    blocks, size = (int(config.labels[name]) for name in ("num_gpu_blocks", "block_size"))
    assert blocks * size == 4 * 512


def test_names_of_vllm_are_there_only_if_asked_for(server: Serving) -> None:
    scrape = Scrape(server)
    assert scrape.families
    assert all(name.startswith("caravan_") for name in scrape.families)
    assert scrape("info", version=__version__) == 1
    with pytest.raises(RequestError, match="metrics_compat must be None or 'vllm', not 'tgi'"):
        ServerSettings(metrics_compat="tgi")  # type: ignore[arg-type]


def test_the_table_of_the_documentation_is_what_there_is(compatible: Serving) -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`caravan_\S+`|) ?\| (`vllm:\S+`|) ?\| (\w+) \|", page, re.MULTILINE)
    documented = {
        name.strip("`").partition("{")[0].removesuffix("_total"): kind
        for own, other, kind in rows
        for name in (own, other)
        if name
    }
    families = Scrape(compatible).families
    assert documented == {name: family.type for name, family in families.items()}


@pytest.mark.parametrize("accepted", ["*/*", "application/openmetrics-text; version=1.0.0"])
def test_names_are_whole_whatever_a_scraper_prefers(compatible: Serving, accepted: str) -> None:
    """The library writes OpenMetrics with "vllm_" for "vllm:"; so that isn't spoken."""
    answer = compatible.get("/metrics", Accept=accepted)
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert b"\nvllm:num_requests_running{" in answer.body


def test_servers_share_no_metrics(compatible: Serving, server: Serving) -> None:
    before = Scrape(server)
    ask(compatible, max_tokens=4)
    assert Scrape(server).since(before, "generated_tokens_total") == 0
    assert not any("caravan" in family.name for family in REGISTRY.collect())


def test_a_bound_belongs_to_the_values_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(value)
    assert (histogram.counts, histogram.total) == ([2, 2, 1], 7.5)
