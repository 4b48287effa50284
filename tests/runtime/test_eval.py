"""``llama-run eval``: what it measures is what the engine serves, and what it says of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from llama_runtime.backends.fake import Fake
from llama_runtime.backends.ort_cpu import OrtCpu, open_session
from llama_runtime.bundle import Graph, open_bundle
from llama_runtime.bundle_limits import REFERENCE_LOGPROBS
from llama_runtime.cli import cli
from llama_runtime.contract import PROMPT_CHUNK, cache_capacity, last_chunk_start
from llama_runtime.errors import BackendError
from llama_runtime.evaluation import scoring
from llama_runtime.evaluation.reference import read_reference
from llama_runtime.evaluation.scoring import chosen_windows, evaluate, window_steps
from llama_runtime.llm import LLM
from llama_runtime.params import SamplingParams
from tests.evaluated import TEXTS, rewrite_manifest, stand_in_texts, with_reference

KINDS = ["prose", "code"]


def weights(noise: float = 0.0) -> list[tuple[str, Any]]:
    from llama_decoder.tiny import random_weights, tiny_config

    rng = np.random.default_rng(3)
    return [
        (
            name,
            value + np.float32(noise) * value.std() * rng.standard_normal(value.shape, np.float32),
        )
        for name, value in random_weights(tiny_config(), seed=0).items()
    ]


@pytest.fixture(scope="module")
def same(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that was built from the model that it is measured against."""
    return with_reference(tiny_bundle, tmp_path_factory.mktemp("same") / "bundle", weights())


