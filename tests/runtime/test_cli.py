"""The ``llama-run`` command: what each use prints, writes and returns."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from click.types import FloatParamType, IntParamType

from llama_runtime import __version__, loading, settings
from llama_runtime.chat.command import MAX_TOKENS
from llama_runtime.cli import cli
from llama_runtime.cuda_loading import CUDA_MAX_BATCH
from llama_runtime.llm import LLM
from llama_runtime.machine import Memory
from llama_runtime.params import SamplingParams

Run = Callable[..., Result]


@pytest.fixture
def run(fake_backend: None, fake_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line on the fake bundle, in this process."""
    monkeypatch.setenv("LLAMA_RUN_BUNDLE", os.fspath(fake_bundle))

    def run(*args: object, stdin: bytes | None = None) -> Result:
        return CliRunner().invoke(
            cli, [str(arg) for arg in args], input=stdin, prog_name="llama-run"
        )

    return run


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {i}\n" for i in range(12)))
    return path


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_batch_writes_beside_the_prompts_and_says_how_it_went(run: Run, prompts: Path) -> None:
    result = run("batch", prompts, "--max-tokens", 20)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    found = records((prompts.parent / "prompts.results.jsonl").read_text())
    assert [record["prompt"] for record in found] == [f"prompt {i}" for i in range(12)]
    said = result.stderr.splitlines()
    tokens = sum(len(record["token_ids"]) for record in found)
    assert said[0] == "fake-llama: prompts as chat, greedy, max_tokens 20"
    assert said[-1].startswith("12 rows, 0 failed, in ")
    assert f" {tokens:,} completion tokens" in said[-1]
    assert said[-1].endswith("results in " + str(prompts.parent / "prompts.results.jsonl"))


def test_max_len_is_that_of_the_longest_row(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 70 + "\nx\n" + "x" * 600 + "\n")
    result = run("batch", path, "--no-chat", "--max-tokens", 10, "--threads", 1)
    assert "max_batch 32, max_len 80, threads 1" in result.stderr
    found = records((tmp_path / "a.results.jsonl").read_text())
    assert [record["finish_reason"] == "error" for record in found] == [False, False, True]
    assert result.exit_code == 1


def test_a_stream_takes_the_models_limit_and_answers_to_standard_output(run: Run) -> None:
    result = run("batch", "-", "--max-tokens", 4, stdin=b'\n{"prompt": "a"}\n{"prompt": "b"}\n')
    assert result.exit_code == 0, result.output
    assert [record["prompt"] for record in records(result.stdout)] == ["a", "b"]
    assert "max_len 512" in result.stderr
    text = run("batch", "-", "--max-tokens", 4, stdin=b"one\ntwo\n")
    assert [record["prompt"] for record in records(text.stdout)] == ["one", "two"]


