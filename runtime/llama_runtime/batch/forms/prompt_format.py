"""Rows of prompts or messages, and the lines of what came of them."""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from llama_runtime.batch.forms.formats import Record, whole_object
from llama_runtime.batch.forms.prompt_rows import Row, parse_row
from llama_runtime.batch.forms.recipe import Recipe
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.completion import Completion, Request
from llama_runtime.errors import CaravanError
from llama_runtime.sequence import TokenLogprob


@dataclass(frozen=True, slots=True)
class PromptTask:
    """See ``Task``.

    Attributes:
        row: the row.
        request: what it asks.
    """

    row: Row
    request: Request

    @property
    def requests(self) -> Seq[Request]:
        """See ``Task.requests``."""
        return (self.request,)

    def answer(self, completions: Seq[Seq[Completion]]) -> bytes:
        """See ``Task.answer``."""
        return result_line(self.row, completions[0], self.request.params.seed)

    def explained(self, error: CaravanError, number: int) -> CaravanError:
        """See ``Task.explained``: the names of a row's options are those of the engine."""
        del number
        return error


class PromptFormat:
    """Lines that are prompts, or objects with a prompt or messages; see ``Format``.

    Args:
        recipe: how a row becomes a request.
        is_object: whether a line is a JSON object; otherwise it is the prompt itself.
    """

    errors_apart = False

    def __init__(self, recipe: Recipe, *, is_object: bool) -> None:
        self._recipe = recipe
        self._is_object = is_object

    def id_of(self, record: Record) -> str | None:
        """See ``Format.id_of``; the text "1" and the number 1 are two names."""
        row_id = self._row(record).id
        return None if row_id is None else json.dumps(row_id)

    def echo_of(self, record: Record) -> str:
        """See ``Format.echo_of``."""
        row = self._row(record)
        return _echo({"id": row.id, "prompt": row.prompt})

    def task(self, record: Record) -> PromptTask:
        """See ``Format.task``."""
        row = self._row(record)
        return PromptTask(row, self._recipe.request(row))

    def failure(
        self, record: Record, error: CaravanError, completions: Seq[Seq[Completion]]
    ) -> bytes:
        """See ``Format.failure``: what came of the row stands beside its error."""
        failed = completions[0] if completions else [Completion("", [], "error", error=error)]
        return result_line(self._row(record), failed, None)

    def read(self, line: bytes) -> Outcome:
        """See ``Format.read``."""
        record = whole_object(line)
        try:
            samples = record.get("samples", [record])
            return Outcome(
                index=row_index(record["index"]),
                line=line,
                error=record["error"],
                prompt_tokens=int(record["usage"]["prompt_tokens"]),
                completion_tokens=int(record["usage"]["completion_tokens"]),
                finish_reasons=tuple(sample["finish_reason"] for sample in samples),
                seconds=None,
            )
        except (KeyError, TypeError) as error:
            raise ValueError("it is no result line") from error

    def echo_in(self, line: bytes) -> str:
        """See ``Format.echo_in``."""
        return _echo(json.loads(line))

    def _row(self, record: Record) -> Row:
        return parse_row(record.index, record.line, is_object=self._is_object)


def row_index(value: object) -> int:
    """The index that a result line gives.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r:.80} is no index")
    return value


def result_line(row: Row, completions: Seq[Completion], seed: int | None) -> bytes:
    """One line of the output: UTF-8 JSON and a line end.

    Args:
        row: what was asked.
        completions: what became of it, one or all ``n``.
        seed: the random stream that would have been used; None takes the first completion's.
    """
    first = completions[0]
    samples = [_sample(completion) for completion in completions]
    record: dict[str, object] = {"index": row.index}
    record |= {} if row.id is None else {"id": row.id}
    record["prompt"] = row.prompt
    record |= samples[0] if len(samples) == 1 else {"samples": samples}
    if first.prompt_logprobs is not None:
        record["prompt_logprobs"] = [item and _logprob(item) for item in first.prompt_logprobs]
    record["usage"] = {
        "prompt_tokens": first.num_prompt_tokens,
        "completion_tokens": sum(len(completion.token_ids) for completion in completions),
    }
    record["seed"] = first.seed if seed is None else seed
    errors = [str(completion.error) for completion in completions if completion.error is not None]
    record["error"] = errors[0] if errors else None
    return json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"


def _sample(completion: Completion) -> dict[str, object]:
    """What belongs to one completion; what wasn't asked for is left out."""
    record: dict[str, object] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
    }
    if completion.stop_text is not None:
        record["stop_text"] = completion.stop_text
    if completion.logprobs is not None:
        record["logprobs"] = [_logprob(item) for item in completion.logprobs]
    return record


def _logprob(item: TokenLogprob) -> dict[str, object]:
    top = [{"token_id": token_id, "logprob": logprob} for token_id, logprob in item.top]
    return {"token_id": item.token_id, "logprob": item.logprob} | ({"top": top} if top else {})


def _echo(record: dict[str, Any]) -> str:
    asked = {"id": record.get("id"), "prompt": record.get("prompt")}
    return json.dumps(asked, ensure_ascii=False, sort_keys=True)
