"""The blocking facade over a real bundle."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_runtime.completion import Completion, Request
from llama_runtime.errors import CapacityError, RequestError
from llama_runtime.llm import LLM
from llama_runtime.params import SamplingParams, row_seed

MAX_BATCH, MAX_LEN = 4, 120
PROMPTS = ["a", "Hello", "wörld 🦙", "x" * 40, "The llamas walk " * 4, "b" * 33]
TEN = SamplingParams(max_tokens=10, ignore_eos=True)
WARM = SamplingParams(max_tokens=10, temperature=1.5, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_bundle: Path) -> Iterator[LLM]:
    with LLM(tiny_bundle, max_batch=MAX_BATCH, max_len=MAX_LEN, threads=1) as llm:
        yield llm


@pytest.fixture
def own(tiny_bundle: Path) -> Iterator[LLM]:
    """One that a test may break."""
    with LLM(tiny_bundle, max_batch=2, max_len=MAX_LEN, threads=1) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _nothing_is_left_in_flight(llm: LLM) -> Iterator[None]:
    yield
    stats = llm.stats()
    assert (stats.running, stats.waiting) == (0, 0)


def texts(completions: list[Completion]) -> list[str]:
    return [completion.text for completion in completions]


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


# --- generate -----------------------------------------------------------------------------------


def test_prompts_are_texts_or_ids_one_or_many(llm: LLM) -> None:
    ids = llm.tokenizer.encode("Hello")
    (one,) = llm.generate("Hello", TEN)
    assert len(one.token_ids) == 10
    assert one.finish_reason == "length"
    assert one.num_prompt_tokens == len(ids) == 5
    assert one.text == llm.tokenizer.decode(one.token_ids)
    spellings: list[Any] = [
        ["Hello"],
        ids,
        tuple(ids),
        [ids],
        ("Hello",),
        np.array(ids),
        [np.array(ids)],
    ]
    for prompts in spellings:
        assert tokens(llm.generate(prompts, TEN)) == [one.token_ids], prompts
    mixed: list[Any] = ["Hello", ids, "Hello"]
    assert tokens(llm.generate(mixed, TEN)) == [one.token_ids] * 3
    assert llm.generate([]) == []


def test_many_prompts_come_back_in_order_and_as_alone(llm: LLM) -> None:
    several = PROMPTS * 3  # more than twice the batch
    for params in (TEN, WARM):
        alone = [llm.generate(prompt, params)[0].token_ids for prompt in PROMPTS]
        assert tokens(llm.generate(several, params)) == alone * 3
    assert len(set(map(tuple, alone))) == len(PROMPTS)


def test_each_prompt_may_have_parameters_of_its_own(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 7, 3)]
    completions = llm.generate(["a", "b", "c"], params)
    assert [len(completion.token_ids) for completion in completions] == [1, 7, 3]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_parameters_than_prompts_is_refused(llm: LLM, count: int) -> None:
    with pytest.raises(RequestError, match=f"2 prompts with {count} parameters") as refusal:
        llm.generate(["a", "b"], [TEN] * count)
    assert refusal.value.param == "params"


def test_without_parameters_the_bundles_defaults_hold(llm: LLM) -> None:
    assert llm.default_params == SamplingParams()
    first, second = llm.generate(["Hello"] * 2, SamplingParams(max_tokens=9))
    assert first.token_ids == second.token_ids
    with pytest.raises(CapacityError, match="256"):  # the default max_tokens, over max_len
        llm.generate("Hello")


def test_a_seed_that_was_drawn_gives_the_text_again(llm: LLM) -> None:
    params = SamplingParams(max_tokens=10, temperature=2.0, ignore_eos=True)
    first, second = llm.generate(["Hello"] * 2, params)
    assert first.token_ids != second.token_ids
    assert first.seed is not None
    again = SamplingParams(max_tokens=10, temperature=2.0, ignore_eos=True, seed=first.seed)
    assert llm.generate("Hello", again)[0].token_ids == first.token_ids


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([[]], "the prompt is empty"),
        ("x" * 200, "200 prompt tokens and max_tokens 10 need 210 tokens, over max_len 120"),
        ([5, 600], "token ids must lie in 0 to 511, not 5 to 600"),
        ([[5, "6"]], "must be a list of whole numbers"),
        ([None], "must be a list of whole numbers"),
        ("\ud800", "lone surrogate"),
    ],
)
def test_a_wrong_prompt_is_a_sentence(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as refusal:
        llm.generate(prompt, TEN)
    assert refusal.value.param == "prompt"


@pytest.mark.parametrize(
    ("call", "param"),
    [
        (lambda llm: llm.generate(None), "prompts"),
        (lambda llm: llm.generate(5), "prompts"),
        (lambda llm: llm.generate(b"text"), "prompts"),
        (lambda llm: llm.generate({"a": 1}), "prompts"),
        (lambda llm: llm.generate(iter(["a"])), "prompts"),
        (lambda llm: llm.generate("a", {"max_tokens": 3}), "params"),
        (lambda llm: llm.generate("a", 3), "params"),
        (lambda llm: llm.generate("a", [3]), "params"),
        (lambda llm: llm.generate("a", [TEN, TEN]), "params"),
        (lambda llm: llm.stream(b"text"), "prompt"),
        (lambda llm: llm.stream("a", {"max_tokens": 3}), "params"),
        (lambda llm: llm.chat(5), "conversations"),
        (lambda llm: llm.chat({"role": "user", "content": "a"}), "conversations"),
        (lambda llm: llm.generate_batch(None), "prompts"),
        (lambda llm: llm.generate_batch("text"), "prompts"),
        (lambda llm: llm.generate_batch(["a"], temperature=float("nan")), "temperature"),
        (lambda llm: llm.generate_batch(["a"], seed=2**64), "seed"),
        (lambda llm: list(llm.run(5)), "requests"),
        (lambda llm: list(llm.run(["a"])), "requests"),
        (lambda _: LLM(None), "bundle"),  # type: ignore[arg-type]
        (lambda _: LLM(b"bundle"), "bundle"),  # type: ignore[arg-type]
    ],
)
def test_an_argument_of_the_wrong_type_is_named(llm: LLM, call: Any, param: str) -> None:
    with pytest.raises(RequestError) as refusal:
        call(llm)
    assert refusal.value.param == param


def test_one_wrong_prompt_among_many_leaves_nothing_running(llm: LLM) -> None:
    with pytest.raises(RequestError):
        llm.generate(["a"] * 9 + [""] + ["b"] * 9, TEN)
    stats = llm.stats()
    assert (stats.running, stats.waiting) == (0, 0)


# --- generate_batch and chat --------------------------------------------------------------------


def test_generate_batch_gives_each_row_the_seed_of_its_place(llm: LLM) -> None:
    completions = llm.generate_batch(["Hello"] * 6, 8, 1.5, 0.95, 42)
    assert [completion.seed for completion in completions] == [row_seed(42, i) for i in range(6)]
    assert len(set(map(tuple, tokens(completions)))) > 1
    row = SamplingParams(max_tokens=8, temperature=1.5, top_p=0.95, seed=row_seed(42, 4))
    assert llm.generate("Hello", row)[0] == completions[4]
    assert llm.generate_batch(["Hello"] * 6, 8, 1.5, 0.95, 42) == completions
    fresh = llm.generate_batch(["Hello"] * 6, 8, 1.5, 0.95)
    assert {completion.seed for completion in fresh}.isdisjoint(c.seed for c in completions)


def test_generate_batch_is_greedy_unless_told(llm: LLM) -> None:
    (completion,) = llm.generate_batch(["Hello"], max_tokens=6)
    assert completion.token_ids == llm.generate("Hello", SamplingParams(max_tokens=6))[0].token_ids


def test_generate_batch_names_a_parameter_out_of_range(llm: LLM) -> None:
    with pytest.raises(RequestError) as refusal:
        llm.generate_batch(["Hello"], top_p=0.0)
    assert refusal.value.param == "top_p"


def test_chat_answers_what_the_template_lays_out(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    laid_out = "<s>user: Hello</s><s>assistant: "
    (completion,) = llm.chat(messages, TEN)
    assert llm.has_chat_template
    assert llm.chat_prompt(messages) == llm.tokenizer.encode(laid_out)
    assert completion.token_ids == llm.generate(laid_out, TEN)[0].token_ids
    other = [{"role": "system", "content": "Hi"}, *messages]
    answers = llm.chat([messages, other, messages], TEN)
    assert tokens(answers)[::2] == [completion.token_ids] * 2
    assert answers[1].num_prompt_tokens > answers[0].num_prompt_tokens


# --- stream -------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [TEN, WARM])
def test_a_streams_text_is_the_completion(llm: LLM, params: SamplingParams) -> None:
    for prompt in PROMPTS:
        events = list(llm.stream(prompt, params))
        (completion,) = llm.generate(prompt, params)
        assert "".join(event.text for event in events) == completion.text
        assert [event.token_id for event in events] == completion.token_ids
        reasons = [event.finish_reason for event in events]
        assert reasons == [None] * 9 + ["length"]


def test_leaving_a_stream_early_frees_its_slot(llm: LLM) -> None:
    finished = llm.stats().finished
    for _ in llm.stream("Hello", TEN):
        assert llm.stats().running == 1
        break
    assert llm.stats().running == 0
    assert llm.stats().finished == finished + 1


def test_a_stream_that_is_read_again_after_its_end_gives_nothing(llm: LLM) -> None:
    stream = llm.stream("Hello", TEN)
    assert len(list(stream)) == 10
    assert list(stream) == []


def test_streams_take_turns(llm: LLM) -> None:
    (expected,) = llm.generate("Hello", TEN)
    streams = [llm.stream("Hello", TEN) for _ in range(2 * MAX_BATCH)]
    seen = list(zip(*streams, strict=True))
    for events in zip(*seen, strict=True):
        assert [event.token_id for event in events] == expected.token_ids


def test_a_wrong_prompt_is_refused_by_the_call_of_stream_itself(llm: LLM) -> None:
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.stream("", TEN)


def test_a_stream_collected_in_the_middle_of_a_step_does_not_block_it(
    own: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream: Any = own.stream("Hello", TEN)
    next(stream)
    gc.collect()  # so that none comes by itself before the step
    cycle: list[Any] = [stream]
    cycle.append(cycle)
    backend = own._engine._engine._runner._backend  # type: ignore[attr-defined]
    run = backend.run

    running: list[int] = []

    def collect_and_run(step: Any) -> Any:
        if not running:
            gc.collect()
        running.append(len(step.chunks))
        return run(step)

    monkeypatch.setattr(backend, "run", collect_and_run)
    del stream, cycle
    done: list[Completion] = []
    thread = threading.Thread(target=lambda: done.extend(own.generate("a", TEN)), daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert len(done) == 1
    assert running == [2] + [1] * 9  # its slot is free from the next step on


def test_a_prompt_of_megabytes_is_refused_before_it_is_tokenized(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm.tokenizer, "encode", None)  # so that it would fail
    with pytest.raises(CapacityError, match=r"the prompt of 4,000,000 characters") as refusal:
        llm.generate("word" * 1_000_000)
    assert refusal.value.param == "prompt"


# --- run ----------------------------------------------------------------------------------------


def test_bad_requests_end_in_errors_and_the_others_go_on(llm: LLM) -> None:
    requests = [
        Request("Hello", TEN),
        Request("", TEN),
        Request("x" * 300, TEN),
        Request("a", TEN),
        Request([1, 10**6], TEN),
        Request([1.5], TEN),  # type: ignore[list-item]
        Request("b", TEN),
    ]
    completions = dict(llm.run(requests))
    assert sorted(completions) == list(range(7))
    good = [completions.pop(i) for i in (0, 3, 6)]
    assert tokens(good) == tokens(llm.generate(["Hello", "a", "b"], TEN))
    for completion in completions.values():
        assert isinstance(completion.error, RequestError)
        assert (completion.text, completion.token_ids) == ("", [])
        assert (completion.finish_reason, completion.num_prompt_tokens) == ("error", 0)


def test_a_good_request_after_two_hundred_bad_ones_is_reached(llm: LLM) -> None:
    requests = [Request("", TEN)] * 200 + [Request("Hello", TEN)]
    completions = list(llm.run(requests))
    assert [index for index, _ in completions] == list(range(201))
    assert [completion.finish_reason for _, completion in completions[-2:]] == ["error", "length"]


def test_requests_are_drawn_only_as_there_is_room(llm: LLM) -> None:
    drawn = 0

    def endless() -> Iterator[Request]:
        nonlocal drawn
        while True:
            drawn += 1
            yield Request("Hello", TEN)

    finished = list(itertools.islice(llm.run(endless()), 20))
    assert len({index for index, _ in finished}) == 20
    assert drawn <= 20 + 2 * MAX_BATCH
    assert llm.stats().running == 0  # the rest was dropped with the iterator


def test_none_among_requests_holds_the_next_one_back_for_a_step(llm: LLM) -> None:
    steps: list[int] = []

    def one_by_one() -> Iterator[Request | None]:
        for _ in range(3):
            yield Request("Hello", TEN)
            while llm.stats().running + llm.stats().waiting:
                steps.append(1)
                yield None

    assert [index for index, _ in llm.run(one_by_one())] == [0, 1, 2]
    assert len(steps) == 3 * 10


def test_rows_finish_as_they_are_done_not_as_they_came(llm: LLM) -> None:
    requests = [Request("Hello", SamplingParams(max_tokens=n, ignore_eos=True)) for n in (9, 3, 6)]
    assert [index for index, _ in llm.run(requests)] == [1, 2, 0]


def test_an_exception_of_the_source_of_requests_leaves_nothing_running(llm: LLM) -> None:
    def broken() -> Iterator[Request]:
        yield Request("Hello", TEN)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(llm.run(broken()))
