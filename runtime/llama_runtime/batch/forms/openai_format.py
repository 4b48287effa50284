"""Rows of OpenAI's Batch API, and the lines that it answers with.

Source: the guide to that API and the ``openai`` package. A result line is ``{"id", "custom_id",
"response", "error"}``; those of rows that failed go to a file of their own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

from llama_runtime.batch.forms.formats import Record, whole_object
from llama_runtime.batch.forms.prompt_rows import MAX_ID_CHARACTERS, load_object
from llama_runtime.batch.forms.recipe import Recipe
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.batch.rows.lines import Line
from llama_runtime.completion import Completion, Request
from llama_runtime.errors import CaravanError, RequestError
from llama_runtime.openai_api.errors import ModelNotFoundError, error_body
from llama_runtime.openai_api.parsing import parse_chat, parse_completion
from llama_runtime.openai_api.requests import Prepared
from llama_runtime.openai_api.responses import Head, answer_body

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_KEYS = ("custom_id", "method", "url", "body")
_ID_PREFIX = "batch_req_"


@dataclass(frozen=True, slots=True)
class OpenAiTask:
    """See ``Task``.

    Attributes:
        index: of the row.
        custom_id: the row's name.
        prepared: what it asks.
        model: the model's name.
    """

    index: int
    custom_id: str
    prepared: Prepared
    model: str

    @property
    def requests(self) -> Seq[Request]:
        """See ``Task.requests``."""
        return self.prepared.requests

    def answer(self, completions: Seq[Seq[Completion]]) -> bytes:
        """See ``Task.answer``."""
        kind = "chatcmpl" if self.prepared.request.kind == "chat" else "cmpl"
        head = Head(f"{kind}-{self.index:012}", int(time.time()), self.model)
        return _line(self.index, self.custom_id, 200, answer_body(self.prepared, completions, head))

    def explained(self, error: CaravanError, number: int) -> CaravanError:
        """See ``Task.explained``."""
        return self.prepared.explained(error, number)


class OpenAiFormat:
    """Lines of OpenAI's Batch API; see ``Format``.

    Args:
        recipe: what counts where a body is silent, and the model.
        options: the sampling options that the job sets.
    """

    errors_apart = True

    def __init__(self, recipe: Recipe, options: Mapping[str, Any]) -> None:
        self._recipe = recipe
        self._options = options

    def id_of(self, record: Record) -> str | None:
        """See ``Format.id_of``."""
        return _custom_id_of(record.line)

    def echo_of(self, record: Record) -> str:
        """See ``Format.echo_of``."""
        return json.dumps(_custom_id_of(record.line))

    def task(self, record: Record) -> OpenAiTask:
        """See ``Format.task``."""
        where = f"line {record.line.number}"
        given = load_object(record.line)
        for key in given:
            if key not in _KEYS:
                raise RequestError(
                    f"{where} has an unknown key {key!r:.80}; a row has {', '.join(_KEYS)}",
                    param=key,
                )
        custom_id = _custom_id(given)
        if custom_id is None:
            raise RequestError(
                f"{where}: custom_id must be a text of 1 to {MAX_ID_CHARACTERS} characters, not "
                f"{given.get('custom_id')!r:.80}",
                param="custom_id",
            )
        if given.get("method") != "POST":
            raise RequestError(
                f"{where}: method must be POST, not {given.get('method')!r:.80}", param="method"
            )
        url, body = given.get("url"), given.get("body")
        if url not in (_CHAT, _COMPLETIONS):
            raise RequestError(
                f"{where}: url must be {_CHAT} or {_COMPLETIONS}, not {url!r:.80}", param="url"
            )
        prepared = self._prepared(record.index, url, body)
        return OpenAiTask(record.index, custom_id, prepared, self._model)

    def failure(
        self, record: Record, error: CaravanError, completions: Seq[Seq[Completion]]
    ) -> bytes:
        """See ``Format.failure``: an error is all that this API answers with."""
        del completions
        status, body = error_body(error, public=False)
        return _line(record.index, _custom_id_of(record.line), status, body)

    def read(self, line: bytes) -> Outcome:
        """See ``Format.read``."""
        record = whole_object(line)
        try:
            prefix, digits = record["id"][: len(_ID_PREFIX)], record["id"][len(_ID_PREFIX) :]
            if prefix != _ID_PREFIX or not digits.isascii() or not digits.isdigit():
                raise ValueError(f"{record['id']!r:.80} is no id of a result")
            error, body = record["error"], record["response"]["body"]
            usage = body["usage"] if error is None else {}
            choices = body["choices"] if error is None else [{"finish_reason": "error"}]
            return Outcome(
                index=int(digits),
                line=line,
                error=None if error is None else str(error["message"]),
                prompt_tokens=int(usage.get("prompt_tokens", 0)),
                completion_tokens=int(usage.get("completion_tokens", 0)),
                finish_reasons=tuple(_reason(choice["finish_reason"]) for choice in choices),
                seconds=None,
            )
        except (KeyError, TypeError) as reason:
            raise ValueError("it is no result line") from reason

    def echo_in(self, line: bytes) -> str:
        """See ``Format.echo_in``."""
        return json.dumps(json.loads(line)["custom_id"])

    @property
    def _model(self) -> str:
        return self._recipe.encoder.bundle.manifest.name

    def _prepared(self, index: int, url: str, body: object) -> Prepared:
        defaults = replace(self._recipe.params, seed=self._recipe.seed(index))
        if url == _CHAT:
            request = parse_chat(body, defaults)
        else:
            if isinstance(body, dict) and "max_tokens" in self._options:  # else it is OpenAI's 16
                body = {"max_tokens": self._options["max_tokens"], **body}
            request = parse_completion(body, defaults)
        if request.stream:
            raise RequestError("stream can't be true: a batch has whole answers", param="stream")
        if request.model != self._model:
            raise ModelNotFoundError(request.model, [self._model])
        return request.prepared(
            self._recipe.encoder, allow_control_tokens=self._recipe.allow_control_tokens
        )


def _line(index: int, custom_id: str | None, status: int, body: Mapping[str, Any]) -> bytes:
    name = f"{_ID_PREFIX}{index:012}"
    failed = None if status == 200 else body["error"]
    record = {
        "id": name,
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": name, "body": body},
        "error": failed,
    }
    return json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"


def _reason(reason: str) -> str:
    """As the engine says it, to whom an answer that calls tools is one that ended."""
    return "stop" if reason == "tool_calls" else reason


def _custom_id_of(line: Line) -> str | None:
    try:
        return _custom_id(load_object(line))
    except RequestError:
        return None


def _custom_id(given: Mapping[str, Any]) -> str | None:
    value = given.get("custom_id")
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_ID_CHARACTERS:
        return None
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair
        return None
    return value
