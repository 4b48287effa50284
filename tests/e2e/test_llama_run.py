"""``llama-run`` as a user has it: the real model, a process of its own, and no torch anywhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llama_runtime.params import row_seed

EXPORT_SIDE = ("torch", "transformers", "onnx", "onnxscript", "gguf", "safetensors")
BLOCKED = (*EXPORT_SIDE, "llama_decoder", "llama_export")
SITECUSTOMIZE = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"{{name}} is blocked by a test")

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture
def torch_free(
    real_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """An environment in which nothing of the export side can be imported."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # hides what a closed pipe does
    blocker = tmp_path / "blocker"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [os.fspath(blocker), os.getenv("PYTHONPATH")])),
        "LLAMA_RUN_BUNDLE": os.fspath(real_bundle),
    }


def llama_run(
    *args: object, env: dict[str, str], stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llama_runtime", *map(str, args)],
        env=env,
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def start(*args: object, env: dict[str, str], **pipes: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llama_runtime", *map(str, args)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, encoding="utf-8", **pipes)


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_the_blocker_blocks(torch_free: dict[str, str]) -> None:
    for name in BLOCKED:
        run = subprocess.run(
            [sys.executable, "-c", f"import {name}"], env=torch_free, capture_output=True, text=True
        )
        assert "is blocked by a test" in run.stderr


def test_a_batch_runs_without_torch_and_bad_rows_harm_no_other(
    torch_free: dict[str, str], tmp_path: Path
) -> None:
    rows: list[Any] = [
        {"prompt": "What is the capital of France?", "max_tokens": 24},
        {"prompt": "Name a fruit. 你好 🦙", "max_tokens": 8, "temperature": 1.0},
        {"messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 8},
        {"prompt": "x", "top_q": 1},
        {"prompt": "word " * 9000},
        {"prompt": "What is the capital of France?", "max_tokens": 6, "seed": 4},
    ]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join([*lines[:3], "{broken", *lines[3:]]), encoding="utf-8")
    run = llama_run("batch", path, "--seed", 9, env=torch_free)
    assert run.returncode == 1, run.stderr
    assert run.stdout == ""
    assert "7 rows, 3 failed" in run.stderr
    found = records((tmp_path / "rows.results.jsonl").read_text(encoding="utf-8"))
    assert [record["index"] for record in found] == list(range(7))
    assert [record["finish_reason"] == "error" for record in found] == [
        False,
        False,
        False,
        True,
        True,
        True,
        False,
    ]
    assert "Paris" in found[0]["text"]
    assert found[1]["prompt"] == rows[1]["prompt"]
    assert found[0]["text"].startswith(found[6]["text"]), "greedy, so company changes nothing"
    assert [record["seed"] for record in found] == [
        row_seed(9, 0),
        row_seed(9, 1),
        row_seed(9, 2),
        None,
        None,
        None,
        4,
    ]
    assert "line 4 is not a JSON row" in found[3]["error"]
    assert "'top_q'" in found[4]["error"]
    assert "over the model's limit 8192" in found[5]["error"]

    alone = {**rows[1], "seed": found[1]["seed"]}
    again = llama_run("batch", "-", "-q", env=torch_free, stdin=json.dumps(alone) + "\n")
    assert (again.returncode, again.stderr) == (0, "")
    assert records(again.stdout)[0]["text"] == found[1]["text"]


def test_generate_gives_the_text_of_the_same_row_of_a_batch(torch_free: dict[str, str]) -> None:
    question = "What is the capital of France?"
    one = llama_run("generate", question, "--max-tokens", 16, env=torch_free)
    assert (one.returncode, one.stderr) == (0, "")
    batch = llama_run("batch", "-", "--max-tokens", 16, env=torch_free, stdin=f"{question}\n")
    assert batch.returncode == 0
    assert one.stdout == records(batch.stdout)[0]["text"] + "\n"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_and_a_closed_pipe_leave_whole_lines(
    torch_free: dict[str, str], tmp_path: Path
) -> None:
    path, output = tmp_path / "p.txt", tmp_path / "p.results.jsonl"
    path.write_text("".join(f"Tell me about the number {i}.\n" for i in range(200)))
    options = ("--max-tokens", 6, "--max-batch", 4)
    run = start("batch", path, *options, env=torch_free)
    end = time.monotonic() + 120
    while not output.exists() or not output.stat().st_size:
        assert time.monotonic() < end, "no result came"
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    found = records(output.read_text())
    assert run.returncode == 130
    assert [record["index"] for record in found] == list(range(len(found)))
    assert 0 < len(found) < 200
    assert f"the results of {len(found)} of 200 rows" in said.splitlines()[-1]
    assert "Traceback" not in said

    piped = start("batch", path, *options, "-q", "-o", "-", env=torch_free, stdout=subprocess.PIPE)
    assert piped.stdout is not None
    assert piped.stderr is not None
    assert json.loads(piped.stdout.readline())["index"] == 0
    piped.stdout.close()
    with piped.stderr:
        assert piped.stderr.read() == ""
    assert piped.wait(timeout=60) == 141


def test_an_altered_bundle_is_one_sentence_and_status_2(
    torch_free: dict[str, str], real_bundle: Path, tmp_path: Path
) -> None:
    altered = tmp_path / "altered"
    altered.mkdir()
    for source in real_bundle.iterdir():
        with (altered / source.name).open("wb") as copy:
            if source.name == "model.safetensors":
                copy.truncate(source.stat().st_size)  # zeros that take no room on the disk
            else:
                copy.write(source.read_bytes())
    run = llama_run("generate", "hi", "--bundle", altered, env=torch_free)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith("Error: ")
    assert "model.safetensors" in run.stderr
