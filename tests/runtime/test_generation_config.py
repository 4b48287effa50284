"""What counts of a publisher's generation_config.json."""

from __future__ import annotations

from typing import Any

import pytest

from llama_runtime.errors import BundleError
from llama_runtime.generation_config import default_params, eos_token_ids
from llama_runtime.params import SamplingParams


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, set()),
        ({"eos_token_id": None}, set()),
        ({"eos_token_id": 2}, {2}),
        ({"eos_token_id": 0}, {0}),
        ({"eos_token_id": [128001, 128008, 128009]}, {128001, 128008, 128009}),
        ({"eos_token_id": []}, set()),
    ],
)
def test_every_end_token_is_read(config: dict[str, Any], expected: set[int]) -> None:
    assert eos_token_ids(config) == expected


@pytest.mark.parametrize("value", ["2", 2.0, True, [2, "3"], [[2]], {"id": 2}, [None]])
def test_end_tokens_that_are_no_ids_are_an_error_of_the_bundle(value: Any) -> None:
    with pytest.raises(BundleError, match="eos_token_id must be token ids, not"):
        eos_token_ids({"eos_token_id": value})


@pytest.mark.parametrize("do_sample", [{}, {"do_sample": False}, {"do_sample": None}])
def test_sampling_counts_only_with_do_sample(do_sample: dict[str, Any]) -> None:
    config = {"temperature": 0.6, "top_p": 0.9, "top_k": 50, **do_sample}
    assert default_params(config) == SamplingParams()


def test_do_sample_takes_what_the_publisher_says() -> None:
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "max_length": 4096}
    assert default_params(config) == SamplingParams(temperature=0.6, top_p=0.9, top_k=50)


def test_do_sample_alone_samples_at_temperature_1() -> None:
    config = {"do_sample": True, "temperature": None, "top_p": None}
    assert default_params(config) == SamplingParams(temperature=1.0)


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1), ("top_p", 1.5), ("top_k", "50"), ("top_p", True)]
)
def test_a_value_out_of_range_is_an_error_of_the_bundle(name: str, value: Any) -> None:
    with pytest.raises(BundleError, match=rf"^generation_config\.json: {name} must"):
        default_params({"do_sample": True, name: value})
