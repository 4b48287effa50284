"""Log-probabilities, of completions and of prompts, are those of the model in transformers.

Chunks of a prompt that is scored are limited by the rows of logits of a step, so the engine runs
with few slots, whose steps have 33, and with many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from llama_runtime.completion import Completion
from llama_runtime.llm import LLM
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import TokenLogprob

LENGTHS = (1, 2, 33, 34, 97, 200)
MAX_LEN, TOLERANCE = 230, 1e-4
ALL: dict[str, Any] = {"logprobs": True, "prompt_logprobs": True, "top_logprobs": 3}
TEN = SamplingParams(max_tokens=10, ignore_eos=True)
WARM = replace(TEN, temperature=1.2, top_p=0.9, seed=4)
PENALIZED = replace(
    WARM,
    repetition_penalty=1.5,
    presence_penalty=1.0,
    frequency_penalty=0.5,
    logit_bias={7: 5.0, 8: -100.0},
    min_tokens=4,
)
PROMPTS = [[(7 * i + 31 * length) % 250 + 3 for i in range(length)] for length in LENGTHS]


@pytest.fixture(scope="module", params=[2, 40], ids=lambda n: f"{n} slots")
def llm(request: pytest.FixtureRequest, tiny_bundle: Path) -> Iterator[LLM]:
    with LLM(tiny_bundle, max_batch=request.param, max_len=MAX_LEN, threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> torch.nn.Module:
    loaded = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return loaded.eval()  # type: ignore[no-any-return]


def reference(model: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    """Log-probabilities [tokens, V] of what follows each token."""
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0]
    scores: torch.Tensor = logits.double().log_softmax(-1)
    return scores


def check(
    scores: list[TokenLogprob], token_ids: list[int], expected: torch.Tensor, num_top: int
) -> None:
    """They are those of the tokens, and beside them those of the likeliest."""
    assert [score.token_id for score in scores] == token_ids
    for score, row in zip(scores, expected, strict=True):
        assert score.logprob == pytest.approx(float(row[score.token_id]), abs=TOLERANCE)
        values = [value for _, value in score.top]
        assert len(score.top) == num_top
        assert values == sorted(values, reverse=True)
        assert values == pytest.approx(row.topk(num_top).values.tolist(), abs=TOLERANCE)
        of_ids = [float(row[token_id]) for token_id, _ in score.top]
        assert values == pytest.approx(of_ids, abs=TOLERANCE)
        if score.token_id in dict(score.top):
            assert dict(score.top)[score.token_id] == score.logprob


def check_all(model: torch.nn.Module, prompt: list[int], found: Completion, num_top: int) -> None:
    expected = reference(model, prompt + found.token_ids)
    assert found.logprobs is not None
    assert found.prompt_logprobs is not None
    check(found.logprobs, found.token_ids, expected[len(prompt) - 1 : -1], num_top)
    first, *others = found.prompt_logprobs
    assert first is None
    scored = [score for score in others if score is not None]
    check(scored, prompt[1:], expected[: len(prompt) - 1], num_top)


@pytest.mark.parametrize("params", [TEN, WARM, PENALIZED], ids=["greedy", "warm", "penalized"])
def test_they_are_those_of_transformers(
    llm: LLM, model: torch.nn.Module, params: SamplingParams
) -> None:
    """Whatever bias, penalties, temperature and filters make of the distribution."""
    completions = llm.generate(PROMPTS, replace(params, **ALL))
    for prompt, found in zip(PROMPTS, completions, strict=True):
        check_all(model, prompt, found, num_top=3)


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_as_many_of_the_likeliest_come_as_are_asked_for(
    llm: LLM, model: torch.nn.Module, num_top: int
) -> None:
    params = replace(TEN, **{**ALL, "top_logprobs": num_top})
    (found,) = llm.generate([PROMPTS[3]], params)
    check_all(model, PROMPTS[3], found, num_top)


@pytest.mark.parametrize("params", [TEN, WARM, PENALIZED], ids=["greedy", "warm", "penalized"])
def test_asking_for_them_changes_no_token_of_anybody(llm: LLM, params: SamplingParams) -> None:
    without = llm.generate(PROMPTS, params)
    for asked in (ALL, {"logprobs": True}, {"prompt_logprobs": True}):
        # Every other prompt asks, beside those that don't.
        several = [replace(params, **asked) if i % 2 else params for i in range(len(PROMPTS))]
        for i, (plain, found) in enumerate(
            zip(without, llm.generate(PROMPTS, several), strict=True)
        ):
            assert (found.token_ids, found.text) == (plain.token_ids, plain.text)
            assert (found.logprobs is not None) == bool(i % 2 and "logprobs" in asked)
            assert (found.prompt_logprobs is not None) == bool(i % 2 and "prompt_logprobs" in asked)


def test_they_are_the_same_bits_in_any_company(llm: LLM) -> None:
    asking, beside = replace(WARM, **ALL), replace(TEN, max_tokens=20)
    alone = [llm.generate([prompt], asking)[0] for prompt in PROMPTS]
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    together = llm.generate(prompts, [asking, beside] * len(PROMPTS))[::2]
    for one, other in zip(alone, together, strict=True):
        assert other == one


def test_samples_have_their_own_and_the_prompts_in_common(llm: LLM, model: torch.nn.Module) -> None:
    several = llm.generate([PROMPTS[4]], replace(WARM, **ALL, n=3))
    for found in several:
        check_all(model, PROMPTS[4], found, num_top=3)
        assert found.prompt_logprobs == several[0].prompt_logprobs
    assert len({tuple(found.logprobs or ()) for found in several}) == 3


def test_an_end_token_has_one_too(llm: LLM, model: torch.nn.Module) -> None:
    (end,) = llm.generate([PROMPTS[1]], replace(TEN, max_tokens=1))
    params = SamplingParams(**ALL, max_tokens=5, stop_token_ids=frozenset(end.token_ids))
    (found,) = llm.generate([PROMPTS[1]], params)
    assert (found.finish_reason, found.text) == ("stop", "")
    check_all(model, PROMPTS[1], found, num_top=3)


def test_a_stream_has_them_as_it_goes(llm: LLM) -> None:
    params = replace(WARM, **ALL)
    (whole,) = llm.generate([PROMPTS[5]], params)
    with llm.stream(PROMPTS[5], params) as stream:
        events = [next(stream)]
        assert stream.prompt_logprobs == whole.prompt_logprobs
        events += stream
    assert [event.logprob for event in events] == whole.logprobs
    with llm.stream(PROMPTS[5], WARM) as stream:
        assert {event.logprob for event in stream} == {None}
        assert stream.prompt_logprobs == []
