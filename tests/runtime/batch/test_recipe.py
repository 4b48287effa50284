"""How rows become requests: whose option counts, and chat or raw."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_runtime.batch.forms.prompt_rows import Row
from llama_runtime.batch.forms.recipe import Recipe
from llama_runtime.bundle import open_bundle
from llama_runtime.errors import CapacityError, RequestError
from llama_runtime.params import SamplingParams
from llama_runtime.prompt_encoder import PromptEncoder


@pytest.fixture
def encoder(fake_bundle: Path) -> PromptEncoder:
    return PromptEncoder(open_bundle(fake_bundle))


def raw_recipe(encoder: PromptEncoder) -> Recipe:
    return Recipe.of_job(encoder, SamplingParams(max_tokens=24), {}, False)


def test_a_row_option_goes_before_the_job_and_that_before_the_bundle(raw_bundle: Path) -> None:
    encoder = PromptEncoder(open_bundle(raw_bundle))
    defaults = SamplingParams(temperature=0.5, top_k=20)
    recipe = Recipe.of_job(encoder, defaults, {"top_k": 5, "max_tokens": 9}, None)
    params = recipe.request(Row(0, "a", {"max_tokens": 7})).params
    assert (params.temperature, params.top_k, params.max_tokens) == (0.5, 5, 7)
    assert recipe.params.max_tokens == 9


def test_prompts_are_chat_if_the_bundle_can_and_messages_always_are(
    encoder: PromptEncoder, raw_bundle: Path
) -> None:
    raw = Recipe.of_job(encoder, SamplingParams(), {}, False)
    chat = Recipe.of_job(encoder, SamplingParams(), {}, None)
    messages = [{"role": "user", "content": "hi"}]
    assert raw.request(Row(0, "hi")).prompt == encoder.encode("hi")
    assert chat.request(Row(0, "hi")).prompt == encoder.encode_chat(messages)
    assert raw.request(Row(0, messages)).prompt == encoder.encode_chat(messages)

    without = PromptEncoder(open_bundle(raw_bundle))
    plain = Recipe.of_job(without, SamplingParams(), {}, None)
    assert plain.request(Row(0, "hi")).prompt == without.encode("hi")
    with pytest.raises(RequestError, match="has no chat template"):
        plain.request(Row(0, messages))
    with pytest.raises(RequestError, match="--chat needs a chat template"):
        Recipe.of_job(without, SamplingParams(), {}, True)


def test_a_row_too_long_for_the_model_names_what_to_change(encoder: PromptEncoder) -> None:
    for row, param in ((Row(0, "x" * 500), "max_tokens"), (Row(0, "x" * 512), "prompt")):
        with pytest.raises(CapacityError, match="the model's limit 512") as caught:
            raw_recipe(encoder).request(row)
        assert caught.value.param == param
