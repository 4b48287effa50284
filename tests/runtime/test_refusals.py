"""What can't be run is refused by the name of the parameter, and harms nobody beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

from llama_runtime.backends.fake import Fake
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.errors import RequestError
from llama_runtime.llm import LLM
from llama_runtime.params import SamplingParams
from llama_runtime.slots_engine import slots_engine
from tests.runtime.batch.jobs import recipe_of, results_in, run_job
from tests.runtime.test_params import OUT_OF_RANGE

VOCAB_SIZE = 64


@pytest.fixture
def engine() -> Engine:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return slots_engine(
        Fake(2, 64, VOCAB_SIZE),
        TokenBytes(tokenizer),
        [2],
        vocab_size=VOCAB_SIZE,
        max_batch=2,
        max_len=64,
        prompt_budget=33,
        max_chunk=33,
    )


@pytest.mark.parametrize("outside", [VOCAB_SIZE, VOCAB_SIZE + 1, 2**31 - 1])
@pytest.mark.parametrize("name", ["stop_token_ids", "logit_bias"])
def test_ids_outside_the_vocabulary_are_refused_by_name(
    engine: Engine, name: str, outside: int
) -> None:
    ids = [VOCAB_SIZE - 1, outside, 0]
    values: dict[str, Any] = {"stop_token_ids": ids, "logit_bias": dict.fromkeys(ids, 1.0)}
    with pytest.raises(RequestError, match=rf"^{name}: .* 0 to 63, not 0 to {outside}$") as refusal:
        engine.add([5], SamplingParams(max_tokens=1, **{name: values[name]}))
    assert refusal.value.param == name
    assert not engine.has_work


def test_the_first_and_the_last_id_of_the_vocabulary_are_taken(engine: Engine) -> None:
    ends = [0, VOCAB_SIZE - 1]
    params = SamplingParams(
        max_tokens=1, stop_token_ids=frozenset(ends), logit_bias=dict.fromkeys(ends, -1)
    )
    engine.add([5], params)
    assert len(engine.step()) == 1


@pytest.mark.parametrize("n", [1, 3])
def test_a_sample_beyond_n_is_refused(engine: Engine, n: int) -> None:
    params = SamplingParams(max_tokens=1, n=n)
    for sample in (n, -1):
        with pytest.raises(RequestError, match=f"0 to {n - 1}, not {sample}") as refusal:
            engine.add([5], params, sample=sample)
        assert refusal.value.param == "n"
    assert engine.add([5], params, sample=n - 1).sample == n - 1


def in_json() -> list[tuple[str, Any]]:
    """Every value out of range that a line of JSON can hold, and that isn't in range there."""
    several = []
    for name, values in OUT_OF_RANGE.items():
        for value in values:
            try:
                line = json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                continue
            # A null counts as left out, and keys are texts.
            if value is not None and value != {"1": 1}:
                several.append((name, json.loads(line)))
    return several


def test_rows_out_of_range_leave_the_other_rows_of_their_job_unharmed(
    fake_llm: LLM, tmp_path: Path
) -> None:
    bad = in_json()
    assert {name for name, _ in bad} == OUT_OF_RANGE.keys()
    good = [{"prompt": f"row {i}", "temperature": 1.5, "seed": i} for i in range(len(bad))]

    def run(records: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
        run_job(fake_llm, records, tmp_path / name, recipe_of(fake_llm, max_tokens=12))
        return results_in(tmp_path / name)

    wrong = [{"prompt": f"bad {i}", name: value} for i, (name, value) in enumerate(bad)]
    together = run([row for pair in zip(wrong, good, strict=True) for row in pair], "together")
    for (name, value), found in zip(bad, together[::2], strict=True):
        assert found["finish_reason"] == "error", (name, value)
        assert found["error"].startswith(name)
    alone = run(good, "alone")
    for one, other in zip(alone, together[1::2], strict=True):
        assert one["error"] is None
        assert {**one, "index": 0} == {**other, "index": 0}
