"""Proof that what is packaged is what users need; scripts/check_wheel runs it."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from scripts import check_wheel_contents, check_wheel_installs
from scripts.check_wheel_contents import sdist_contents, wheel_contents
from scripts.check_wheel_venv import quietly
from scripts.findings import Findings
from tests.tiny_model import build_tiny_bundle

INSTALLS = check_wheel_installs.PARTS
PARTS = ("contents", *INSTALLS)
QUICK = ("contents", "cpu")


def main() -> None:
    """Parse arguments, run, print what is wrong, and a last line of JSON."""
    parser = argparse.ArgumentParser(prog="scripts/check_wheel")
    parser.add_argument("--quick", action="store_true", help="contents and [cpu] only")
    parser.add_argument("--part", help="some of " + ",".join(PARTS))
    args = parser.parse_args()
    parts = args.part.split(",") if args.part else list(QUICK if args.quick else PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--part {','.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    findings = Findings()
    with tempfile.TemporaryDirectory(prefix="caravan-wheel-") as name:
        folder = Path(name)
        (folder / "dist").mkdir()
        wheel, sdist = check_wheel_contents.build(folder / "dist")
        bundle = None
        for part in parts:
            print(f"{part} ...", flush=True)
            began = time.monotonic()
            with findings.part(part):
                if part == "contents":
                    _prove_contents(wheel, sdist, folder, findings)
                else:
                    bundle = bundle or build_tiny_bundle(folder)
                    (folder / part).mkdir()
                    INSTALLS[part](wheel, bundle, folder / part, findings)
            findings.figures.setdefault(part, {})["seconds"] = round(time.monotonic() - began, 1)
    for key, figures in findings.figures.items():
        print(f"{key}: {figures}")
    findings.end(parts=parts)


def _prove_contents(wheel: Path, sdist: Path, folder: Path, findings: Findings) -> None:
    """The wheel, the sdist, and the wheel that pip builds of the sdist, as it does for users."""
    held, source = wheel_contents(wheel), sdist_contents(sdist)
    for fault in (
        *check_wheel_contents.wheel_faults(held),
        *check_wheel_contents.sdist_faults(source),
    ):
        findings.wrong("both hold what they should", fault)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    again = folder / "of-sdist"
    quietly([*command, str(again), str(sdist)], folder)
    (other,) = again.glob("*.whl")
    differ = {name for name in held if held[name] != wheel_contents(other).get(name)}
    findings.hold("the sdist's wheel is the checkout's", not differ, sorted(differ))
    findings.hold("and holds no more", held.keys() == wheel_contents(other).keys())
    findings.figures["contents"] = {
        "wheel_kb": round(wheel.stat().st_size / 1e3),
        "wheel_files": len(held),
        "sdist_kb": round(sdist.stat().st_size / 1e3),
        "sdist_files": len(source),
    }


if __name__ == "__main__":
    main()