def test_some_failed_rows_are_status_1_and_named(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "good"}\n{"prompt": "bad", "top_k": "x"}\n{broken\n')
    result = run("batch", path, "--max-tokens", 4)
    assert result.exit_code == 1
    assert "3 rows, 2 failed" in result.stderr
    assert "the first failure, row 1: top_k must be a whole number, not 'x'" in result.stderr


def test_quiet_says_nothing(run: Run, prompts: Path) -> None:
    result = run("batch", prompts, "-q", "-o", "-", "--max-tokens", 4)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert len(records(result.stdout)) == 12


def test_the_job_seed_gives_the_same_results_again(run: Run, prompts: Path) -> None:
    args = ("batch", prompts, "-q", "-o", "-", "--max-tokens", 8, "--temperature", 1)
    once = run(*args, "--seed", 5).stdout
    assert once == run(*args, "--seed", 5, "--max-batch", 2).stdout
    assert once != run(*args, "--seed", 6).stdout


def test_the_sampling_in_force_is_the_bundles_unless_an_option_says_otherwise(
    run: Run, prompts: Path, raw_bundle: Path
) -> None:
    given = ("batch", prompts, "--bundle", raw_bundle, "-o", "-", "--max-tokens", 2)
    assert "prompts as raw text, temperature 0.5, top_k 20, a fresh seed" in run(*given).stderr
    assert "temperature 2, top_k 20, top_p 0.9, seed 3" in (
        run(*given, "--temperature", 2, "--top-p", 0.9, "--seed", 3).stderr
    )
    assert "greedy" in run(*given, "--temperature", 0).stderr


def test_force_replaces_the_output_but_not_before_the_first_result(
    run: Run, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = prompts.parent / "prompts.results.jsonl"
    output.write_text("old\n")
    refused = run("batch", prompts)
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    failed = run("batch", prompts, "--force", "--max-len", 100_000)
    assert failed.exit_code == 2
    assert output.read_text() == "old\n"
    assert run("batch", prompts, "--force", "--max-tokens", 2).exit_code == 0
    assert len(records(output.read_text())) == 12


def bad_file(data: bytes) -> Callable[[Path], list[object]]:
    def make(folder: Path) -> list[object]:
        (folder / "bad.txt").write_bytes(data)
        return ["batch", folder / "bad.txt"]

    return make


WRONG_USES: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "missing": (lambda f: ["batch", f / "no.txt"], "no.txt does not exist"),
    "directory": (lambda f: ["batch", f], "is a directory"),
    "empty": (bad_file(b""), "bad.txt is empty: it has no prompts"),
    "blank": (bad_file(b" \n\n"), "bad.txt is empty: it has no prompts"),
    "no name": (lambda _: ["batch", ""], "the name of the prompts file is empty"),
    "binary": (bad_file(b"\x00\x01\x02"), "is not text"),
    "latin-1": (bad_file(b"caf\xe9\nok\n"), "line 1 is not UTF-8 text: byte 0xE9 at position 4"),
    "temperature": (
        lambda f: ["batch", f / "prompts.txt", "--temperature", "-1"],
        "temperature must lie in 0 to 100, not -1",
    ),
    "nan": (
        lambda f: ["batch", f / "prompts.txt", "--top-p", "nan"],
        "top_p must",
    ),
    "no number": (lambda f: ["batch", f / "prompts.txt", "--top-k", "many"], "'--top-k'"),
    "seed": (
        lambda f: ["batch", f / "prompts.txt", "--seed", 2**64],
        f"seed must lie in 0 to {2**64 - 1}, not {2**64}",
    ),
    "max-tokens": (
        lambda f: ["batch", f / "prompts.txt", "--max-tokens", 0],
        "max_tokens must lie in 1 to",
    ),
    "max-len": (
        lambda f: ["batch", f / "prompts.txt", "--max-len", 513],
        "max_len must lie in 2 to 512, not 513",
    ),
    "max-batch": (lambda f: ["batch", f / "prompts.txt", "--max-batch", 0], "'--max-batch'"),
    "plan max-len": (lambda _: ["plan", "--max-len", 513], "max_len must lie in 2 to 512, not 513"),
    "plan max-batch": (
        lambda _: ["plan", "--max-batch", 1025],
        "max_batch must lie in 1 to 1024, not 1025",
    ),
    "plan no bundle": (lambda f: ["plan", "--bundle", f / "nowhere"], "nowhere does not exist"),
    "unknown option": (lambda f: ["batch", f / "prompts.txt", "--fast"], "--fast"),
    "no bundle": (
        lambda f: ["batch", f / "prompts.txt", "--bundle", f / "nowhere"],
        "nowhere does not exist",
    ),
    "bundle is a file": (
        lambda f: ["inspect", "--bundle", f / "prompts.txt"],
        "is not a directory",
    ),
    "output is a folder": (lambda f: ["batch", f / "prompts.txt", "-o", f], "is a directory"),
    "output is the input": (
        lambda f: ["batch", f / "prompts.txt", "-o", f / "prompts.txt", "--force"],
        "would replace the prompts file",
    ),
    "empty prompt": (lambda _: ["generate", ""], "the prompt is empty"),
    "bias without a number": (
        lambda _: ["generate", "a", "--logit-bias", "5"],
        "--logit-bias must be ID=X, such as 42=-100, not '5'",
    ),
    "bias out of range": (lambda _: ["generate", "a", "--logit-bias", "5=101"], "-100 to 100"),
    "bias beyond the vocabulary": (
        lambda _: ["generate", "a", "--logit-bias", "258=1"],
        "logit_bias: token ids must lie in 0 to 257",
    ),
    "empty stop": (lambda _: ["generate", "a", "--stop", ""], "stop must hold texts of 1 to 256"),
    "logprobs without JSON": (
        lambda _: ["generate", "a", "--logprobs"],
        "log-probabilities need --json",
    ),
    "long prompt": (lambda _: ["generate", "x" * 700], "over the model's limit 512"),
    "no schema": (
        lambda f: ["generate", "a", "--json-schema", f / "no.json"],
        "no.json can't be read: No such file",
    ),
    "a schema that is none": (
        lambda _: ["generate", "a", "--json-schema", "{"],
        "json_schema is no JSON",
    ),
    "a schema that can't be kept": (
        lambda _: ["generate", "a", "--json-schema", '{"not": {}}'],
        'json_schema can\'t be used: Unimplemented keys: ["not"]',
    ),
    "a grammar of bytes": (
        lambda f: ["generate", "a", "--grammar", bad_file(b"\xff")(f)[1]],
        "bad.txt can't be read: it is not UTF-8 text at byte 1",
    ),
    "a large schema": (
        lambda f: [
            "generate",
            "a",
            "--json-schema",
            bad_file("\N{SNOWMAN}".encode() * 2**16)(f)[1],
        ],
        "bad.txt can't be read: it has more than 65,536 bytes",
    ),
    "an expression that is none": (
        lambda _: ["generate", "a", "--regex", "("],
        "regex can't be used",
    ),
    "two constraints": (
        lambda _: ["generate", "a", "--regex", "a", "--choice", "b"],
        "can't be given beside",
    ),
}


@pytest.mark.parametrize("use", WRONG_USES)
def test_wrong_use_is_one_sentence_and_status_2(
    run: Run, prompts: Path, tmp_path: Path, use: str
) -> None:
    args, words = WRONG_USES[use]
    before = sorted(path for path in tmp_path.rglob("*.jsonl"))
    result = run(*args(tmp_path))
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    error = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(error) == 1
    assert result.stderr.endswith(error[0] + "\n")
    assert words in error[0]
    assert result.stdout == ""
    assert sorted(path for path in tmp_path.rglob("*.jsonl")) == before


NO_NUMBERS = ("", "nan", "inf", "-inf", "1e999", "many", "0x10", "1;2")
OUT_OF_RANGE = {
    "--max-tokens": ("-1", "0", "1.5", "2147483648", "9" * 30),
    "--min-tokens": ("-1", "257", "1.5"),
    "--stop-token-id": ("-1", "1.5", "9" * 30),
    "--min-p": ("-1", "-1e-9", "1.0000001"),
    "--repetition-penalty": ("-1", "0", "100.1"),
    "--presence-penalty": ("-2.1", "2.1"),
    "--frequency-penalty": ("-2.1", "2.1"),
    "-n": ("-1", "0", "1.5", "129"),
    "--top-logprobs": ("-1", "1.5", "1", "21"),
    "--temperature": ("-1", "-1e-9", "100.1", "9" * 30),
    "--top-p": ("-1", "0", "1e-400", "1.0000001", "2"),
    "--top-k": ("-1", "1.5", "2147483648"),
    "--seed": ("-1", "1.5", str(2**64)),
    "--threads": ("-1", "0", "1.5", "1025", "9" * 30),
    "--workers": ("-1", "0", "1.5", "1025", "9" * 30),
    "--max-batch": ("-1", "0", "1.5", "1025", "9" * 30),
    "--max-len": ("-1", "0", "1", "1.5", "513", "9" * 30),
    "--prefix-tokens": ("-1", "1.5", "9" * 30),
    "--limit": ("-1", "0", "1.5"),
    "--num-prompts": ("-1", "0", "1.5", "1000001"),
    "--rounds": ("-1", "0", "1.5", "1001"),
    "--port": ("-1", "65536", "1.5"),
    "--max-queued-requests": ("-1", "0", "1.5", "1000001"),
    "--max-queued-tokens": ("-1", "0", "1.5", "1000000001"),
    "--max-body-bytes": ("-1", "0", "1.5", str(2**30 + 1)),
    "--max-incoming-bytes": ("-1", "0", "1.5", "4194303", str(2**40 + 1)),
    "--max-connections": ("-1", "0", "1.5", "1000001"),
    "--max-step-time": ("-1", "0", "1.1e9"),
    "--request-timeout": ("-1", "0", "1.1e9"),
    "--max-queue-time": ("-1", "0", "1.1e9"),
    "--shutdown-timeout": ("-1", "1.1e9"),
}
OF_COMMANDS = {
    "--limit": ("eval",),
    "--num-prompts": ("bench",),
    "--rounds": ("bench",),
    **dict.fromkeys([*OUT_OF_RANGE][-10:], ("serve",)),
}


def test_every_option_that_is_a_number_is_in_the_table() -> None:
    numbers = {
        option.opts[0]
        for command in cli.commands.values()
        for option in command.params
        if isinstance(option.type, (IntParamType, FloatParamType))
    }
    assert numbers == OUT_OF_RANGE.keys()


@pytest.mark.parametrize("option", OUT_OF_RANGE)
def test_a_number_out_of_range_is_one_sentence_and_status_2(
    run: Run, prompts: Path, option: str
) -> None:
    for value in (*OUT_OF_RANGE[option], *NO_NUMBERS):
        command = OF_COMMANDS.get(option, ("batch", prompts, "-q"))
        result = run(*command, f"{option}={value}")
        assert result.exit_code == 2, value
        last = result.stderr.splitlines()[-1]
        assert last.startswith("Error: ")
        assert option in last or option[2:].replace("-", "_") in last
        assert sum("Error" in line for line in result.stderr.splitlines()) == 1
        assert not (prompts.parent / "prompts.results.jsonl").exists()


def test_an_empty_standard_input_is_status_2(run: Run) -> None:
    result = run("batch", "-", stdin=b"\n")
    assert (result.exit_code, "standard input is empty" in result.stderr) == (2, True)


def test_chat_without_a_template_is_refused(run: Run, prompts: Path, raw_bundle: Path) -> None:
    result = run("batch", prompts, "--bundle", raw_bundle, "--chat")
    assert result.exit_code == 2
    assert "--chat needs a chat template" in result.stderr


def test_an_altered_bundle_is_refused(run: Run, prompts: Path, fake_bundle: Path) -> None:
    path = fake_bundle / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"im_start", b"im_START"))
    for args in (["batch", prompts], ["generate", "hi"], ["inspect"]):
        result = run(*args)
        assert result.exit_code == 2
        assert "tokenizer.json" in result.stderr


