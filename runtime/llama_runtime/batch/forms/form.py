"""Which form the rows of a job have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_runtime.batch.forms.formats import Format
from llama_runtime.batch.forms.openai_format import OpenAiFormat
from llama_runtime.batch.forms.prompt_format import PromptFormat
from llama_runtime.batch.forms.recipe import Recipe
from llama_runtime.batch.rows.source import Kind


def form_of(kind: Kind, recipe: Recipe, options: Mapping[str, Any]) -> Format:
    """What rows of a kind look like, and their results.

    Args:
        kind: of the rows.
        recipe: how they become requests.
        options: the sampling options that the job sets.
    """
    if kind == "openai":
        return OpenAiFormat(recipe, options)
    return PromptFormat(recipe, is_object=kind == "jsonl")
