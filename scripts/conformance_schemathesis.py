"""``schemathesis`` asks a server what its document allows, and what it doesn't."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import requests

from scripts.conformance_document import closed, narrowed
from scripts.findings import Findings
from scripts.serving_process import Server

_NOT_HERE = "positive_data_acceptance"  # no schema knows what the context of a model holds
_CHARACTERS = 3000


def prove(server: Server, folder: Path, findings: Findings, *, examples: int, seed: int) -> None:
    """Ask by the document as it is, and by one that allows only what is answered soon.

    Args:
        server: to ask.
        folder: an empty one.
        findings: what is found.
        examples: for each route.
        seed: of the choice.
    """
    headers = {} if server.key is None else {"Authorization": f"Bearer {server.key}"}
    url = f"http://127.0.0.1:{server.port}"
    document = closed(requests.get(f"{url}/openapi.json", headers=headers, timeout=30).json())
    less = narrowed(document, server.model, min(256, server.vocab_size))
    for name, asked, mode in (("all", document, "all"), ("answered", less, "positive")):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(asked))
        report = folder / f"{name}.har"
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", str(path), "--url", url),
            *("--mode", mode, "--seed", str(seed), "--max-examples", str(examples)),
            *("--checks", "all", "--exclude-checks", _NOT_HERE, "--continue-on-failure"),
            *("--phases", "coverage,fuzzing", "--report", "har", "--report-har-path", str(report)),
            *(f"--header={key}: {value}" for key, value in headers.items()),
        ]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        said = ended.stdout[-_CHARACTERS:]
        findings.hold(f"schemathesis, {name}: nothing is found", ended.returncode == 0, said)
        found = _statuses(report)
        failed = {status for by_path in found.values() for status in by_path if status >= 500}
        findings.hold(f"schemathesis, {name}: no server error", not failed, failed)
        findings.figures[f"schemathesis {name}"] = {
            path: dict(sorted(counts.items())) for path, counts in sorted(found.items())
        }
    for route in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        answered = found[route][200]
        findings.hold("every route is answered often", answered > examples / 4, (route, answered))


def _statuses(report: Path) -> dict[str, Counter[int]]:
    """How often each status came, by path."""
    found: dict[str, Counter[int]] = {}
    entries: list[Any] = json.loads(report.read_text())["log"]["entries"]
    for entry in entries:
        path = "/" + entry["request"]["url"].partition("://")[2].partition("/")[2].partition("?")[0]
        found.setdefault(path, Counter())[entry["response"]["status"]] += 1
    return found
