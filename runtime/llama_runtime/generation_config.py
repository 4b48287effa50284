"""What the model's publisher says about generation: end tokens and default sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_runtime.errors import BundleError, RequestError
from llama_runtime.params import SamplingParams


def eos_token_ids(config: Mapping[str, Any]) -> frozenset[int]:
    """Every token that ends a completion.

    Args:
        config: the bundle's ``generation_config.json``.

    Raises:
        BundleError: the entry is neither an id nor a list of ids.
    """
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
        raise BundleError(
            f"generation_config.json: eos_token_id must be token ids, not {value!r:.80}"
        )
    return frozenset(ids)


def default_params(config: Mapping[str, Any]) -> SamplingParams:
    """Sampling where the caller asks for none: greedy, unless the publisher says ``do_sample``.

    Without ``do_sample`` a temperature in the file means nothing to ``transformers`` either, but a
    repetition penalty does.

    Raises:
        BundleError: an entry is out of range.
    """
    sampled = config.get("do_sample") is True
    names = ["repetition_penalty", *(["temperature", "top_k", "top_p", "min_p"] * sampled)]
    given = {name: config[name] for name in names if config.get(name) is not None}
    try:
        return SamplingParams(**(({"temperature": 1.0} if sampled else {}) | given))
    except RequestError as error:
        raise BundleError(f"generation_config.json: {error}") from error