def test_generate_prints_the_text_and_nothing_else(run: Run, fake_bundle: Path) -> None:
    result = run("generate", "hello", "--max-tokens", 30)
    assert result.exit_code == 0
    assert result.stderr == ""
    with LLM(fake_bundle, max_batch=1, threads=1) as loaded:
        (expected,) = loaded.chat(
            [{"role": "user", "content": "hello"}], SamplingParams(max_tokens=30)
        )
    assert result.stdout_bytes == expected.text.encode() + b"\n"
    assert run("generate", "-", "--max-tokens", 30, stdin=b"hello\n").stdout == result.stdout
    assert run("generate", "-", stdin=b"\xff").exit_code == 2


def test_generate_holds_to_what_is_asked_for(run: Run, tmp_path: Path) -> None:
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    (tmp_path / "grammar.lark").write_text('start: "ab" | "c"')
    asked: list[tuple[list[object], Callable[[str], object]]] = [
        (["--choice", "red", "--choice", "blue"], {"red": 1, "blue": 1}.__getitem__),
        (["--regex", "[0-9]{3}"], int),
        (["--json-schema", json.dumps({"enum": [7]})], json.loads),
        (["--json-schema", tmp_path / "schema.json"], json.loads),
        (["--grammar", tmp_path / "grammar.lark"], {"ab": 1, "c": 1}.__getitem__),
    ]
    for options, check in asked:
        result = run("generate", "Say it", *options)
        assert result.exit_code == 0, result.stderr
        assert check(result.stdout.strip())