@pytest.fixture(scope="module")
def other(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that was built from another, close to it; all but one token are kept."""
    output = tmp_path_factory.mktemp("other") / "bundle"
    return with_reference(tiny_bundle, output, weights(0.05), top=511)


def test_a_bundle_of_the_same_weights_predicts_the_same(same: Path) -> None:
    report = evaluate(open_bundle(same), threads=1)
    assert list(report.kinds) == KINDS
    assert report.total.tokens == sum(figures.tokens for figures in report.kinds.values()) > 1000
    assert 0 <= report.total.mean_kl < 1e-7
    assert report.total.tail_kl < 1e-6
    assert report.total.top1_agreement > 0.999
    assert abs(report.total.perplexity_ratio - 1) < 1e-5
    assert report.precision == "fp32"
    assert report.passed


def test_the_divergence_from_other_weights_is_the_one_that_torch_finds(
    same: Path, other: Path
) -> None:
    import torch
    from torch.nn import functional as F

    from llama_decoder.decoder import rope_buffers
    from llama_decoder.tiny import tiny_config
    from llama_export.weights_cost import streamed_logits

    report = evaluate(open_bundle(other), threads=1)
    windows = read_reference(open_bundle(other)).windows
    config, prompts = tiny_config(), [window.tokens for window in windows]
    tables = dict(rope_buffers(config))
    with torch.no_grad():
        p, q = (
            torch.from_numpy(
                streamed_logits(
                    config, ((n, torch.from_numpy(w)) for n, w in given), tables, prompts
                )
            )
            .double()
            .log_softmax(1)
            for given in (weights(0.05), weights())
        )
    ends = np.cumsum([len(prompt) for prompt in prompts])
    rows = np.setdiff1d(np.arange(ends[-1]), ends - 1)  # nothing follows the last of a window
    targets = np.concatenate([prompt[1:] for prompt in prompts])
    p, q = p[rows], q[rows]
    divergences = F.kl_div(q, p, log_target=True, reduction="none").sum(1).numpy()
    total = report.total
    assert total.mean_kl > 1e-3
    assert total.mean_kl == pytest.approx(divergences.mean(), rel=1e-3)
    assert total.tail_kl == pytest.approx(np.percentile(divergences, 99.9), rel=1e-2)
    agreement = float((p.argmax(1) == q.argmax(1)).double().mean())
    assert total.top1_agreement == pytest.approx(agreement, abs=1e-3)
    taken = np.arange(len(rows))
    nll = -q[taken, targets].mean().item()
    assert np.log(total.perplexity) == pytest.approx(nll, abs=1e-5)
    difference = nll + p[taken, targets].mean().item()
    assert np.log(total.perplexity_ratio) == pytest.approx(difference, abs=1e-5)
    assert not report.passed


def test_what_is_measured_is_what_the_engine_serves(same: Path) -> None:
    """The log-probabilities of the text are those that the engine reports of a prompt."""
    reference = read_reference(open_bundle(same))
    params = SamplingParams(max_tokens=1, prompt_logprobs=True)
    with LLM(same, max_batch=4, max_len=256, threads=1) as llm:
        prompts = [list(window.tokens[:-1]) for window in reference.windows]
        served = llm.generate(prompts, params)
    with_backend = OrtCpu(
        open_session(open_bundle(same).graph_path("slots"), 1),
        open_bundle(same).manifest.geometry,
        num_slots=1,
        capacity=cache_capacity(256, PROMPT_CHUNK),
    )
    scores = scoring.score(with_backend, reference, range(len(prompts)))
    for number, completion in enumerate(served):
        assert completion.prompt_logprobs is not None
        logprobs = [entry.logprob for entry in completion.prompt_logprobs if entry is not None]
        found = -scores.nll[scores.windows == number]
        np.testing.assert_allclose(found[: len(logprobs)], logprobs, rtol=0, atol=1e-6)
        assert len(logprobs) == len(found) - 1


@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 33, 34, 128, 129, 130, 161, 255, 511])
def test_steps_are_those_of_a_prompt(count: int, multiple: int) -> None:
    """``Fake`` refuses arrays that don't fit together, and its logits tell all tokens before."""
    tokens = np.random.default_rng(count).integers(0, 258, count).tolist()
    backend = Fake(1, cache_capacity(512, PROMPT_CHUNK), 258)
    whole = Fake(1, 512, 258)
    ends: list[int] = []
    rows = []
    for step, start, end in window_steps(tokens, multiple):
        assert len(step.input_ids) % multiple == len(step.logits_rows) % multiple == 0
        assert 0 < end - start <= PROMPT_CHUNK
        assert start == (ends[-1] if ends else 0)
        rows.append(backend.run(step)[: end - start].copy())
        ends.append(end)
    assert ends[-1] == count
    assert all(end % 32 == 0 for end in ends[:-1])
    assert ([0, *ends])[-2] == last_chunk_start(count)
    single = [whole.run(scoring._step(np.array([t]), i, 1))[0].copy() for i, t in enumerate(tokens)]
    assert (np.concatenate(rows) == single).all()


def test_logits_that_are_no_numbers_end_it(same: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = OrtCpu.run

    def broken(self: Any, step: Any) -> Any:
        logits = run(self, step)
        logits[-1, 3] = np.nan
        return logits

    monkeypatch.setattr(OrtCpu, "run", broken)
    with pytest.raises(BackendError, match="no finite numbers"):
        evaluate(open_bundle(same), threads=1)


def test_a_limit_takes_windows_of_every_kind_evenly(same: Path) -> None:
    windows = read_reference(open_bundle(same)).windows
    total = sum(window.num_targets for window in windows)
    assert chosen_windows(windows, None) == chosen_windows(windows, total) == [*range(len(windows))]
    for limit in (1, total // 2, total - 1):
        chosen = chosen_windows(windows, limit)
        assert {windows[i].kind for i in chosen} == set(KINDS)
        assert chosen == sorted(set(chosen))
        assert len(chosen) < len(windows)
    assert len(chosen_windows(windows, 1)) == 2
    done: list[tuple[int, int]] = []
    report = evaluate(
        open_bundle(same), threads=1, limit=1, progress=lambda *given: done.append(given)
    )
    assert done[-1] == (report.total.tokens, report.total.tokens)
    assert report.total.windows == 2


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    stand_in_texts(monkeypatch)

    def run(bundle: Path, *args: object) -> Result:
        line = ["eval", "--bundle", str(bundle), "--threads", "1", *map(str, args)]
        return CliRunner().invoke(cli, line, prog_name="llama-run")

    return run


def test_the_table_is_printed_and_the_verdict_last(run: Run, same: Path) -> None:
    result = run(same)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].endswith(", fp32 against its fp32 source")
    assert [line.split()[0] for line in lines[3:6]] == [*KINDS, "all"]
    assert lines[-1].startswith("fp32 passes: mean KL at most 0.0001 nats")
    assert max(map(len, lines)) <= 80


def test_json_holds_all_figures(run: Run, same: Path) -> None:
    result = run(same, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    assert found["passed"] is True
    assert found["gate"] == {"mean_kl": 1e-4, "top1_agreement": 0.995}
    assert list(found["kinds"]) == KINDS
    assert found["mean_kl"] == evaluate(open_bundle(same), threads=1).as_dict()["mean_kl"]


def test_a_bundle_past_its_gate_fails(run: Run, other: Path) -> None:
    result = run(other)
    assert result.exit_code == 1
    assert result.stderr == ""
    last = result.stdout.splitlines()[-1]
    assert last.startswith("fp32 fails: the mean KL divergence from the fp32 source is ")
    assert run(other, "--json").exit_code == 1


def test_fewer_tokens_are_said(run: Run, same: Path) -> None:
    few, all_of_them = (json.loads(run(same, "--json", *o).stdout) for o in (("--limit", 300), ()))
    assert few["tokens"] < all_of_them["tokens"]


def test_other_texts_are_told(run: Run, same: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_texts(monkeypatch, sha256="6" * 64)
    result = run(same)
    assert result.exit_code == 0
    assert "was built with other evaluation texts" in result.stderr
    assert len(TEXTS) == 3


def refused(result: Result) -> str:
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_a_bundle_without_a_reference_is_refused(run: Run, tiny_bundle: Path) -> None:
    assert "was built without reference_logprobs.bin" in refused(run(tiny_bundle))


def test_a_bundle_for_cuda_is_refused(run: Run, same: Path, tmp_path: Path) -> None:
    shutil.copytree(same, tmp_path / "bundle")
    graphs = (Graph("paged", "fp16", "decoder.onnx"),)
    rewrite_manifest(tmp_path / "bundle", graphs=graphs)
    message = refused(run(tmp_path / "bundle"))
    assert "no graph in the dialect slots" in message
    assert "--target cpu" in message


def test_an_altered_reference_is_refused(run: Run, same: Path, tmp_path: Path) -> None:
    shutil.copytree(same, tmp_path / "bundle")
    path = tmp_path / "bundle" / REFERENCE_LOGPROBS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert f"{REFERENCE_LOGPROBS} was altered" in refused(run(tmp_path / "bundle"))


@pytest.mark.parametrize("option", [("--limit", "0"), ("--threads", "0"), ("--limit", "x")])
def test_options_out_of_range_are_refused(run: Run, same: Path, option: tuple[str, str]) -> None:
    assert run(same, *option).exit_code == 2
