"""``llama-run collect-env`` says what a bug report needs, where things are broken too."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from llama_runtime import __version__, machine
from llama_runtime.cli import cli
from llama_runtime.collect_env import command, hardware, libraries
from llama_runtime.collect_env.discreet import HIDDEN, error_text, variables, without_folders
from llama_runtime.collect_env.page import as_text
from llama_runtime.machine import container_memory, processor_quota, total_memory

posix = pytest.mark.skipif(sys.platform == "win32", reason="made of files of Linux")


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty stand-in for /proc."""
    folder = tmp_path / "proc"
    folder.mkdir()
    monkeypatch.setattr(machine, "PROC", folder)
    return folder


@pytest.fixture
def no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing them takes seconds, and other tests do it."""
    found: dict[str, dict[str, object]] = {
        "numpy": {"version": "2.0", "error": "ImportError: no"},
        "ray": {"version": None},
    }
    monkeypatch.setattr(command, "libraries", lambda: found)


def broken_packages(folder: Path) -> None:
    """Three modules that can't be imported, each in another way."""
    for name, program in {
        "minijinja": "raise ImportError('/home/jo/secret folder/libc.so.9: no such file')",
        "llguidance": "import os, signal\nos.kill(os.getpid(), signal.SIGILL)",
        "sleeps": "import time\ntime.sleep(60)",
    }.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(program)


@posix
def test_what_is_broken_is_named_and_the_rest_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_packages(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.fspath(tmp_path))
    some = ("numpy", "minijinja", "llguidance", "ray")
    chosen = {name: libraries.RUNTIME[name] for name in some}
    chosen["onnxruntime"] = "onnxruntime"
    monkeypatch.setattr(libraries, "RUNTIME", {**chosen, "ray": "not_there.at_all"})
    found = libraries.libraries()
    assert "error" not in found["numpy"]
    assert "ImportError: " in str(found["minijinja"]["error"])
    assert "/home/jo" not in str(found["minijinja"]["error"])
    assert "libc.so.9: no such file" in str(found["minijinja"]["error"])
    assert found["llguidance"]["error"] == "importing llguidance ends the process with SIGILL"
    slow = libraries._imported("sleeps", 0.2)
    assert slow == {"error": "importing sleeps takes more than 0.2 s"}
    assert "ModuleNotFoundError: No module named 'not_there'" in str(found["ray"]["error"])
    assert found["onnxruntime"]["version"] == found["onnxruntime"]["imported"]
    assert "CPUExecutionProvider" in str(found["onnxruntime"]["providers"])
    assert "build type" in str(found["onnxruntime"]["build"])


def test_two_distributions_of_one_library_are_an_error_of_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.0"}
    monkeypatch.setattr(libraries, "_version", there.get)
    monkeypatch.setattr(libraries, "_imported", lambda *_: {})
    monkeypatch.setattr(libraries, "_installed_twice", lambda: "both are installed")
    found = libraries.libraries()
    assert [found[name]["error"] for name in there] == ["both are installed"] * 2
    assert found["numpy"] == {"version": None}
    assert "onnxruntime-qnn" not in found


def test_a_library_that_is_missing_is_no_error_unless_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[str] = []

    def imported(module: str, seconds: float) -> dict[str, object]:
        tried.append(module)
        return {}

    monkeypatch.setattr(libraries, "_version", lambda _: None)
    monkeypatch.setattr(libraries, "_imported", imported)
    found = libraries.libraries()
    assert sorted(tried) == sorted(libraries.NEEDED)
    assert found["onnxruntime"] == found["torch"] == {"version": None}
    assert "onnxruntime-gpu" not in found


def test_every_library_of_an_extra_is_looked_for() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lists = [lines for name, lines in extras.items() if name not in ("dev", "bench")]
    named = [
        line
        for lines in (project["dependencies"], *lists)
        for line in lines
        if not line.startswith("llama-caravan")
    ]
    names = {line.split(">=")[0].split("[")[0].lower() for line in named}
    wanted = {name.lower() for name in (*libraries.RUNTIME, *libraries.EXPORT)}
    # the modules of these two are those of the bindings
    assert names - wanted == {"tensorrt_rtx_cu13", "tensorrt-rtx-cu13-libs"}


@posix
def test_flags_are_those_that_choose_kernels(proc: Path) -> None:
    (proc / "cpuinfo").write_text(
        "processor : 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_vnni sse2 amx_int8\n\n"
        "processor : 1\nmodel name\t: Another\nflags : avx512f\n"
    )
    found = hardware.processors()
    assert found["name"] == "Some CPU"
    assert found["flags"] == ["avx2", "avx512_vnni", "amx_int8"]
    (proc / "cpuinfo").write_text("processor : 0\nFeatures : fp asimd asimddp i8mm\n")
    assert hardware.processors()["flags"] == ["asimd", "asimddp", "i8mm"]
    (proc / "cpuinfo").unlink()
    assert hardware.processors()["flags"] == "the system doesn't say"


