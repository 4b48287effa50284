"""What the comparison says of the quality of peers is what it is; peers are played by fakes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llama_runtime.bundle_limits import REFERENCE_LOGPROBS
from llama_runtime.errors import BackendError
from llama_runtime.evaluation.partition import predictions
from llama_runtime.evaluation.reference import Reference, Window, encoded
from llama_runtime.evaluation.report import Figures
from scripts.bench_peers import parsed
from scripts.peers import openvino_logits
from scripts.peers.compare import Runner
from scripts.peers.process import ROOT, Worker, WorkerError
from scripts.peers.quality import least, measured, table

Floats = npt.NDArray[np.float64]

VOCABULARY = 40
COMMON = ["--threads", "1", "--slots", "1", "--max-len", "64"]
# What it predicts depends on how much came before, and on a table of what follows each token. Its
# name says how it misbehaves.
FAKE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from scripts.peers.protocol import Loaded, serve

def load(options):
    import numpy as np
    table, name = np.load(options.model.with_name("table.npy")), options.model.name

    def logits(tokens):
        if name == "broken":
            raise ValueError("no such operator")
        rows = (table[tokens] * (1 + np.arange(len(tokens)) / 50)[:, None]).astype(np.float32)
        if name == "doubled":
            rows = rows.astype(np.float64)
        if name == "nan":
            rows[3, 5] = np.nan
        return rows[-1:] if name == "last" else rows

    return Loaded(None, len, None if name == "silent" else logits)

serve(load)
"""


@pytest.fixture(scope="module")
def tables() -> tuple[Floats, Floats]:
    """What follows each token by the source, and by a model near it."""
    rng = np.random.default_rng(5)
    source = 2 * rng.standard_normal((VOCABULARY, VOCABULARY))
    return source, source + 0.3 * rng.standard_normal(source.shape)


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    rng = np.random.default_rng(6)
    return [
        Window(kind, tuple(rng.integers(0, VOCABULARY, count).tolist()))
        for kind, count in (("prose", 60), ("code", 25), ("prose", 41))
    ]


def logprobs(table: Floats, windows: list[Window]) -> Floats:
    """Of all places, float64 [P, V]."""
    rows = [
        table[list(window.tokens[:-1])] * (1 + np.arange(window.num_targets) / 50)[:, None]
        for window in windows
    ]
    logits = np.concatenate(rows)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))


@pytest.fixture(scope="module")
def reference(tables: tuple[Floats, Floats], windows: list[Window]) -> Reference:
    """The source's predictions; all tokens but one are kept, so no estimate is left to chance."""
    rows = logprobs(tables[0], windows)
    order = np.argsort(-rows, axis=1)
    top_ids, sample_ids = order[:, :-1], order[:, -1:]
    targets = np.array([token for window in windows for token in window.tokens[1:]])
    found = predictions(rows.astype(np.float32), top_ids, sample_ids, targets)
    return Reference(
        "5" * 64,
        VOCABULARY,
        tuple(windows),
        found.targets.astype(np.float32),
        top_ids,
        sample_ids,
        encoded(found.kept.parts),
        encoded(found.kept.samples),
    )


@pytest.fixture
def measure(tmp_path: Path, reference: Reference) -> Callable[[str, Floats], Figures]:
    def run(name: str, table: Floats) -> Figures:
        (tmp_path / "fake.py").write_text(FAKE)
        np.save(tmp_path / "table.npy", table)
        command = [sys.executable, str(tmp_path / "fake.py"), str(tmp_path / name), *COMMON]
        worker = Worker(command, tmp_path / "log")
        try:
            return measured(name, worker, reference).total
        finally:
            worker.close()

    return run


def test_a_peer_s_figures_are_those_of_its_logits(
    measure: Callable[[str, Floats], Figures],
    tables: tuple[Floats, Floats],
    windows: list[Window],
) -> None:
    found = measure("near", tables[1])
    p, q = (logprobs(table, windows) for table in tables)
    divergences = (np.exp(p) * (p - q)).sum(axis=1)
    targets = [token for window in windows for token in window.tokens[1:]]
    taken = np.arange(len(targets))
    assert found.tokens == len(targets) == 123
    assert found.mean_kl == pytest.approx(divergences.mean(), rel=1e-3) != 0
    assert found.tail_kl == pytest.approx(np.percentile(divergences, 99.9), rel=1e-2)
    assert found.top1_agreement == (p.argmax(axis=1) == q.argmax(axis=1)).mean() < 1
    ratio = np.exp((p - q)[taken, targets].mean())
    assert found.perplexity_ratio == pytest.approx(ratio, rel=1e-5)


