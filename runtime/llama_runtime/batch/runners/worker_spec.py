"""What a process that runs rows for a job must know, in a form that goes through a pipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llama_runtime.batch.forms.form import form_of
from llama_runtime.batch.forms.formats import Format
from llama_runtime.batch.forms.recipe import Recipe
from llama_runtime.batch.rows.source import Kind
from llama_runtime.bundle import open_bundle
from llama_runtime.generation_config import default_params
from llama_runtime.llm import LLM
from llama_runtime.prompt_encoder import PromptEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """How to make a model and the form of rows, here or elsewhere.

    Attributes:
        bundle: the bundle's directory, as an absolute path.
        kind: what rows are.
        options: sampling options that the job sets, by name.
        chat: whether plain prompts become messages.
        allow_control_tokens: see ``LLM.chat``.
        max_batch: as for ``LLM``.
        max_len: as for ``LLM``.
        threads: as for ``LLM``.
        devices: as for ``LLM``.
        prefix_tokens: as for ``LLM``.
    """

    bundle: str
    kind: Kind
    options: Mapping[str, Any]
    chat: bool
    allow_control_tokens: bool = False
    max_batch: int | Literal["auto"] | None = None
    max_len: int | None = None
    threads: int | None = None
    devices: list[int] | None = None
    prefix_tokens: int | None = None

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkerSpec:
        """What ``to_json`` wrote."""
        spec = cls(**json.loads(text))
        bias = spec.options.get("logit_bias")
        if bias is None:
            return spec
        # The keys of JSON are texts.
        numbers = {int(token_id): value for token_id, value in bias.items()}
        return replace(spec, options={**spec.options, "logit_bias": numbers})

    def load(self) -> tuple[LLM, Format]:
        """The model, and how rows become its requests.

        Raises:
            CaravanError: it can't be loaded.
        """
        encoder = PromptEncoder(open_bundle(Path(self.bundle)))
        recipe = Recipe.of_job(
            encoder,
            default_params(encoder.bundle.generation_config),
            self.options,
            self.chat,
            allow_control_tokens=self.allow_control_tokens,
        )
        return self.model(encoder), form_of(self.kind, recipe, self.options)

    def model(self, encoder: PromptEncoder) -> LLM:
        """The model alone.

        Args:
            encoder: its text side, open already.

        Raises:
            CaravanError: it can't be loaded.
        """
        return LLM(
            encoder,
            max_batch=self.max_batch,
            max_len=self.max_len,
            threads=self.threads,
            devices=self.devices,
            prefix_tokens=self.prefix_tokens,
        )