@posix
def test_limits_of_a_container_are_shown_beside_the_machine(
    proc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "cgroup"
    group.mkdir()
    monkeypatch.setattr(machine, "CGROUP_ROOT", group)
    assert processor_quota() is None
    assert container_memory() is None
    (group / "cpu.max").write_text("150000 100000\n")
    (group / "memory.max").write_text("300000000\n")
    (group / "memory.high").write_text("200000000\n")
    assert processor_quota() == 1
    assert container_memory() == 200_000_000
    (group / "memory.high").write_text("max\n")
    assert hardware.memory()["container_limit_bytes"] == 300_000_000
    (group / "memory.max").write_text(f"{2 * total_memory()}\n")
    assert container_memory() is None
    assert hardware.processors()["by_quota"] == 1


def fake_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", os.fspath(folder), prepend=os.pathsep)


@posix
def test_gpus_are_those_that_the_driver_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "NVIDIA H200, 580.65.06, 143771, 9.0\\nNVIDIA L4, 580.65.06, 23034, 8.9\\n"
    fake_smi(tmp_path, monkeypatch, f"printf '{lines}'")
    found = hardware.gpus()
    assert found["driver"] == "580.65.06"
    assert found["devices"] == [
        {"name": "NVIDIA H200", "memory_mib": "143771", "compute_capability": "9.0"},
        {"name": "NVIDIA L4", "memory_mib": "23034", "compute_capability": "8.9"},
    ]
    assert "  devices 1 compute capability  8.9\n" in as_text({"gpus": found})
    fake_smi(tmp_path, monkeypatch, "echo 'the driver is gone'; exit 9")
    assert hardware.gpus() == {
        "driver": None,
        "error": "nvidia-smi ended with 9: the driver is gone",
    }


@posix
def test_a_driver_without_its_program_is_seen(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.fspath(proc))
    assert hardware.gpus() == {"driver": None, "error": "there is no nvidia-smi"}
    (proc / "driver" / "nvidia").mkdir(parents=True)
    (proc / "driver" / "nvidia" / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n"
    )
    assert hardware.gpus()["driver"] == "580.65.06"


def test_keys_and_folders_of_variables_stay_here() -> None:
    found = variables(
        {
            "LLAMA_RUN_API_KEY": "sk-very-secret",
            "LLAMA_RUN_hf_token": "very-secret",
            "LLAMA_RUN_ADDRESS": "https://jo:very-secret@host/x",
            "LLAMA_RUN_BUNDLE": "/home/jo/work/llama-int8",
            "CUDA_VISIBLE_DEVICES": "0,1",
            "OMP_NUM_THREADS": "2",
            "HOME": "/home/jo",
            "AWS_SECRET_ACCESS_KEY": "very-secret",
        }
    )
    assert found == {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "LLAMA_RUN_ADDRESS": HIDDEN,
        "LLAMA_RUN_API_KEY": HIDDEN,
        "LLAMA_RUN_BUNDLE": ".../llama-int8",
        "LLAMA_RUN_hf_token": HIDDEN,
        "OMP_NUM_THREADS": "2",
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/jo/x/libc.so: no", ".../libc.so: no"),
        ("can't read '/home/jo/a b'", "can't read '.../a b'"),
        ("C:\\Users\\jo\\x.dll is missing", ".../x.dll is missing"),
        ("and/or 1/2 ~ a.b/c", "and/or 1/2 ~ a.b/c"),
        ("/keep/me is bad, /keep/me/x too, /home/jo/y", "/keep/me is bad, /keep/me/x too, .../y"),
    ],
)
def test_of_paths_only_the_names_are_shown(text: str, shown: str) -> None:
    assert without_folders(text, "/keep/me") == shown


def test_a_home_whose_name_has_spaces_isnt_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/Users/Jo Doe")
    monkeypatch.setenv("USERPROFILE", "/Users/Jo Doe")
    assert error_text(OSError("/Users/Jo Doe/x.so: no")) == "OSError: .../x.so: no"


def test_a_bundle_is_described_or_why_it_cant_be(
    fake_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = command.describe_bundle(fake_bundle)
    assert found["name"] == "fake-llama"
    assert found["graphs"] == {"slots": "fp32", "sampler": "fp32"}
    assert json.loads(json.dumps(found)) == found
    (fake_bundle / "decoder.onnx").write_bytes(b"x")
    error = str(command.describe_bundle(fake_bundle)["error"])
    assert str(fake_bundle) in error  # it was named
    assert "decoder.onnx" in error
    monkeypatch.chdir(tmp_path)
    relative = command.describe_bundle(Path("no-bundle"))
    assert "no-bundle" in str(relative["error"])
    assert str(tmp_path) not in str(relative["error"])


@pytest.mark.usefixtures("no_libraries")
def test_the_page_and_the_json_tell_the_same(
    fake_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    shown = CliRunner().invoke(cli, ["collect-env", "--bundle", str(fake_bundle)])
    assert shown.exit_code == 0, shown.output
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    for line in (
        f"version {__version__}",
        "numpy 2.0, broken: ImportError: no",
        "not installed ray",
        "OMP_NUM_THREADS 7",
        "name fake-llama",
    ):
        assert line in lines
    facts = json.loads(CliRunner().invoke(cli, ["collect-env", "--json"]).stdout)
    assert facts["caravan"]["version"] == __version__
    assert facts["memory"]["machine_bytes"] == total_memory()
    assert facts["environment"]["OMP_NUM_THREADS"] == "7"
    assert "bundle" not in facts


@pytest.mark.usefixtures("no_libraries")
def test_a_broken_bundle_is_a_fact_and_no_failure(tmp_path: Path) -> None:
    shown = CliRunner().invoke(cli, ["collect-env", "--bundle", str(tmp_path / "none")])
    assert shown.exit_code == 0, shown.output
    assert "none" in shown.stdout.split("\nbundle\n  error  ")[1]


def test_its_help_fits_a_terminal() -> None:
    shown = CliRunner().invoke(cli, ["collect-env", "--help"], prog_name="llama-run").stdout
    assert "Example" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_it_imports_no_library_itself() -> None:
    code = (
        "import sys\nfrom llama_runtime.collect_env import command, libraries, page\n"
        "command.libraries = lambda: {}\npage.as_text(command.collect(None))\n"
        "print(sorted({'numpy', 'onnxruntime', 'tokenizers', 'torch'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
