"""The peers: what each is installed from, and how its model is made by its own tools."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from scripts.install_torch import TORCH
from scripts.peers.process import ROOT, last_line

PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")


class RecipeError(Exception):
    """A peer that can't be installed, or a model that it can't convert, in one sentence."""


@dataclass(frozen=True)
class Environment:
    """One virtual environment.

    Attributes:
        packages: what is installed.
        reported: those whose releases decide about its speed.
        torch: whether its converter needs torch.
        removed: what comes in with them and is taken out again.
    """

    packages: tuple[str, ...]
    reported: tuple[str, ...]
    torch: bool = True
    removed: tuple[str, ...] = ()


ENVIRONMENTS = {
    "openvino": Environment(
        (
            "openvino-genai==2026.4.1.0",
            "optimum-intel[openvino]==2.2.0",
            "nncf==3.4.0",
        ),
        ("openvino", "openvino-genai", "openvino-tokenizers", "optimum-intel", "nncf"),
        # Asked for by optimum-intel, not needed for text; it may not fit a CPU build of torch, and
        # then transformers can't be imported
        removed=("torchvision",),
    ),
    "onnxruntime-genai": Environment(
        ("onnxruntime-genai==0.18.0", "transformers>=5", "onnx", "onnx-ir", "onnxscript"),
        ("onnxruntime-genai", "onnxruntime"),
    ),
    "ctranslate2": Environment(
        ("ctranslate2==4.8.5", "transformers>=5", "accelerate"), ("ctranslate2",)
    ),
    "llama-cpp": Environment(  # compiles, for minutes
        ("llama-cpp-python==0.3.36",), ("llama-cpp-python",), torch=False
    ),
}


@dataclass(frozen=True)
class Peer:
    """One way to run a model.

    Attributes:
        name: what the report calls it.
        bits: of its weights.
        environment: where it is installed.
        worker: its module in ``scripts.peers``.
        model: the folder or file that is made for it, under the model's folder; the GGUF itself
            where that is None.
    """

    name: str
    bits: int
    environment: str
    worker: str
    model: str | None


PEERS = (
    Peer("openvino-gguf", 4, "openvino", "openvino", None),
    Peer("openvino-int4", 4, "openvino", "openvino", "openvino-int4"),
    Peer("openvino-int8", 8, "openvino", "openvino", "openvino-int8"),
    Peer("genai-int4", 4, "onnxruntime-genai", "genai", "genai-int4"),
    Peer("genai-int8", 8, "onnxruntime-genai", "genai", "genai-int8"),
    Peer("llamacpp-gguf", 4, "llama-cpp", "llamacpp", None),
    Peer("llamacpp-q4_0", 4, "llama-cpp", "llamacpp", "q4_0.gguf"),
    Peer("llamacpp-q8_0", 8, "llama-cpp", "llamacpp", "q8_0.gguf"),
    Peer("ctranslate2-int8", 8, "ctranslate2", "ct2", "ctranslate2-int8"),
)


@dataclass(frozen=True)
class Source:
    """One model, as it is converted for every peer.

    Attributes:
        folder: where what is made of it lies.
        huggingface: a directory with float weights and a tokenizer.
        gguf: the same as GGUF.
        packed: whether the GGUF's weights have 4 bits: only then do peers run it as it is.
    """

    folder: Path
    huggingface: Path
    gguf: Path
    packed: bool


def peers_of(source: Source) -> list[Peer]:
    """Those that can run a model."""
    return [peer for peer in PEERS if peer.model is not None or source.packed]


def versions(venvs: Path, environment: str) -> dict[str, str]:
    """Releases of what is installed; none where nothing is."""
    reader = "import sys, json, importlib.metadata as m; "
    reader += "print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
    names = ENVIRONMENTS[environment].reported
    try:
        done = subprocess.run(
            [str(interpreter(venvs, environment)), "-c", reader, *names],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    found: dict[str, str] = json.loads(done.stdout)
    return found


def interpreter(venvs: Path, environment: str) -> Path:
    """The Python of an environment."""
    return venvs / environment / "venv" / "bin" / "python"


def install(venvs: Path, environment: str) -> None:
    """Make an environment unless it is there as the recipe has it.

    Raises:
        RecipeError: pip failed.
    """
    recipe, python = ENVIRONMENTS[environment], interpreter(venvs, environment)
    done = venvs / environment / "installed.json"
    wanted = json.dumps([*recipe.packages, *([TORCH] if recipe.torch else [])])
    if done.is_file() and done.read_text() == wanted and python.is_file():
        return
    print(f"installing {environment}", file=sys.stderr, flush=True)
    done.unlink(missing_ok=True)
    packages = list(recipe.packages)
    _run([sys.executable, "-m", "venv", "--clear", str(python.parents[1])])
    if recipe.torch:
        _run([str(python), str(ROOT / "scripts" / "install_torch.py")])
        packages.append(TORCH)
    _run([str(python), *PIP, "install", *packages])
    if recipe.removed:
        _run([str(python), *PIP, "uninstall", "--yes", *recipe.removed])
    done.write_text(wanted)


def model_of(peer: Peer, source: Source, venvs: Path) -> Path:
    """A peer's model, made by its own tools unless it is there.

    Raises:
        RecipeError: the tool failed.
    """
    if peer.model is None:
        return source.gguf
    output = source.folder / peer.model
    if output.exists():
        return output
    print(f"converting for {peer.name}", file=sys.stderr, flush=True)
    scratch = output.with_name(f"unfinished-{output.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.unlink(missing_ok=True)
    _run(_conversion(peer, source, scratch, interpreter(venvs, peer.environment)))
    scratch.rename(output)
    return output


def _conversion(peer: Peer, source: Source, output: Path, python: Path) -> list[str]:
    # resolve() would leave the environment: its interpreter is a link
    tools, kind = python.absolute().parent, peer.name.rpartition("-")[2]
    if peer.environment == "openvino":
        command = [str(tools / "optimum-cli"), "export", "openvino"]
        command += ["--task", "text-generation-with-past", "--weight-format", kind]
        # 576 columns, which SmolLM2 has, are no multiple of the usual 128
        command += ["--group-size", "64"] if kind == "int4" else []
        return [*command, "--model", str(source.huggingface), str(output)]
    if peer.environment == "onnxruntime-genai":
        command = [str(python), "-m", "onnxruntime_genai.models.builder", "-e", "cpu"]
        command += ["-i", str(source.huggingface), "-o", str(output), "-p", kind]
        command += ["-c", str(source.folder / "genai-cache"), "--extra_options", "hf_token=false"]
        return [*command, "accuracy_level=4", "block_size=32"]
    if peer.environment == "ctranslate2":
        command = [str(tools / "ct2-transformers-converter"), "--quantization", kind]
        command += ["--model", str(source.huggingface), "--copy_files", "tokenizer.json"]
        return [*command, "--output_dir", str(output)]
    module = "scripts.peers.quantise_gguf"
    return [str(python), "-m", module, str(source.gguf), str(output), kind]


def _run(command: list[str]) -> None:
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **quiet}, check=False
    )
    if done.returncode:
        what = last_line(done.stderr) or last_line(done.stdout) or f"status {done.returncode}"
        raise RecipeError(f"{Path(command[0]).name} {' '.join(command[1:3])} failed: {what}")
