"""The comparison with peers compares what it says; peers are played by small fakes."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tokenizers

from scripts.bench_peers import parsed
from scripts.peers.compare import Runner, slow, summary, table
from scripts.peers.contest import Contest
from scripts.peers.process import ROOT, Worker, WorkerError
from scripts.peers.protocol import fixed_batches
from scripts.peers.recipes import PEERS, RecipeError, Source, model_of, peers_of
from scripts.peers.works import MAX_LEN, SLOTS, WORKS, Case, Texts, cases

COMMON = ["--threads", "1", "--slots", "32", "--max-len", "64"]
# A token is a letter. The model's name says how it misbehaves.
FAKE = f"""
import json, os, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from scripts.peers.protocol import Loaded, Output, serve

def load(options):
    name = options.model.name
    print("a library says hello")
    os.write(1, b"and so does its C code\\n")
    if name == "unloadable":
        sys.exit("the weights are missing")
    if name == "spinning":
        threading.Thread(target=spin, daemon=True).start()

    def generate(prompts, counts):
        if name == "broken":
            raise ValueError("no such operator")
        if name == "dying":
            os._exit(3)
        started = time.time()
        time.sleep(0.05)
        with open(options.model.with_name("turns"), "a") as file:
            print(json.dumps([name, started, time.time(), prompts]), file=file)
        made = sum(counts) - (name == "lazy")
        return Output(["x" * count for count in counts], made)

    return Loaded(generate, lambda text: len(text) * (2 if name == "bytes" else 1))

def spin():
    while True:
        pass

