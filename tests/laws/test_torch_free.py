"""The runtime runs where torch, and all else that only the export needs, can't be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FORBIDDEN = [
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "gguf",
    "safetensors",
    "llama_decoder",
    "llama_export",
]
# What `import llama_runtime` alone must not import.
HEAVY = ["numpy", "onnxruntime", "tokenizers", "minijinja", "click"]

REFUSE = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN}:
            raise ModuleNotFoundError(f"{{name}} is forbidden here", name=name)

sys.meta_path.insert(0, Refuse())
"""
IMPORT_ALL = """
import importlib, pkgutil
import llama_runtime

modules = [info.name for info in pkgutil.walk_packages(llama_runtime.__path__, "llama_runtime.")]
for name in modules:
    importlib.import_module(name)
"""
GENERATE = """
import json
from llama_runtime import LLM, SamplingParams

with LLM(sys.argv[1], threads=1) as llm:
    params = SamplingParams(max_tokens=8, temperature=0.8, seed=1)
    raw = llm.generate(["Hello", "Hello again"], params)
    chat = llm.chat([{"role": "user", "content": "Hello"}], params)
    streamed = "".join(event.text for event in llm.stream("Hello", params))
assert streamed == raw[0].text
print(json.dumps([completion.token_ids for completion in raw + chat]))
"""


def run(script: str, *arguments: str | Path, home: Path) -> str:
    """Standard output of a script in a fresh interpreter."""
    # Not isolated with -I: the environment may name where the packages are.
    environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    return process.stdout


@pytest.mark.parametrize("name", FORBIDDEN)
def test_the_check_refuses_what_it_forbids(name: str, tmp_path: Path) -> None:
    attempt = f"try:\n    import {name}\nexcept ModuleNotFoundError as error:\n    print(error)"
    assert run(REFUSE + attempt, home=tmp_path) == f"{name} is forbidden here\n"


def test_every_module_of_the_runtime_imports_without_them(tmp_path: Path) -> None:
    report = "\nprint(len(modules), sorted({'numpy', 'torch'} & set(sys.modules)))"
    count, loaded = run(REFUSE + IMPORT_ALL + report, home=tmp_path).split(" ", 1)
    sources = Path(__file__).parents[2].glob("runtime/llama_runtime/**/*.py")
    assert int(count) == len(list(sources)) - 1  # but for the package's own
    assert loaded == "['numpy']\n"


def test_text_is_generated_without_them(tiny_bundle: Path, tmp_path: Path) -> None:
    alone = json.loads(run(REFUSE + GENERATE, tiny_bundle, home=tmp_path))
    assert [len(token_ids) > 0 for token_ids in alone] == [True] * 3
    assert json.loads(run("import sys\n" + GENERATE, tiny_bundle, home=tmp_path)) == alone


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    script = f"""
import sys, time
start = time.process_time()
import llama_runtime, llama_runtime.errors, llama_runtime.contract
seconds = time.process_time() - start
print(sorted(set({HEAVY + FORBIDDEN}) & sys.modules.keys()), seconds < 0.5)
"""
    assert run(script, home=tmp_path) == "[] True\n"
