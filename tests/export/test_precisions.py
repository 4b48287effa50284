"""Which precisions a target takes, and that command and runtime know the same ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llama_export import cli
from llama_export.errors import ExportError
from llama_export.host_weights import BLOCKS
from llama_export.precision import TARGETS
from llama_export.precisions import CPU_PRECISIONS, CUDA_PRECISIONS, KV_CACHES, choose_precision
from llama_runtime import cuda_loading, slots_precision


@pytest.mark.parametrize(
    ("target", "name", "chosen"),
    [("cpu", None, "fp32"), ("cuda", None, "fp16"), ("cuda", "bf16", "bf16")],
)
def test_a_target_has_a_default(target: str, name: str | None, chosen: str) -> None:
    recipe = choose_precision(target, name)
    assert (recipe.name, recipe.target) == (chosen, target)


@pytest.mark.parametrize(
    ("target", "name"), [("cpu", "fp16"), ("cuda", "fp32"), ("cuda", "int3"), ("tpu", None)]
)
def test_a_wrong_combination_says_what_is_possible(target: str, name: Any) -> None:
    with pytest.raises(ExportError, match="cpu takes fp32 or int8 or int4; cuda takes fp16"):
        choose_precision(target, name)


@pytest.mark.parametrize("name", [None, "fp32", "int8", "int4"])
def test_an_int8_cache_goes_with_every_precision_of_a_cpu(name: str | None) -> None:
    """And changes nothing of the weights."""
    plain, recipe = choose_precision("cpu", name), choose_precision("cpu", name, "int8")
    assert recipe.name == f"{name or 'fp32'}+int8kv"
    assert recipe is CPU_PRECISIONS[recipe.name]
    assert (plain.dialect.cache_dtype, recipe.dialect.cache_dtype) == ("float32", "int8")
    assert replace(recipe, name=plain.name, cache=None) == plain
    assert slots_precision._CACHES[recipe.name] == "int8"


def test_the_runtime_knows_every_precision_of_a_cpu() -> None:
    caches = {name: recipe.dialect.cache_dtype for name, recipe in CPU_PRECISIONS.items()}
    assert caches == slots_precision._CACHES


@pytest.mark.parametrize("name", [None, "fp16", "bf16", "int4"])
def test_an_fp8_cache_goes_with_every_precision_of_cuda(name: str | None) -> None:
    """And changes nothing of the weights."""
    plain, recipe = choose_precision("cuda", name), choose_precision("cuda", name, "fp8")
    assert plain == choose_precision("cuda", name, "same")
    assert recipe.name == f"{name or 'fp16'}+fp8kv"
    assert recipe is CUDA_PRECISIONS[recipe.name]  # where verify finds what the manifest names
    assert plain.cache is None
    assert plain.dialect.cache_dtype == plain.activations
    assert recipe.dialect.cache_dtype == recipe.cache == "float8e4m3fn"
    assert recipe.dialect.logits_dtype == plain.activations
    assert recipe.weights == plain.weights == plain.name
    assert replace(recipe, name=plain.name, cache=None) == plain


@pytest.mark.parametrize(
    ("target", "kv_cache"), [("cpu", "fp8"), ("tensorrt", "int8"), ("cuda", "int8"), ("cuda", "")]
)
def test_a_cache_that_the_target_lacks_says_what_is_possible(target: str, kv_cache: str) -> None:
    with pytest.raises(
        ExportError, match=f"{kv_cache}.*cpu takes same or int8; cuda takes same or fp8"
    ):
        choose_precision(target, None, kv_cache)


def test_the_runtime_knows_the_types_of_every_precision_of_cuda() -> None:
    recipes = [recipe for recipe in CUDA_PRECISIONS.values() if recipe.target == "cuda"]
    types = {r.name: (r.dialect.logits_dtype, r.dialect.cache_dtype) for r in recipes}
    assert types == cuda_loading._DTYPES


def test_an_fp8_cache_is_not_asked_for_by_the_name_of_a_precision() -> None:
    with pytest.raises(ExportError, match="cpu takes fp32 or int8 or int4; cuda takes fp16"):
        choose_precision("cuda", "fp16+fp8kv")


def test_the_command_offers_what_there_is() -> None:
    assert set(cli.TARGETS) == set(TARGETS)
    recipes = (CPU_PRECISIONS | CUDA_PRECISIONS).values()
    assert set(cli.PRECISIONS) == {recipe.weights for recipe in recipes}
    assert tuple(map(str, BLOCKS)) == cli.BLOCK_SIZES
    assert set(cli.KV_CACHES) == set(KV_CACHES)
