"""How a row becomes a request: the job's settings, and the row's own before them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llama_runtime.batch.forms.prompt_rows import Row
from llama_runtime.completion import Request
from llama_runtime.errors import CapacityError, RequestError
from llama_runtime.params import SamplingParams, row_seed
from llama_runtime.prompt_encoder import PromptEncoder


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a job asks for wherever a row doesn't say otherwise.

    Attributes:
        encoder: the bundle's tokenizer and chat template.
        params: sampling; its seed is the job's, from which rows get theirs.
        chat: whether a plain prompt becomes a user's message.
        allow_control_tokens: whether the text of a control token in messages becomes that token.
    """

    encoder: PromptEncoder
    params: SamplingParams
    chat: bool
    allow_control_tokens: bool = False

    @classmethod
    def of_job(
        cls,
        encoder: PromptEncoder,
        defaults: SamplingParams,
        options: Mapping[str, Any],
        chat: bool | None,
        *,
        allow_control_tokens: bool = False,
    ) -> Recipe:
        """The settings of a job.

        Args:
            encoder: the bundle's tokenizer and chat template.
            defaults: the bundle's own sampling.
            options: what the job sets instead, by the names of ``SamplingParams``.
            chat: None for whatever the bundle allows.
            allow_control_tokens: see ``LLM.chat``.

        Raises:
            RequestError: an option is out of range, or ``chat`` needs a template that isn't there.
        """
        if chat and not encoder.has_chat_template:
            raise RequestError(
                f"--chat needs a chat template and {encoder.bundle.path} has none: "
                "leave it out to give raw prompts",
                param="chat",
            )
        return cls(
            encoder,
            replace(defaults, **options),
            encoder.has_chat_template if chat is None else chat,
            allow_control_tokens,
        )

    def seeded(self, seed: int) -> Recipe:
        """The same with a seed for the job, unless it has one or its rows must have none."""
        if self.params.seed is not None or self.params.speculation == "auto":
            return self
        return replace(self, params=replace(self.params, seed=seed))

    def request(self, row: Row) -> Request:
        """The request of one row; its seed is settled where the job has one.

        Raises:
            RequestError: the row can't run.
        """
        if row.error is not None:
            raise row.error
        params = replace(self.params, **{"seed": self.seed(row.index), **row.options})
        limit = self.encoder.bundle.manifest.geometry.max_positions
        token_ids = self._encode(row.prompt, limit)
        if (needed := len(token_ids) + params.max_tokens) > limit:
            raise CapacityError(
                f"{len(token_ids)} prompt tokens and max_tokens {params.max_tokens} need {needed} "
                f"tokens, over the model's limit {limit}: shorten the prompt or lower max_tokens",
                param="max_tokens" if len(token_ids) < limit else "prompt",
            )
        return Request(token_ids, params)

    def seed(self, index: int) -> int | None:
        """The seed of a row that sets none; None draws one."""
        return None if self.params.seed is None else row_seed(self.params.seed, index)

    def _encode(self, prompt: str | list[Any] | None, limit: int) -> list[int]:
        if not prompt:
            raise RequestError("the prompt is empty", param="prompt")
        if isinstance(prompt, str) and not self.chat:
            return self.encoder.encode(prompt, max_len=limit)
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        return self.encoder.encode_chat(
            messages, allow_control_tokens=self.allow_control_tokens, max_len=limit
        )
