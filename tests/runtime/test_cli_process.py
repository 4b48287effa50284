"""``llama-run`` in a process of its own: imports, signals and pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_runtime import __version__

# The command itself, from its first import on, with the fake backend.
FAKE = """
import sys
from llama_runtime import loading
from llama_runtime.backends.fake import Fake
from llama_runtime.sampling import Reference
loading.open_session = lambda graph, threads: None
loading.OrtSampler = lambda *_: Reference()
loading.OrtCpu = lambda session, geometry, *, num_slots, capacity, num_prefix_blocks, **_: Fake(
    num_slots, capacity, geometry.vocab_size, num_prefix_blocks=num_prefix_blocks
)
from llama_runtime.__main__ import main
main()
"""


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {i}\n" for i in range(12)))
    return path


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom llama_runtime.cli import cli\n"
        "cli(['batch', '--help'], standalone_mode=False)\n"
        "print(sorted({'numpy', 'onnxruntime', 'tokenizers', 'minijinja'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_the_module_runs_as_the_command_does() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "llama_runtime", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == f"Caravan {__version__} (llama-run)\n"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_leaves_whole_lines_says_how_many_and_is_status_130(
    fake_llama_run: list[str], prompts: Path
) -> None:
    output = prompts.parent / "prompts.results.jsonl"
    command = [*fake_llama_run, "0.02", "batch", str(prompts), "--max-batch", "2"]
    run = subprocess.Popen([*command, "--max-tokens", "30"], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: output.exists() and output.read_bytes().count(b"\n") >= 3)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=20)
    assert run.returncode == 130, said
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["index"] for record in found] == list(range(len(found)))
    assert 3 <= len(found) < 12
    last = said.splitlines()[-1]
    assert last == (
        f"stopped: the results of {len(found)} of 12 rows are in {output}; the same command goes on"
    )
    assert "Traceback" not in said


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_closed_pipe_ends_the_run_quietly(fake_llama_run: list[str], prompts: Path) -> None:
    command = [*fake_llama_run, "0", "batch", str(prompts), "-q", "-o", "-"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.readline()
    run.stdout.close()
    said = run.stderr.read()
    run.stderr.close()
    assert run.wait(timeout=20) == 141
    assert said == ""


@pytest.mark.skipif(sys.platform == "win32", reason="a pipe can't be asked there")
def test_a_slow_writer_gets_each_answer_before_it_sends_the_next_prompt(
    fake_llama_run: list[str],
) -> None:
    command = [*fake_llama_run, "0", "batch", "-", "-q", "--max-tokens", "3"]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert run.stdin is not None
    assert run.stdout is not None
    with run.stdin, run.stdout:
        for i in range(3):
            run.stdin.write(f"prompt {i}\n")
            run.stdin.flush()
            assert json.loads(run.stdout.readline())["index"] == i
    assert run.wait(timeout=20) == 0


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_standard_output_without_room_is_one_sentence(fake_llama_run: list[str]) -> None:
    for args in (["inspect"], ["generate", "hi"], ["batch", "-", "-q"]):
        with open("/dev/full", "wb") as full:
            run = subprocess.run(
                [*fake_llama_run, "0", *args],
                input="hi\n",
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert run.returncode == 1
        assert run.stderr == "Error: can't write to standard output: No space left on device\n"


if sys.platform != "win32":  # which has no named pipes of this kind

    def test_a_named_pipe_is_read_as_standard_input_is(
        fake_llama_run: list[str], tmp_path: Path
    ) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        command = [*fake_llama_run, "0", "batch", str(pipe), "-q", "--max-tokens", "3"]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        pipe.write_text("one\ntwo\n")
        out, _ = run.communicate(timeout=20)
        assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["one", "two"]
        assert run.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors of POSIX")
@pytest.mark.parametrize(
    ("arguments", "closed", "status", "said"),
    [
        ("batch -", 0, 2, "standard input is empty: it has no prompts"),
        ("generate -", 0, 2, "the prompt is empty"),
        ("--help", 1, 1, "can't write to standard output: Bad file descriptor"),
        ("inspect", 1, 1, "can't write to standard output: Bad file descriptor"),
        ("batch prompts.txt -q -o -", 1, 1, "can't write to standard output: Bad file descriptor"),
        ("batch prompts.txt", 2, 0, ""),
        ("batch nowhere.txt", 2, 2, ""),
    ],
)
def test_a_standard_stream_that_is_closed_is_no_surprise(
    arguments: str, closed: int, status: int, said: str, prompts: Path, fake_bundle: Path
) -> None:
    """Python has None in its place, and the results would be the next file to take its number."""
    run = subprocess.run(
        [
            "sh",
            "-c",
            f'exec "$@" {closed}>&-',
            "sh",
            sys.executable,
            "-c",
            FAKE,
            *arguments.split(),
        ],
        env={**os.environ, "LLAMA_RUN_BUNDLE": os.fspath(fake_bundle)},
        cwd=prompts.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == status, run.stderr
    assert run.stderr.splitlines()[-1:] == ([f"Error: {said}"] if said else [])
    if status == 0:
        results = (prompts.parent / "prompts.results.jsonl").read_text().splitlines()
        assert [json.loads(line)["index"] for line in results] == list(range(12))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_messages_that_nobody_can_read_do_not_end_the_work(
    fake_llama_run: list[str], prompts: Path
) -> None:
    with open("/dev/full", "wb") as full:
        run = subprocess.run(
            [*fake_llama_run, "0", "batch", str(prompts), "--max-tokens", "3"], stderr=full
        )
    assert run.returncode == 0
    assert (prompts.parent / "prompts.results.jsonl").read_text().count("\n") == 12


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize("arguments", ["--help", "--version", "batch --help"])
def test_help_without_room_is_one_sentence(arguments: str) -> None:
    with open("/dev/full", "wb") as full:
        run = subprocess.run(
            [sys.executable, "-m", "llama_runtime", *arguments.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert run.returncode == 1
    assert run.stderr == "Error: can't write to standard output: No space left on device\n"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
@pytest.mark.parametrize(
    ("arguments", "status"),
    [("--help", 1), ("batch --help", 141), ("inspect", 141), ("plan", 141), ("generate hi", 141)],
)
def test_a_pipe_that_is_closed_from_the_start_is_quiet(
    fake_llama_run: list[str], arguments: str, status: int
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run(
        [*fake_llama_run, "0", *arguments.split()],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert (run.returncode, run.stderr) == (status, "")
