"""The laws bite: each fault of tests/mutants.toml makes the tests that it names fail.

``scripts/test --mutants`` makes all of them; here a few, and every way in which the runner may be
wrong about one.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNNER = [sys.executable, "-m", "scripts.mutants"]
FAULTS = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text(encoding="utf-8"))["fault"]
STOPPING = "runtime/llama_runtime/stopping.py"
OLDEST = {
    "rope-off-by-one",
    "mask-sign",
    "cache-row-swap",
    "qk-permutation-skipped",
    "seed-from-slot",
    "length-plus-one",
    "neighbours-last-row",
    "eos-ignored",
    "chunk-boundary-off",
    "stale-slot-length",
    "detokeniser-drops-byte",
    "manifest-hash-unchecked",
}
ENDS = "tests/runtime/test_engine.py::test_a_sequence_ends_at_max_tokens"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="ends process groups")


def mutants(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A run of the runner that may leave nothing behind."""
    temporary = tmp_path / "temporary"
    temporary.mkdir(exist_ok=True)
    run = subprocess.run(
        [*RUNNER, *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert list(temporary.iterdir()) == []
    return run


def write(path: Path, *faults: dict[str, str]) -> str:
    """A list of faults: texts, and a test each."""
    lines = []
    for fault in faults:
        lines.append("[[fault]]")
        lines += [f"{key} = '''{text}'''" for key, text in fault.items() if key != "test"]
        lines += [f"tests = ['''{fault['test']}''']", "shows = 'it shows'"]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def fault(
    name: str, line: str, becomes: str, file: str = STOPPING, test: str = ENDS
) -> dict[str, str]:
    return {"name": name, "file": file, "line": line, "becomes": becomes, "test": test}


def is_cheap(tests: list[str]) -> bool:
    """Whether they run without torch."""
    sources = [(ROOT / test.partition("::")[0]).read_text(encoding="utf-8") for test in tests]
    return not any(
        word in text for text in sources for word in ("torch", "tiny_", "real_", "llama_decoder")
    )


def test_every_fault_can_still_be_made_and_its_tests_exist(tmp_path: Path) -> None:
    run = mutants(tmp_path, "--check")
    assert (run.returncode, run.stderr) == (0, "")


def test_the_list_has_the_oldest_faults_and_some_in_every_package() -> None:
    assert {fault["name"] for fault in FAULTS} >= OLDEST
    assert {fault["file"].split("/")[1] for fault in FAULTS} == {
        "llama_decoder",
        "llama_export",
        "llama_runtime",
    }
    assert len({(fault["file"], fault["line"]) for fault in FAULTS}) == len(FAULTS)
    assert all(fault["shows"] == fault["shows"].strip(" .") for fault in FAULTS)


def test_a_few_faults_are_noticed(tmp_path: Path) -> None:
    cheap = [fault["name"] for fault in FAULTS if is_cheap(fault["tests"])]
    assert len(cheap) > 20
    run = mutants(tmp_path, *random.Random(0).sample(cheap, 3))
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("killed ") == 3
    assert "3 of 3 faults are noticed" in run.stdout


def test_only_a_test_that_runs_and_says_no_has_noticed_a_fault(tmp_path: Path) -> None:
    before = (ROOT / STOPPING).read_bytes()
    newest = "newest = seq.token_ids[-1]"
    faults = write(
        tmp_path / "faults.toml",
        fault("noticed", "return None", "return 'length'"),
        fault(
            "noticed-in-a-child",
            "return sorted({*globals(), *__all__})",
            "return sorted(globals())",
            file="runtime/llama_runtime/__init__.py",
            test="tests/laws/test_public_api.py::test_names_show_before_anything_was_imported",
        )
        | {"error": "subprocess.CalledProcessError"},
        fault("harmless", '"""When a sequence ends."""', '"""Why a sequence ends."""'),
        fault(
            "no-import",
            "from llama_runtime.sequence import FinishReason, Sequence",
            "from llama_runtime.sequence import FinishReason, Sequence, Nobody",
        ),
        fault(
            "crash",
            "self._admit(now)",
            "self._admit_all(now)",
            file="runtime/llama_runtime/scheduler.py",
        ),
        fault("hang", newest, "while True: newest = seq.token_ids[-1]"),
        fault(
            "no-fixture",
            "self.default_params = loaded.default_params",
            "assert not loaded",
            file="runtime/llama_runtime/llm.py",
            test="tests/runtime/test_llm_fake.py::test_a_closed_stream_frees_its_slot",
        ),
    )
    run = mutants(tmp_path, "--list", faults, "--limit", "5")
    assert run.returncode == 1, run.stderr
    said = {line.split()[1]: line for line in run.stdout.splitlines()[1:-1]}
    words = {name: line.split()[0] for name, line in said.items()}
    others = dict.fromkeys(("no-import", "crash", "hang", "no-fixture"), "BROKEN")
    noticed = dict.fromkeys(("noticed", "noticed-in-a-child"), "killed")
    assert words == {**noticed, "harmless": "SURVIVED", **others}
    assert f"{ENDS} passes, although it shows" in said["harmless"]
    assert "ImportError: cannot import name 'Nobody'" in said["no-import"]
    assert "has another failure: AttributeError" in said["crash"]
    assert "has another failure: Failed: Timeout" in said["hang"]
    assert "has another error: failed on setup" in said["no-fixture"]
    assert run.stdout.splitlines()[-1].startswith("2 of 7 faults are noticed")
    assert (ROOT / STOPPING).read_bytes() == before


def test_a_list_that_has_rotted_is_refused_with_all_that_is_wrong(tmp_path: Path) -> None:
    faults = write(
        tmp_path / "faults.toml",
        fault("gone", "a line that was there once", "another"),
        fault(
            "often",
            "deadline = Deadline(timeout)",
            "pass",
            file="runtime/llama_runtime/async_llm.py",
        ),
        fault("no-python", "return None", "return return"),
        fault("no-file", "return None", "pass", file="runtime/llama_runtime/gone.py"),
        fault("no-test", "return None", "pass", test="tests/runtime/test_engine.py::test_gone"),
    )
    for arguments in (["--check"], []):
        run = mutants(tmp_path, "--list", faults, *arguments)
        assert run.returncode == 2
        assert len(run.stderr.splitlines()) == 5
        assert "gone: runtime/llama_runtime/stopping.py has this line 0 times" in run.stderr
        assert "often: runtime/llama_runtime/async_llm.py has this line 3 times" in run.stderr
        assert "no-python: what the line becomes is no Python" in run.stderr
        assert "no-file: there is no runtime/llama_runtime/gone.py" in run.stderr
        assert "no-test: there is no test tests/runtime/test_engine.py::test_gone" in run.stderr
    assert mutants(tmp_path, "nobody").stderr == "no fault has the name nobody\n"


def test_a_test_that_fails_without_a_fault_is_found_first(tmp_path: Path) -> None:
    faults = write(tmp_path / "faults.toml", fault("any", "return None", "pass", test=f"{ENDS}[9]"))
    run = mutants(tmp_path, "--list", faults)
    assert run.returncode == 2
    assert "not all tests pass without a fault" in run.stderr
    assert "SURVIVED" not in run.stdout


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*RUNNER, "eos-ignored"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("caravan-mutants-*/tmp*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # the tests are starting
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "interrupted\n")
    assert list(tmp_path.iterdir()) == []
    if sys.platform == "linux":
        commands = [command_line(path) for path in Path("/proc").glob("[0-9]*")]
        assert not any(str(tmp_path) in command for command in commands)


def command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_text(errors="replace")
    except OSError:
        return ""  # it has just ended