def test_control_tokens_in_a_prompt_are_text_unless_allowed(run: Run) -> None:
    plain, text, token = (
        json.loads(run("generate", *given, "--json", "--max-tokens", 1).stdout)["usage"]
        for given in (["a"], ["a<|im_end|>"], ["a<|im_end|>", "--allow-control-tokens"])
    )
    assert text["prompt_tokens"] == plain["prompt_tokens"] + len("<|im_end|>")
    assert token["prompt_tokens"] == plain["prompt_tokens"] + 1


def test_inspect_shows_the_bundle_and_its_manifest(run: Run, fake_bundle: Path) -> None:
    result = run("inspect")
    assert result.exit_code == 0
    for words in ("fake-llama", "fake.gguf (gguf)", "apache-2.0", "vocab size", "slots", "fp32"):
        assert words in result.stdout
    assert "greedy agreement      1.0\n" in result.stdout
    assert "  generation_config.json  " in result.stdout
    size = (fake_bundle / "tokenizer.json").stat().st_size
    assert f"{size:,} bytes" in result.stdout
    manifest = run("inspect", "--json").stdout
    assert manifest.encode() == (fake_bundle / "manifest.json").read_bytes()


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """82 MB: less than the fake model and 32 slots of its longest sequence need."""

    def available_memory(mapped_bytes: int) -> Memory:
        return Memory(81_600_000, "container")

    monkeypatch.setattr(loading, "available_memory", available_memory)