def test_the_source_itself_is_at_no_distance(
    measure: Callable[[str, Floats], Figures], tables: tuple[Floats, Floats]
) -> None:
    found = measure("same", tables[0])
    assert found.mean_kl < 1e-6
    assert found.top1_agreement == 1
    assert found.perplexity_ratio == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("silent", "gives no logits"),
        ("broken", "no such operator"),
        ("doubled", "are float64, not float32"),
        ("last", r"are \[1, 40\], not \[59, 40\]"),
        ("nan", "no finite numbers"),
    ],
)
def test_logits_that_are_not_those_of_all_tokens_are_no_figure(
    measure: Callable[[str, Floats], Figures],
    tables: tuple[Floats, Floats],
    name: str,
    why: str,
) -> None:
    with pytest.raises((WorkerError, BackendError), match=why):
        measure(name, tables[1])


def figures(mean_kl: float) -> Figures:
    return Figures(
        tokens=1000,
        windows=2,
        mean_kl=mean_kl,
        tail_kl=1.5,
        top1_agreement=0.75,
        perplexity=20.0,
        reference_perplexity=16.0,
        perplexity_ratio=1.25,
        perplexity_ratio_error=0.0125,
    )


def test_ours_stand_beside_the_nearest_of_the_same_bits() -> None:
    totals = {
        Runner("ours", True, 4): figures(0.03),
        Runner("far", False, 4): figures(0.3),
        Runner("near", False, 4): figures(0.06),
        Runner("packed", False, 4): figures(0.01),
        Runner("fine", False, 8): figures(0.002),
    }
    found = least(totals, ["packed"])
    assert {kind: one["peer"] for kind, one in found.items()} == {
        "4 bits, rounded by the peer": "near",
        "4 bits, of the file": "packed",
        "8 bits, rounded by the peer": "fine",
    }
    ratios = [one["ratios"] for one in found.values()]
    assert ratios == [{"ours": pytest.approx(0.5)}, {"ours": pytest.approx(3)}, {}]
    shown = table(totals, found, {"gone": "it broke"})
    assert [line.split()[0] for line in shown.splitlines()[2:8]] == [
        "fine",
        "packed",
        "ours",
        "near",
        "far",
        "gone",
    ]
    assert "75.0%   1.2500 ± 0.0125" in shown
    assert "near is the nearest, ours has 0.50x its mean KL" in shown


def test_quality_needs_what_the_source_predicts(
    tiny_tokenizer_only: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = ["--bundle", f"int4={tiny_tokenizer_only}"]
    assert parsed([*bundle, "--work", "decode"]).works == ["decode"]
    with pytest.raises(SystemExit):
        parsed([*bundle, "--work", "decode,quality"])
    assert "built with --quality" in capsys.readouterr().err
    (tiny_tokenizer_only / REFERENCE_LOGPROBS).touch()
    assert parsed([*bundle, "--work", "quality"]).works == ["quality"]


@pytest.fixture
def tiny_tokenizer_only(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text(json.dumps({}))
    return tmp_path


class FakePipeline:
    """OpenVINO's pipeline, as far as a prompt's log-probabilities go."""

    def __init__(self, logprobs: list[float]) -> None:
        self.logprobs, self.config = logprobs, SimpleNamespace(echo=False)

    def add_request(self, _: int, __: object, config: Any) -> FakePipeline:
        self.config = config
        return self

    def has_non_finished_requests(self) -> bool:
        return False

    def read_all(self) -> list[SimpleNamespace]:
        assert self.config.echo  # else they would be of the completion
        return [SimpleNamespace(generated_log_probs=self.logprobs)]


def test_openvino_s_logits_are_refused_if_its_pipeline_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, tables: tuple[Floats, Floats], windows: list[Window]
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Tensor=lambda array: array))
    settings = SimpleNamespace(GenerationConfig=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "openvino_genai", settings)
    tokens = list(windows[0].tokens[:-1])
    rows = tables[1][tokens]
    shares = np.log(np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True))
    said = [1.0, *(float(shares[i, token]) for i, token in enumerate(tokens[1:])), -7.0]
    openvino_logits.check(rows.astype(np.float32), tokens, FakePipeline(said))
    said[len(tokens) - 1] += 0.01
    with pytest.raises(ValueError, match=r"0\.01 off"):
        openvino_logits.check(rows.astype(np.float32), tokens, FakePipeline(said))
