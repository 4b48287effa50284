"""``lm-eval`` asks a server about a small task of its own, and finds what ``LLM`` finds itself."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_runtime.llm import LLM
from llama_runtime.params import SamplingParams
from scripts.conformance_venv import output_of, program, write_tokenizer
from scripts.findings import Findings
from scripts.serving_process import Server

PACKAGES = ("lm_eval[api]>=0.4.9,<0.5", "transformers")
CHOICE, TEXT = "caravan_choice", "caravan_text"
_ITEMS = 24
_TOKENS = 12  # of a completion
_OFF = 1e-5  # what sums of log-probabilities may differ by, from being written and added
_COLOURS = ("red", "blue", "green", "yellow", "black")
_THINGS = ("sky", "grass", "blood", "night", "sun", "sea", "coal", "leaf")


@dataclass(frozen=True, slots=True)
class Item:
    """A question with answers to choose from.

    Attributes:
        question: the context.
        choices: how it may go on.
        answer: the index of the right one.
    """

    question: str
    choices: list[str]
    answer: int


def prove(server: Server, llm: LLM, folder: Path, venvs: Path, findings: Findings) -> None:
    """Run both tasks, and compare every score.

    Args:
        server: to ask.
        llm: the same model.
        folder: an empty one.
        venvs: where lm-eval is, or will be.
        findings: what is found.
    """
    items = _items()
    texts = _continued(llm, [item.question for item in items])
    lm_eval = program(venvs, "lm_eval", *PACKAGES)
    tokenizer = write_tokenizer(llm.bundle.path, folder / "tokenizer")
    _write_tasks(folder, items, texts)
    arguments = {
        "model": server.model,
        "base_url": f"http://127.0.0.1:{server.port}/v1/completions",
        "tokenizer": str(tokenizer),
        "tokenizer_backend": "huggingface",
        "num_concurrent": 4,
    }
    for requests in ("True", "False"):  # prompts as token ids, and as texts
        given = ",".join(f"{key}={value}" for key, value in arguments.items())
        output = folder / f"tokenized-{requests}"
        command = [
            *(str(lm_eval), "--model", "local-completions"),
            *("--model_args", f"{given},tokenized_requests={requests}"),
            *("--tasks", f"{CHOICE},{TEXT}", "--include_path", str(folder / "tasks")),
            *("--output_path", str(output), "--log_samples"),
        ]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        output_of(command, folder, offline | {"OPENAI_API_KEY": server.key or ""})
        _compare(llm, items, texts, output, findings)


def _items() -> list[Item]:
    """Questions without right answers: one of the choices is called right by chance."""
    numbers = random.Random(0)
    found = []
    for index in range(_ITEMS):
        thing = numbers.choice(_THINGS)
        choices = [f" {colour}" for colour in numbers.sample(_COLOURS, 4)]
        question = f"Question {index}: what colour has the {thing}?\nAnswer: the {thing} is"
        found.append(Item(question, choices, numbers.randrange(4)))
    return found


def _continued(llm: LLM, prompts: list[str]) -> list[str]:
    params = SamplingParams(max_tokens=_TOKENS, stop=("\n",))
    return [one.text for one in llm.generate(prompts, params)]


def _write_tasks(folder: Path, items: list[Item], texts: list[str]) -> None:
    tasks = folder / "tasks"
    tasks.mkdir()
    rows = [
        {
            "question": item.question,
            "choices": item.choices,
            "answer": item.answer,
            "text": text if index % 2 else f"not {text}",
        }
        for index, (item, text) in enumerate(zip(items, texts, strict=True))
    ]
    data = tasks / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
    }
    choice: dict[str, Any] = {
        "task": CHOICE,
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
    }
    choice |= {"doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}]}
    text: dict[str, Any] = {
        "task": TEXT,
        "output_type": "generate_until",
        "doc_to_target": "{{text}}",
    }
    text |= {"metric_list": [{"metric": "exact_match"}]}
    text |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": _TOKENS, "do_sample": False}}
    for one in (choice, text):  # JSON is YAML
        (tasks / f"{one['task']}.yaml").write_text(json.dumps(common | one))


def _compare(
    llm: LLM, items: list[Item], texts: list[str], output: Path, findings: Findings
) -> None:
    results = _only(output, "results_*.json")[0]["results"]
    scores = _scores(llm, items)
    right = [row.index(max(row)) == item.answer for row, item in zip(scores, items, strict=True)]
    accuracy = sum(right) / len(right)
    found = results[CHOICE]["acc,none"]
    findings.hold("lm-eval finds the accuracy of LLM", found == accuracy, (found, accuracy))
    findings.figures["lm_eval_accuracy"] = found
    for sample in _only(output, f"samples_{CHOICE}_*.jsonl"):
        given = [float(one[0][0]) for one in sample["resps"]]
        own = scores[sample["doc_id"]]
        same = max(abs(a - b) for a, b in zip(given, own, strict=True)) <= _OFF
        findings.hold("a choice has the score that LLM gives it", same, (given, own))
    exact = results[TEXT]["exact_match,none"]
    findings.hold("half of the texts are said to be right", exact == 0.5, exact)
    for sample in _only(output, f"samples_{TEXT}_*.jsonl"):
        text, own = sample["resps"][0][0], texts[sample["doc_id"]]
        findings.hold("a text is that of LLM.generate", text == own, (text, own))


def _scores(llm: LLM, items: list[Item]) -> list[list[float]]:
    """The log-probability of each choice after its question."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=True)
    texts = [item.question + choice for item in items for choice in item.choices]
    scored = iter(llm.generate(texts, params))
    found = []
    for item in items:
        start = len(llm.tokenizer.encode(item.question))
        row = [next(scored).prompt_logprobs or [] for _ in item.choices]
        found.append([sum(one.logprob for one in given[start:] if one) for given in row])
    return found


def _only(output: Path, pattern: str) -> list[Any]:
    """The JSON values of the one file of a name."""
    (path,) = output.rglob(pattern)
    text = path.read_text()
    return (
        [json.loads(text)] if path.suffix == ".json" else list(map(json.loads, text.splitlines()))
    )
