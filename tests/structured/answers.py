"""A model's answers under schemas, beside requests that are free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llama_runtime.completion import Completion, Request
from llama_runtime.llm import LLM
from llama_runtime.params import SamplingParams
from tests.structured.builders import Schema
from tests.structured.walks import complaint

FREE_TOKENS = 10
FREE_PROMPTS = ("Once upon a time, {} was", "The history of {} begins", "Q: What is {}?\nA:")


@dataclass
class Answers:
    """What became of the requests under schemas, and of their free neighbours.

    Attributes:
        finished: how many ended by themselves.
        cut_off: how many ran into ``max_tokens``.
        complaints: a sentence for each that broke a law.
    """

    finished: int = 0
    cut_off: int = 0
    complaints: list[str] = field(default_factory=list)


def ask(
    llm: LLM, schemas: Mapping[str, Schema], temperatures: Sequence[float], max_tokens: int
) -> Answers:
    """Have each schema filled in at each temperature, between free requests, and judge.

    Args:
        llm: with room for twice as many sequences as shall be held to schemas at once.
        schemas: by name, which is what the model is asked for.
        temperatures: of the requests.
        max_tokens: of each form.
    """
    wanted = [(name, t) for name in schemas for t in temperatures]
    forms = [
        Request(
            llm.chat_prompt([{"role": "user", "content": f"Fill in this form as JSON: {name}"}]),
            SamplingParams(max_tokens=max_tokens, temperature=t, seed=i, json_schema=schemas[name]),
        )
        for i, (name, t) in enumerate(wanted)
    ]
    free = [
        Request(
            FREE_PROMPTS[i % len(FREE_PROMPTS)].format(name),
            SamplingParams(max_tokens=FREE_TOKENS, temperature=t, seed=i, ignore_eos=True),
        )
        for i, (name, t) in enumerate(wanted)
    ]
    mixed = _run(llm, [request for pair in zip(forms, free, strict=True) for request in pair])
    alone = _run(llm, free)
    answers = Answers()
    for i, (name, t) in enumerate(wanted):
        form, neighbour = mixed[2 * i], mixed[2 * i + 1]
        where = f"{name}, temperature {t}"
        _judge(answers, form, schemas[name], where)
        if neighbour.error or neighbour.token_ids != alone[i].token_ids:
            answers.complaints.append(f"{where}: the free neighbour has other tokens than alone")
    return answers


def _judge(answers: Answers, form: Completion, schema: Schema, where: str) -> None:
    if form.finish_reason == "length":
        answers.cut_off += 1
        return
    if form.error is not None:
        answers.complaints.append(f"{where}: {form.error}")
        return
    answers.finished += 1
    wrong = complaint(schema, form.text)
    if wrong is not None:
        answers.complaints.append(f"{where}: {wrong}: {form.text}")


def _run(llm: LLM, requests: Sequence[Request]) -> list[Completion]:
    return [completion for _, completion in sorted(llm.run(requests), key=lambda pair: pair[0])]