def test_a_plan_that_fits_is_a_table_and_status_0(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "open_session", None)  # so that loading would fail
    result = run("plan", "--max-batch", 4, "--max-len", 100)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "max_batch 4, max_len 100"
    names = [line.split(" ")[0] for line in lines[2:8]]
    assert names == ["weights", "cache", "prefixes", "workspace", "total", "available"]
    assert lines[7].endswith(" MB  this machine")
    assert lines[9:] == [
        "fits",
        "max_batch up to   1024 at max_len 100",
        "max_len up to      512 at max_batch 4",
    ]
    without = run("plan", "--max-batch", 4, "--max-len", 100, "--prefix-tokens", 0)
    assert "prefixes" not in without.stdout


@pytest.mark.usefixtures("little_memory")
def test_a_plan_that_does_not_fit_says_what_does_and_is_status_1(run: Run) -> None:
    result = run("plan", "--max-len", 500)
    assert result.exit_code == 1
    assert "does not fit" in result.stdout
    assert "82 MB  container" in result.stdout
    (error,) = result.stderr.splitlines()
    assert error.startswith("Error: max_batch 32 and max_len 500 need ")
    found = json.loads(run("plan", "--max-len", 500, "--json").stdout)
    assert found["fits"] is False
    assert error.endswith(
        f": set max_batch {found['largest_max_batch']}, or max_len {found['largest_max_len']}"
    )
    for option in ("max_batch", "max_len"):
        setting = {"max_batch": 32, "max_len": 500, option: found[f"largest_{option}"]}
        given = ("--max-batch", setting["max_batch"], "--max-len", setting["max_len"])
        assert run("plan", *given).exit_code == 0


def test_plan_json_is_one_object_with_sizes_in_bytes(run: Run) -> None:
    result = run("plan", "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    parts = ("weights", "cache", "prefixes", "workspace")
    assert found["total"] == sum(found[part] for part in parts)
    assert (found["prefix_tokens"], found["prefixes"]) == (4096, 64 * 4096)
    assert found["cache"] == 64 * 32 * (480 + 128)  # the last chunk of 511 tokens starts at 480
    assert (found["max_batch"], found["max_len"], found["fits"]) == (32, 512, True)


@pytest.mark.usefixtures("little_memory")
def test_too_little_memory_is_refused_before_anything_is_loaded(
    run: Run, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "open_session", None)  # so that loading would fail
    prompts.write_text("prompt\n" * 100)
    for args in (
        ["batch", prompts, "--max-len", 500, "--max-batch", 32],
        ["batch", prompts, "--max-tokens", 400, "--max-batch", 64],
        ["batch", "-", "--max-batch", 32],
    ):
        result = run(*args, stdin=b"one\n")
        assert result.exit_code == 2, result.output
        (error,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert "82 MB are available (container): set max_batch " in error
        assert not list(prompts.parent.glob("*.results.jsonl"))


def test_batch_says_how_much_memory_it_may_take(run: Run, prompts: Path) -> None:
    said = run("batch", prompts, "--max-tokens", 4).stderr.splitlines()
    (line,) = [line for line in said if line.startswith("memory: weights 0 MB, cache up to ")]
    assert line.endswith(" available")
    assert said[said.index(line) + 1].startswith("max_batch 32, max_len ")


def test_help_and_version_read_well_at_every_level(run: Run) -> None:
    assert run("--version").stdout == f"Caravan {__version__} (llama-run)\n"
    for command in ([], ["batch"], ["generate"], ["inspect"], ["plan"]):
        result = run(*command, "--help")
        assert result.exit_code == 0
        assert "Example" in result.stdout
        assert max(map(len, result.stdout.splitlines())) <= 80
        assert result.stdout == run(*command, "-h").stdout


def test_defaults_in_the_help_are_those_of_the_library(run: Run) -> None:
    text = " ".join(run("batch", "--help").stdout.split())
    assert f"[default: {SamplingParams().max_tokens}; {MAX_TOKENS} in chat]" in text
    others = f"{settings.DEFAULT_MAX_BATCH}, and {CUDA_MAX_BATCH} on CUDA"
    usual = f"[default: auto in batch; else {others}]"
    assert "Prompts that run at once, on each device;" in text
    assert usual in text
    assert f"at most {settings.DEFAULT_MAX_LEN}]" in text


def test_a_full_disk_is_status_1(run: Run, prompts: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    result = run("batch", prompts, "-o", "/dev/full", "--max-tokens", 4)
    assert result.exit_code == 1
    assert "Error: can't write to /dev/full: No space left on device" in result.stderr
    assert "stopped: the results of 0 of 12 rows" in result.stderr
