"""Proof that the server is what its clients take it for; scripts/prove_conformance runs it."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

from llama_runtime.llm import LLM
from scripts import (
    conformance_aiperf,
    conformance_lm_eval,
    conformance_schemathesis,
    conformance_tokens,
)
from scripts.conformance_venv import DEFAULT_FOLDER
from scripts.fetch_model import OUTPUT as SMOLLM2
from scripts.findings import Findings
from scripts.serving_process import LLAMA_RUN, Server, watched
from tests.tiny_model import build_tiny_bundle

PARTS = ("schemathesis", "lm-eval", "aiperf", "tokens")
KEY = "a-key-of-the-proof"
MAX_LEN, TINY_MAX_LEN = 512, 256  # the tiny model has no more


def main() -> None:
    """Parse arguments, run, print what is wrong, and a last line of JSON."""
    parser = argparse.ArgumentParser(prog="scripts/prove_conformance")
    parser.add_argument("--part", default=",".join(PARTS), help="some of them (all)")
    parser.add_argument("--bundle", type=Path, help="of a real model in fp32 (one is built)")
    parser.add_argument("--venvs", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--examples", type=int, default=100, help="of each route (100)")
    parser.add_argument("--seed", type=int, default=0, help="of what is asked (0)")
    args = parser.parse_args()
    parts = args.part.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--part {','.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    findings = Findings()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = args.bundle
        if bundle is None and parts != ["schemathesis"]:
            bundle = _real_bundle(folder)
        for part in parts:
            (folder / part).mkdir()
            print(f"{part} ...", flush=True)
            with findings.part(part):
                _prove(part, bundle, folder / part, args, findings)
    for key, figures in findings.figures.items():
        print(f"{key}: {figures}")
    findings.end(parts=parts, seed=args.seed)


def _prove(
    part: str, bundle: Path, folder: Path, args: argparse.Namespace, findings: Findings
) -> None:
    """One part, with a server of its own."""
    if part == "schemathesis":  # asks for too much to have it of a real model
        with _served(build_tiny_bundle(folder), folder, findings, TINY_MAX_LEN) as server:
            conformance_schemathesis.prove(
                server, folder, findings, examples=args.examples, seed=args.seed
            )
        return
    with _served(bundle, folder, findings, MAX_LEN) as server:
        if part == "aiperf":
            conformance_aiperf.prove(server, bundle, folder, args.venvs, findings)
            return
        with LLM(bundle, max_batch=6, max_len=MAX_LEN) as llm:
            if part == "lm-eval":
                conformance_lm_eval.prove(server, llm, folder, args.venvs, findings)
            else:
                conformance_tokens.prove(server, llm, findings, seed=args.seed)


def _served(
    bundle: Path, folder: Path, findings: Findings, max_len: int
) -> AbstractContextManager[Server]:
    options = ("--max-batch", "8", "--max-len", str(max_len))
    return watched(findings, LLAMA_RUN, bundle, folder, *options, key=KEY)


def _real_bundle(folder: Path) -> Path:
    bundle = folder / "real"
    command = ["llama_export", "build", str(SMOLLM2), "--output", str(bundle), "--quiet"]
    subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
    return bundle


if __name__ == "__main__":
    main()
