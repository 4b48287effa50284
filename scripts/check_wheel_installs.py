"""What each extra lets a user do, and says where another is missing."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_runtime import __version__
from scripts.check_wheel_contents import ROOT
from scripts.check_wheel_venv import Venv, pip_environment, quietly
from scripts.findings import Findings
from tests.tiny_model import write_tiny_model

# What [cpu] never brings: it is all of the exporter's, and what only tests compare with.
ABSENT = (
    *("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "gguf", "safetensors", "jinja2"),
    *("ml_dtypes", "starlette", "uvicorn", "prometheus_client", "pyarrow", "ray", "cuda"),
    "resvg_py",
)
PROMPTS = "one\ntwo\nthree\n"
OPTIONS = ("--max-tokens", "4", "--ignore-eos", "--threads", "1")
# Extras that aren't installed here: why, and whether PyPI has all they need as wheels or sources.
RESOLVED = {
    "gpu": "its libraries of CUDA take gigabytes, and it runs on a GPU only",
    "tensorrt-rtx": "it takes a gigabyte, and runs on a GPU only",
}
UNRESOLVED = {"tensorrt": "its wheels are on an index of NVIDIA's, and PyPI has stubs for them"}


def base(wheel: Path, bundle: Path, folder: Path, findings: Findings) -> None:
    """Without an extra, a sentence says which one is missing."""
    venv = Venv(folder)
    venv.install(str(wheel))
    _runs_from_the_environment(venv, findings)
    version = venv.run("llama-run", "--version").stdout
    findings.hold("the version is said", version == f"Caravan {__version__} (llama-run)\n", version)
    facts = json.loads(venv.run("llama-run", "collect-env", "--json").stdout)
    findings.hold(
        "collect-env runs where extras are missing",
        facts["libraries"]["onnxruntime"] == {"version": None},
        facts["libraries"],
    )
    broken = [name for name, one in facts["libraries"].items() if "error" in one]
    findings.hold("no library is broken", not broken, broken)
    at = ("--bundle", str(bundle))
    venv.run("llama-run", "inspect", *at)
    for extra, status, command in (
        ("cpu", 2, ("llama-run", "generate", "x", *at, *OPTIONS)),
        ("serve", 2, ("llama-run", "serve", *at)),
        ("export", 1, ("llama-export", "build", str(bundle))),
    ):
        said = venv.run(*command, expect=status).stderr
        good = said.count("\n") == 1 and f"pip install 'llama-caravan[{extra}]'" in said
        findings.hold("a sentence names the extra that is missing", good, said)


def cpu(wheel: Path, bundle: Path, folder: Path, findings: Findings) -> None:
    """[cpu] runs bundles without torch; its size and the times of its imports."""
    venv = Venv(folder)
    seconds = venv.install(f"{wheel}[cpu]")
    _runs_from_the_environment(venv, findings)
    _runs_a_bundle(venv, bundle, findings)
    present = venv.present(ABSENT)
    findings.hold("[cpu] brings nothing of the other extras", not present, present)
    sizes = venv.megabytes()
    findings.figures["cpu"] = {
        "installed_mb": sizes.pop("all"),
        "largest_mb": sizes,
        "packages": len(venv.versions()),
        "install_seconds": round(seconds, 1),
        "python_seconds": venv.wall_seconds("python", "-c", "pass"),
        "import_llama_runtime_seconds": venv.import_seconds("llama_runtime"),
        "import_llm_seconds": venv.import_seconds("llama_runtime.llm"),
        "help_seconds": venv.wall_seconds("llama-run", "--help"),
    }


def offline(wheel: Path, bundle: Path, folder: Path, findings: Findings) -> None:
    """[cpu] installs from a folder of wheels, without an index."""
    wheels = folder / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(wheels)]
    quietly([*command, f"{wheel}[cpu]"], folder)
    venv = Venv(folder / "clean")
    venv.install("--no-index", "--find-links", str(wheels), "llama-caravan[cpu]", offline=True)
    _runs_from_the_environment(venv, findings)
    _runs_a_bundle(venv, bundle, findings)
    size = sum(path.stat().st_size for path in wheels.iterdir())
    figures = {"wheels": len(list(wheels.iterdir())), "wheels_mb": round(size / 1e6, 1)}
    findings.figures["offline"] = figures


def serve(wheel: Path, bundle: Path, folder: Path, findings: Findings) -> None:
    """[cpu,serve] answers requests, and has its page with all that belongs to it."""
    venv = Venv(folder)
    venv.install(f"{wheel}[cpu,serve]")
    _runs_from_the_environment(venv, findings)
    with _served(venv, bundle) as address:
        body = {"prompt": "one", "max_tokens": 4, "ignore_eos": True, "temperature": 0}
        models = json.loads(_asked(f"{address}/v1/models"))
        body["model"] = models["data"][0]["id"]
        answer = json.loads(_asked(f"{address}/v1/completions", json.dumps(body).encode()))
        findings.hold("it answers", answer["usage"]["completion_tokens"] == 4, answer)
        page = _asked(f"{address}/").decode()
        held = sorted((ROOT / "runtime/llama_runtime/server/page").iterdir())
        names = [path.name for path in held if path.suffix in (".js", ".css", ".svg")]
        linked = [name for name in names if name in page]
        findings.hold("the page links what belongs to it", len(linked) > 2, page)
        for path in held:
            if path.name in linked:
                _asked(f"{address}{_link(page, path.name)}")
    findings.figures["serve"] = {"installed_mb": venv.megabytes()["all"]}


def scale(wheel: Path, bundle: Path, folder: Path, findings: Findings) -> None:
    """[cpu,scale] reads parquet files and runs workers on Ray."""
    venv = Venv(folder)
    venv.install(f"{wheel}[cpu,scale]")
    _runs_from_the_environment(venv, findings)
    rows = venv.home / "rows.parquet"
    venv.python(
        "import pyarrow as pa, pyarrow.parquet as pq\n"
        f"pq.write_table(pa.table({{'prompt': ['one', 'two']}}), {str(rows)!r})"
    )
    command = ("llama-run", "batch", str(rows), "--bundle", str(bundle), *OPTIONS)
    for more in ((), ("--ray", "local")):
        output = venv.home / f"results{len(more)}.jsonl"
        venv.run(*command, "--output", str(output), *more)
        findings.hold("parquet rows are answered", _good_rows(output) == 2, (more, output))
    findings.figures["scale"] = {"installed_mb": venv.megabytes()["all"]}


def export(wheel: Path, bundle: Path, folder: Path, findings: Findings) -> None:
    """[export] builds a bundle, with the torch that scripts/install takes."""
    venv = Venv(folder, with_pip=True)
    command = [str(venv.bin / "python"), str(ROOT / "scripts" / "install_torch.py")]
    quietly(command, venv.home)
    torch = venv.versions()["torch"]
    venv.install(f"{wheel}[export]")
    _runs_from_the_environment(venv, findings)
    after = venv.versions()
    findings.hold("torch stays what it was", after["torch"] == torch, after["torch"])
    cuda = sorted(name for name in after if name.startswith("nvidia-"))
    findings.hold("no CUDA comes with it", not cuda, cuda)
    findings.hold("transformers doesn't", "transformers" not in after)
    built = folder / "bundle"
    model = folder / "model"
    model.mkdir()
    write_tiny_model(model)
    venv.run("llama-export", "build", str(model), "--output", str(built), "--quiet")
    _runs_a_bundle(venv, built, findings)
    said = [_generated(venv, one)["token_ids"] for one in (bundle, built)]
    findings.hold("it builds the bundle that the checkout builds", said[0] == said[1], said)
    findings.figures["export"] = {"installed_mb": venv.megabytes()["all"], "torch": torch}


def resolved(wheel: Path, bundle: Path, folder: Path, findings: Findings) -> None:  # noqa: ARG001
    """Extras for GPUs are asked for and not installed: pip finds all that they need."""
    tool = Venv(folder, with_pip=True)
    tool.install("--upgrade", "pip>=25")  # older ones fetch the wheels whose names they need only
    command = [str(tool.bin / "python"), "-m", "pip", "install", "--dry-run", "--quiet"]
    for extra, reason in RESOLVED.items():
        report = folder / f"{extra}.json"
        ended = subprocess.run(
            [*command, "--ignore-installed", "--report", str(report), f"{wheel}[{extra}]"],
            env=pip_environment(),
            cwd=tool.home,
            capture_output=True,
            text=True,
            check=False,
        )
        findings.hold(f"[{extra}] can be resolved", ended.returncode == 0, ended.stderr[-900:])
        if ended.returncode == 0:
            names = [one["metadata"]["name"] for one in json.loads(report.read_text())["install"]]
            both = {"onnxruntime", "onnxruntime-gpu"} <= set(names)
            findings.hold(f"[{extra}] brings one onnxruntime at most", not both, names)
            findings.hold(f"[{extra}] brings no torch", "torch" not in names, names)
            figures = findings.figures.setdefault("resolved", {})
            figures[extra] = f"{len(names)} packages, not installed: {reason}"
    for extra, reason in UNRESOLVED.items():
        findings.figures.setdefault("resolved", {})[extra] = f"not resolved: {reason}"


PARTS = {one.__name__: one for one in (base, cpu, offline, serve, scale, export, resolved)}


def _runs_from_the_environment(venv: Venv, findings: Findings) -> None:
    """What is imported there is the wheel, and nothing of the checkout."""
    for package in ("llama_runtime", "llama_export", "llama_decoder"):
        code = f"import importlib.util as u; print(u.find_spec({package!r}).origin)"
        path = venv.python(code).strip()
        good = Path(path).is_relative_to(venv.bin.parent)
        findings.hold("the wheel is what runs", good, path)
    venv.run("llama-run", "--help")
    venv.run("llama-export", "--help")


def _runs_a_bundle(venv: Venv, bundle: Path, findings: Findings) -> None:
    said = _generated(venv, bundle)
    findings.hold("generate answers", len(said["token_ids"]) == 4, said)
    prompts = venv.home / "prompts.txt"
    prompts.write_text(PROMPTS)
    venv.run("llama-run", "batch", str(prompts), "--bundle", str(bundle), "--force", *OPTIONS)
    good = _good_rows(venv.home / "prompts.results.jsonl")
    findings.hold("batch answers each row", good == 3, good)
    facts = json.loads(venv.run("llama-run", "collect-env", "--json").stdout)
    broken = {name: one for name, one in facts["libraries"].items() if "error" in one}
    findings.hold("no library is broken", not broken, broken)


def _generated(venv: Venv, bundle: Path) -> dict[str, list[int]]:
    command = ("llama-run", "generate", "one", "--bundle", str(bundle), "--json", *OPTIONS)
    said: dict[str, list[int]] = json.loads(venv.run(*command).stdout)
    return said


def _good_rows(path: Path) -> int:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sum(row["error"] is None and len(row["token_ids"]) == 4 for row in rows)


@contextmanager
def _served(venv: Venv, bundle: Path) -> Iterator[str]:
    """The address of a server, which is told to end and must do so."""
    command = venv.start("llama-run", "serve", "--port", "0", "--bundle", str(bundle))
    process = subprocess.Popen(
        command, env=venv.environment, cwd=venv.home, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            said = []
            for line in process.stderr or ():
                said.append(line)
                if line.startswith("ready as"):
                    yield line.rsplit(" ", 1)[1].strip()
                    break
            else:
                raise RuntimeError(f"the server isn't ready: {''.join(said)[-2000:]}")
            process.terminate()
            if process.wait(60) != 0:
                raise RuntimeError(f"the server ended with {process.returncode}")
        finally:
            process.kill()


def _asked(address: str, body: bytes | None = None) -> bytes:
    headers = {"Content-Type": "application/json"} if body else {}
    request = urllib.request.Request(address, data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        data: bytes = answer.read()
        return data


def _link(page: str, name: str) -> str:
    """The path that a page has for a file: the text between the quotes around it."""
    before, _, after = page.partition(name)
    start = max(before.rfind('"'), before.rfind("'")) + 1
    link = before[start:] + name + after.partition('"')[0]
    return link if link.startswith("/") else f"/{link}"
