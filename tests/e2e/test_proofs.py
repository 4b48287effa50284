"""A part of a proof that breaks off is a finding, and takes none of the others with it."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("reads /proc", allow_module_level=True)

from scripts import conformance_proof, serving_process
from scripts.findings import Findings


def test_what_earlier_and_later_parts_find_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def prove(part: str, *given: Any) -> None:
        findings: Findings = given[-1]
        if part == "aiperf":
            raise RuntimeError("aiperf ended with 2")
        findings.wrong(f"the law of {part}", "a case")
        findings.figures[part] = 1

    monkeypatch.setattr(conformance_proof, "_prove", prove)
    monkeypatch.setattr(sys, "argv", ["prove", "--bundle", str(tmp_path), "--seed", "3"])
    with pytest.raises(SystemExit) as ended:
        conformance_proof.main()
    assert ended.value.code == 1
    said = capsys.readouterr()
    *lines, last = said.out.splitlines()
    for part in ("schemathesis", "lm-eval", "tokens"):
        assert f"the law of {part}: 1 times: a case" in lines
    assert "aiperf: it comes to its end: 1 times: RuntimeError('aiperf ended with 2')" in lines
    assert "Traceback" in said.err
    assert json.loads(last) == {
        "passed": False,
        "parts": list(conformance_proof.PARTS),
        "seed": 3,
        "schemathesis": 1,
        "lm-eval": 1,
        "tokens": 1,
    }


def test_the_log_is_looked_at_where_a_part_breaks_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    @contextmanager
    def running(*_: object, **__: object) -> Any:
        log = tmp_path / "log"
        log.write_text('{"level": "error", "message": "it fell over"}\n')
        yield serving_process.Server(None, 1, "m", 9, log)  # type: ignore[arg-type]

    monkeypatch.setattr(serving_process, "running", running)

    def break_off(server: serving_process.Server) -> None:
        raise ConnectionError(server.port)

    findings = Findings()
    with (
        findings.part("overload"),
        serving_process.watched(findings, (), tmp_path, tmp_path) as server,
    ):
        break_off(server)
    assert [law.partition(":")[0] for law in findings.bad] == ["the log has no error", "overload"]
    assert "it fell over" in findings.bad[0]
