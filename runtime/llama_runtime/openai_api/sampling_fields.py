"""The fields of a body that become ``SamplingParams``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from llama_runtime.errors import RequestError
from llama_runtime.openai_api.fields import Fields, named
from llama_runtime.params import SamplingParams

_SAME = (
    "temperature",
    "top_p",
    "n",
    "stop",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    # what vLLM takes beside OpenAI's
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "priority",
    "cache_salt",
)
_FORMAT_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DIGITS = 19  # of 2^63, the most that a token id could have


@dataclass(slots=True)
class SamplingFields:
    """What a body says of sampling, unchecked, and how the body spells it.

    Attributes:
        options: by the names of ``SamplingParams``.
        paths: the field's path in the body, by the same names.
    """

    options: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, fields: Fields) -> SamplingFields:
        """Those that chats and completions have in common.

        Raises:
            RequestError: a field can't be read.
        """
        sampling = cls()
        for name in _SAME:
            sampling.put(name, fields.take(name), name)
        top_k = fields.take("top_k")
        sampling.put("top_k", 0 if top_k == -1 else top_k, "top_k")  # vLLM turns it off so too
        name = "include_stop_str_in_output"
        sampling.put("include_stop", fields.flag(name), name)
        sampling.put("logit_bias", _bias(fields.take("logit_bias")), "logit_bias")
        sampling._take_format(fields)
        sampling._take_structured_outputs(fields)
        return sampling

    def put(self, option: str, value: object, path: str) -> None:
        """Set an option, unless the value is None."""
        if value is not None:
            self.options[option] = value
            self.paths[option] = path

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """The parameters of the request.

        Args:
            defaults: what counts where the body is silent.

        Raises:
            RequestError: one is out of range; ``param`` is the field's path.
        """
        try:
            return replace(defaults, **self.options)
        except RequestError as error:
            explained = named(error, self.paths)
            if explained is error:
                raise
            raise explained from error

    def _take_format(self, fields: Fields) -> None:
        given = fields.nested("response_format")
        if given is None:
            return
        kind = given.need("type")
        if kind == "json_object":
            self.put("json_schema", {"type": "object"}, "response_format")
        elif kind == "json_schema":
            schema = given.nested("json_schema")
            if schema is None:
                raise given.wrong("json_schema", "is missing")
            self._take_schema(schema)
        elif kind != "text":
            raise given.wrong("type", f"must be text, json_object or json_schema, not {kind!r:.80}")
        given.refuse((), {})

    def _take_schema(self, fields: Fields) -> None:
        """The schema; its name and description label it, and ``strict`` is kept either way."""
        name = fields.need("name")
        if not isinstance(name, str) or not _FORMAT_NAME.fullmatch(name):
            raise fields.wrong("name", f"must be 1 to 64 letters, digits, _ or -, not {name!r:.80}")
        fields.text("description")
        fields.flag("strict")
        schema = fields.need("schema")
        if not isinstance(schema, dict):
            raise fields.wrong("schema", f"must be an object, not {type(schema).__name__}")
        self.put("json_schema", schema, fields.path("schema"))
        fields.refuse((), {})

    def _take_structured_outputs(self, fields: Fields) -> None:
        """The form of vLLM; its grammars are Lark here."""
        given = fields.nested("structured_outputs")
        if given is None:
            return
        schema = given.take("json")
        if given.flag("json_object"):
            if schema is not None:
                raise given.wrong("json_object", "can't be given beside json")
            schema = {"type": "object"}
        if schema is not None and "json_schema" in self.options:
            raise given.wrong("json", "can't be given beside response_format")
        self.put("json_schema", schema, given.path("json"))
        for name in ("regex", "choice", "grammar"):
            self.put(name, given.take(name), given.path(name))
        given.refuse((), {})


def _bias(value: object) -> object:
    """Keys of JSON are texts; those that are no ids are left for ``SamplingParams`` to refuse."""
    if not isinstance(value, dict):
        return value
    return {_token_id(key): bias for key, bias in value.items()}


def _token_id(key: str) -> int | str:
    is_id = key.isascii() and key.isdecimal() and len(key) <= _DIGITS
    return int(key) if is_id and key == str(int(key)) else key