serve(load)
"""


@pytest.fixture
def command(tmp_path: Path) -> Callable[[str], list[str]]:
    (tmp_path / "fake.py").write_text(FAKE)
    return lambda name: [sys.executable, str(tmp_path / "fake.py"), str(tmp_path / name), *COMMON]


@pytest.fixture
def letters(tmp_path: Path, byte_tokenizer: tokenizers.Tokenizer) -> Texts:
    byte_tokenizer.save(str(tmp_path / "tokenizer.json"))
    return Texts(tmp_path / "tokenizer.json")


@pytest.fixture
def worker(command: Callable[[str], list[str]], tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    started: list[Worker] = []

    def start(name: str) -> Worker:
        started.append(Worker(command(name), tmp_path / "logs" / name))
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_what_a_library_prints_is_no_answer(worker: Callable[..., Worker]) -> None:
    fake = worker("plain")
    assert fake.settings == {}
    assert fake.ask({"count": ["abc", ""]}) == {"counts": [3, 0]}
    assert 0.05 <= fake.generate(["abc", "d"], [2, 1]) < 5


def test_a_request_that_fails_is_not_the_end(worker: Callable[..., Worker]) -> None:
    fake = worker("broken")
    with pytest.raises(WorkerError, match=r"^ValueError: no such operator$"):
        fake.generate(["a"], [1])
    assert fake.ask({"count": ["ab"]}) == {"counts": [2]}


@pytest.mark.parametrize(
    ("name", "why"), [("unloadable", "status 1: the weights are missing"), ("dying", "status 3")]
)
def test_a_process_that_ends_says_why(worker: Callable[..., Worker], name: str, why: str) -> None:
    with pytest.raises(WorkerError, match=why):
        worker(name).generate(["a"], [1])


def test_an_answer_that_never_comes_ends_the_worker(
    worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = worker("plain")
    monkeypatch.setattr("scripts.peers.process.SECONDS_TO_ANSWER", 0.01)
    with pytest.raises(WorkerError, match=r"took over 0\.01 s"):
        fake.generate(["a"], [1])


def test_fewer_tokens_than_asked_for_are_no_figure(worker: Callable[..., Worker]) -> None:
    with pytest.raises(WorkerError, match="made 5 tokens, 6 were"):
        worker("lazy").generate(["a", "b"], [2, 4])


def test_one_computes_at_a_time_and_all_read_the_same(
    command: Callable[[str], list[str]],
    letters: Texts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("scripts.peers.contest.SETTLE_SECONDS", 0.01)
    case = Case("decode", "B=2", ((8, 4), (5, 4)))
    names = ["one", "two", "broken", "bytes", "unloadable", "spinning"]
    with Contest() as contest:
        for i, name in enumerate(names):
            contest.enter(Runner(name, i == 0, 4), command(name), letters, tmp_path / f"{name}.log")
        result = contest.run(case, 3, drop=100, by_bits=False)
        idle = contest.idle()
    assert {name: len(times) for name, times in result["seconds"].items()} == {
        "one": 3,
        "two": 3,
        "spinning": 3,
    }
    assert result["notes"].keys() == {"broken", "bytes", "unloadable"}
    assert "10 tokens of a prompt of 5" in result["notes"]["bytes"] or (
        "16 tokens of a prompt of 8" in result["notes"]["bytes"]
    )
    turns = [json.loads(line) for line in (tmp_path / "turns").read_text().splitlines()]
    assert len(turns) == 12  # three of them, a round to warm up and three that count
    for (_, _, ended, _), (_, started, _, _) in itertools.pairwise(turns):
        assert ended <= started
    rounds = [turns[i : i + 3] for i in range(0, 12, 3)]
    assert len({one[0][0] for one in rounds[1:]}) == 3  # each is the first once
    for one in rounds:
        assert len({json.dumps(prompts) for _, _, _, prompts in one}) == 1
    assert len({json.dumps(one[0][3]) for one in rounds}) == 4
    assert [len(prompt) for prompt in turns[0][3]] == [8, 5]
    assert idle["spinning"] > max(0.02, idle["two"])


def test_a_ratio_is_of_rounds_of_the_two_fastest() -> None:
    case = Case("decode", "B=1", ((16, 60),))
    ours, slower = Runner("ours", True, 8), Runner("slower", True, 4)
    peer, rival = Runner("peer", False, 4), Runner("rival", False, 8)
    rounds = {
        ours: [1.0, 2.0, 4.0],
        slower: [3.0, 3.0, 3.0],
        peer: [9.0, 9.0, 6.0],
        rival: [3.0, 4.0, 4.0],
    }
    result = summary(case, rounds, by_bits=False)
    assert result["tokens_per_s"] == {"ours": 30, "slower": 20, "peer": 60 / 9, "rival": 15}
    expected = {"ours": "ours", "peer": "rival", "ratio": 2.0, "low": 1.0, "high": 3.0}
    assert result["ratios"] == {"all": expected}
    apart = summary(case, rounds, by_bits=True)["ratios"]
    assert apart["8 bits"] == expected
    assert (apart["4 bits"]["peer"], apart["4 bits"]["ratio"]) == ("peer", 3.0)
    assert summary(case, {ours: [1.0]}, by_bits=True)["ratios"] == {}
    shown = table(case, result, {"rival": "fixed batches", "gone": "it broke"}, 1.2)
    assert "2.00x rival (rounds 1.00 to 3.00, asked 1.2x)" in shown
    assert "-  (it broke)" in shown


def test_only_slow_ones_of_the_same_side_are_left_out() -> None:
    fast, fp32 = Runner("fast", True, 8), Runner("fp32", True, 32)
    peer, rival = Runner("peer", False, 4), Runner("rival", False, 8)
    warm_up = {fast: 1.0, fp32: 4.0, peer: 8.0, rival: 30.0}
    assert slow(warm_up, 3.0, by_bits=False) == {fp32, rival}
    assert slow(warm_up, 3.0, by_bits=True) == set()


def test_prompts_are_as_long_as_they_say(tmp_path: Path, letters: Texts) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False)
    words.train_from_iterator(["the house on the hill and the garden of the house"] * 9, trainer)
    words.save(str(tmp_path / "words.json"))
    texts = Texts(tmp_path / "words.json")
    (case,) = cases("mixed")
    for prompt, (wanted, _) in zip(texts.prompts(case, 1), case.lengths, strict=True):
        assert len(words.encode(prompt).ids) == wanted
    assert texts.prompts(case, 1) == texts.prompts(case, 1) != texts.prompts(case, 2)
    assert [len(text) for text in letters.prompts(case, 1)] == [n for n, _ in case.lengths]


def test_the_works_are_those_of_the_report() -> None:
    every = [case for work in WORKS for case in cases(work)]
    assert max(prompt + new for case in every for prompt, new in case.lengths) <= MAX_LEN
    mixed = next(case for case in every if case.work == "mixed")
    assert len(mixed.lengths) == 256
    assert {min(map(min, mixed.lengths)), max(map(max, mixed.lengths))} <= set(range(16, 257))
    assert [case.tokens for case in every if case.work in ("decode", "prompt")] == [
        64,
        8 * 64,
        32 * 64,
        512,
    ]


def test_fixed_batches_hold_everybody_once_and_like_lengths_together() -> None:
    batches = fixed_batches([3, 9, 1, 7, 8], 2)
    assert batches == [[1, 4], [3, 0], [2]]


def test_a_model_that_does_not_convert_leaves_nothing(tmp_path: Path) -> None:
    (peer,) = (one for one in PEERS if one.name == "ctranslate2-int8")
    source = Source(tmp_path, tmp_path / "hf", tmp_path / "model.gguf", packed=True)
    tool = tmp_path / "ctranslate2" / "venv" / "bin" / "ct2-transformers-converter"
    tool.parent.mkdir(parents=True)
    tool.write_text('#!/bin/sh\nmkdir "${8}" || exit\necho "no such model" >&2\nexit 1\n')
    tool.chmod(0o755)
    with pytest.raises(RecipeError, match="no such model"):
        model_of(peer, source, tmp_path)
    assert not (tmp_path / "ctranslate2-int8").exists()
    tool.write_text('#!/bin/sh\nmkdir "${8}" && echo done > "${8}/model.bin"\n')
    assert (model_of(peer, source, tmp_path) / "model.bin").read_text() == "done\n"


def test_a_gguf_of_floats_is_nobodys_4_bit_model(tmp_path: Path) -> None:
    floats = Source(tmp_path, tmp_path, tmp_path / "f16.gguf", packed=False)
    assert {peer.name for peer in PEERS} - {peer.name for peer in peers_of(floats)} == {
        "openvino-gguf",
        "llamacpp-gguf",
    }


def test_caravan_is_a_worker(tiny_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.peers.caravan", str(tiny_bundle), *COMMON]
    caravan = Worker(command, tmp_path / "log")
    try:
        assert caravan.settings == {"slots": SLOTS, "max_len": 64}
        assert caravan.ask({"count": ["abcd"]}) == {"counts": [4]}
        assert caravan.generate(["abcd", "ef"], [3, 5]) > 0
    finally:
        caravan.close()


@pytest.mark.parametrize(
    "wrong",
    [["--rounds", "0"], ["--work", "decode,nothing"], ["--peer", "none"], ["--bundle", "q=x"]],
)
def test_wrong_use_is_said(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(wrong)
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_bundles_are_named_by_their_precision(tiny_bundle: Path) -> None:
    options = parsed(["--bundle", f"int8-kv={tiny_bundle}", "--work", "decode"])
    assert (options.bundles, options.works) == ({"int8-kv": tiny_bundle}, ["decode"])
