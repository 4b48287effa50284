"""``aiperf`` measures a server, and none of its requests fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.conformance_venv import output_of, program, write_tokenizer
from scripts.findings import Findings
from scripts.serving_process import Server

PACKAGES = ("aiperf>=0.13",)
REQUESTS, CONCURRENCY = 32, 4
INPUT_TOKENS, OUTPUT_TOKENS = 64, 16
_SHOWN = (
    *("request_throughput", "output_token_throughput"),
    *("time_to_first_token", "inter_token_latency", "request_latency"),
)


def prove(server: Server, bundle: Path, folder: Path, venvs: Path, findings: Findings) -> None:
    """Measure chats and completions, streamed and whole.

    Args:
        server: to ask.
        bundle: that it serves.
        folder: an empty one.
        venvs: where aiperf is, or will be.
        findings: what is found.
    """
    aiperf = program(venvs, "aiperf", *PACKAGES)
    tokenizer = write_tokenizer(bundle, folder / "tokenizer")
    for endpoint, more in (
        ("chat", ["--streaming"]),
        ("completions", ["--streaming"]),
        ("chat", []),
    ):
        output = folder / f"{endpoint}-{len(more)}"
        command = [
            *(str(aiperf), "profile", "--model", server.model, "--tokenizer", str(tokenizer)),
            *("--url", f"http://127.0.0.1:{server.port}", "--endpoint-type", endpoint, *more),
            *("--concurrency", str(CONCURRENCY), "--request-count", str(REQUESTS)),
            *("--synthetic-input-tokens-mean", str(INPUT_TOKENS)),
            *("--output-tokens-mean", str(OUTPUT_TOKENS), "--extra-inputs", "ignore_eos:true"),
            *("--output-artifact-dir", str(output), "--ui", "none", "--random-seed", "0"),
        ]
        if server.key is not None:
            command += ["--api-key", server.key]
        output_of(command, folder, {})  # HF_HUB_OFFLINE would have it refuse the folder
        (path,) = output.rglob("profile_export_aiperf.json")
        _judge(f"{endpoint}{', streamed' if more else ''}", json.loads(path.read_text()), findings)


def _judge(name: str, found: dict[str, Any], findings: Findings) -> None:
    count = (found.get("request_count") or {}).get("avg")
    findings.hold("aiperf gets every answer", count == REQUESTS, (name, count))
    findings.hold(
        "aiperf sees no error", not found.get("error_summary"), found.get("error_summary")
    )
    failed = (found.get("error_request_count") or {}).get("avg", 0)
    findings.hold("aiperf counts no error", failed == 0, (name, failed))
    figures = {
        key: round(found[key]["avg"], 2) for key in _SHOWN if isinstance(found.get(key), dict)
    }
    findings.figures[f"aiperf {name}"] = figures
