"""What tests of batch jobs share: rows, a job in this process, and results without any model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, cast

from click.testing import Result

from llama_runtime.batch.figures.statistics import Statistics
from llama_runtime.batch.forms.formats import Format, Record
from llama_runtime.batch.forms.openai_format import OpenAiFormat
from llama_runtime.batch.forms.prompt_format import PromptFormat
from llama_runtime.batch.forms.recipe import Recipe
from llama_runtime.batch.job import Job
from llama_runtime.batch.results.ledger import Ledger
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.batch.rows.lines import LineReader
from llama_runtime.batch.runners.runner import LocalRunner
from llama_runtime.llm import LLM
from llama_runtime.prompt_encoder import PromptEncoder

Given = dict[str, Any] | str
NO_RECIPE = cast(Recipe, None)  # results can be read without one
PROMPTS = PromptFormat(NO_RECIPE, is_object=True)
OPENAI = OpenAiFormat(NO_RECIPE, {})
# Of ``llama-run batch``, beside which rows of ``mixed_rows`` end in another order than they begin.
OPTIONS = ("--seed", 0, "--max-tokens", 40, "--max-batch", 4, "--no-chat")
Run = Callable[..., Result]
KilledAfter = Callable[..., list[int]]


def jsonl(rows: Seq[Given]) -> bytes:
    """A file of JSON objects, or of lines as they are."""
    return "".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows).encode()


def records_of(data: bytes) -> Iterator[Record]:
    return (Record(index, line) for index, line in enumerate(LineReader(io.BytesIO(data))))


def recipe_of(llm: LLM, chat: bool | None = False, **options: Any) -> Recipe:
    encoder = PromptEncoder(llm.bundle)
    return Recipe.of_job(encoder, llm.default_params, {"max_tokens": 24, **options}, chat)


def results_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def run_job(
    llm: LLM,
    rows: Seq[Given],
    path: Path,
    recipe: Recipe | None = None,
    *,
    form: Format | None = None,
    errors: Path | None = None,
    journal: Path | None = None,
    ordered: bool = True,
    window: int = 32,
    ended: Callable[[Outcome], None] = lambda _: None,
) -> Statistics:
    """Run a job, or go on with one; ``ended`` is told of each row before its line is written."""
    form = form or PromptFormat(recipe or recipe_of(llm, seed=0), is_object=True)
    statistics = Statistics()

    class Watched(Ledger):
        def add(self, outcome: Outcome) -> None:
            ended(outcome)
            super().add(outcome)

    ledger = Watched(form, path, errors, ordered=ordered, journal=journal)
    ledger.window = window
    for outcome in ledger.recover({}):
        statistics.count(outcome)
    try:
        Job(ledger, statistics, None, lambda: 0).run(
            LocalRunner(llm, form), records_of(jsonl(rows))
        )
    finally:
        ledger.close()
    return statistics


def mixed_rows(count: int) -> list[Given]:
    """Rows whose lengths are so different that they end in another order than they begin."""
    return [
        {"prompt": f"row {i} " + "x" * (i * 37 % 90), "max_tokens": 1 + i * 23 % 60}
        for i in range(count)
    ]


def made_up(form: Format, index: int, *, fails: bool = False, text: str = "") -> Outcome:
    """The outcome of a row that never ran."""
    error = f"row {index} failed" if fails else None
    if isinstance(form, OpenAiFormat):
        name = f"batch_req_{index:012}"
        body: dict[str, Any] = {"choices": [{"finish_reason": "stop", "text": text}], "usage": {}}
        record: dict[str, Any] = {
            "id": name,
            "custom_id": f"c{index}",
            "response": {"status_code": 400 if fails else 200, "request_id": name, "body": body},
            "error": {"message": error} if fails else None,
        }
    else:
        record = {
            "index": index,
            "prompt": f"p{index}",
            "text": text,
            "finish_reason": "error" if fails else "stop",
            "usage": {"prompt_tokens": 1, "completion_tokens": len(text)},
            "error": error,
        }
    return form.read(json.dumps(record).encode() + b"\n")


def refused(result: Result) -> str:
    """The one sentence of a refusal."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.stderr.endswith(error + "\n")
    return error


def openai_rows(count: int) -> list[Given]:
    return [
        {
            "custom_id": f"c{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "fake-llama", "prompt": f"row {i}", "max_tokens": 1 + i * 7 % 30},
        }
        for i in range(count)
    ]


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    """A line of OpenAI's form without the moment of its answer."""
    line["response"]["body"].pop("created", None)
    return line
