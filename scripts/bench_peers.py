"""The figures of scripts/bench_peers, which installs what this needs.

    decode   tokens per second at 1, 8 and 32 sequences, 16 tokens in, 64 out
    mixed    256 requests of 16 to 256 tokens in and out, 32 at a time
    prompt   a prompt of 512 tokens and one new token
    1b       decode in the shape of Llama-3.2-1B, random weights, against peers of the same bits
    quality  how far predictions of the evaluation texts are from the fp32 source's

Every worker is a process with its model loaded; they compute in turns, on the same prompts, text in
and text out. A figure is the median of its rounds, a ratio that of the rounds of one run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_runtime.machine import default_threads
from scripts.bench_machine import machine
from scripts.fetch_model import OUTPUT as SMOLLM2
from scripts.make_genai_model import dequantise
from scripts.peers.compare import Runner
from scripts.peers.contest import Contest
from scripts.peers.quality import holds_reference, qualities
from scripts.peers.recipes import (
    ENVIRONMENTS,
    PEERS,
    RecipeError,
    Source,
    install,
    interpreter,
    model_of,
    peers_of,
    versions,
)
from scripts.peers.works import ASKED, MAX_LEN, QUALITY, SLOTS, WORKS, Texts, cases

LARGE = "Llama-3.2-1B"
BITS = {"fp32": 32, "int8": 8, "int4": 4}
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")

Results = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        bundles: ours, by name, of SmolLM2.
        large_bundles: ours, by name, of the large shape.
        works: which works.
        peers: names of the peers; None takes all.
        rounds: how many count.
        threads: of every worker.
        drop: how many times as slow as the fastest ends a runner's part in a case.
        venvs: where peers and models are kept.
    """

    bundles: dict[str, Path]
    large_bundles: dict[str, Path]
    works: list[str]
    peers: list[str] | None
    rounds: int
    threads: int
    drop: float
    venvs: Path


def main() -> None:
    """Run the works that were asked for; the last line is JSON."""
    options = parsed(sys.argv[1:])
    results: Results = {
        **machine(),
        "flags": [flag for flag in FLAGS if flag in _cpu_flags()],
        "threads": options.threads,
        "rounds": options.rounds,
        "asked": ASKED,
    }
    failed = {name: why for name in ENVIRONMENTS if (why := _installed(options, name))}
    results["peer_versions"] = {name: versions(options.venvs, name) for name in ENVIRONMENTS}
    print(json.dumps({k: results[k] for k in ("machine", "flags", "versions", "peer_versions")}))
    small = [work for work in options.works if work != "1b"]
    if small:
        given = options.bundles or _built(options, "smollm2", [str(SMOLLM2)], list(BITS))
        results["smollm2"] = contest(options, _smollm2(options), given, small, failed)
    if "1b" in options.works:
        build = [LARGE, "--weights", "random:0"]
        given = options.large_bundles or _built(options, LARGE, build, ["int8", "int4"])
        results["1b"] = contest(options, _large(options), given, ["1b"], failed)
    print(json.dumps(results))


def contest(
    options: Options,
    source: Source,
    bundles: dict[str, Path],
    works: list[str],
    failed: dict[str, str],
) -> Results:
    """Everybody on one model.

    Args:
        options: what was asked for.
        source: the model.
        bundles: ours, by name.
        works: what is done.
        failed: by environment, why it couldn't be installed.

    Returns:
        By case what ``Contest.run`` returns, and what ``qualities`` returns; then "settings" and
        "idle_cpu" by name.
    """
    common = ["--threads", str(options.threads), "--slots", str(SLOTS), "--max-len", str(MAX_LEN)]
    logs = options.venvs / "logs" / source.folder.name
    results: Results = {}
    with Contest() as contestants:
        for name, bundle in bundles.items():
            command = [sys.executable, "-m", "scripts.peers.caravan", str(bundle.absolute())]
            texts = Texts(bundle / "tokenizer.json")
            runner = Runner(f"caravan-{name}", ours=True, bits=BITS[name[:4]])
            contestants.enter(runner, [*command, *common], texts, logs / f"{runner.name}.log")
        texts = Texts(source.huggingface / "tokenizer.json")
        for peer in peers_of(source):
            if options.peers is not None and peer.name not in options.peers:
                continue
            if peer.environment in failed:
                contestants.notes[peer.name] = failed[peer.environment]
                continue
            try:
                model = model_of(peer, source, options.venvs)
            except RecipeError as error:
                contestants.notes[peer.name] = str(error)
                continue
            python = str(interpreter(options.venvs, peer.environment))
            command = [python, "-m", f"scripts.peers.{peer.worker}", str(model), *common]
            runner = Runner(peer.name, ours=False, bits=peer.bits)
            contestants.enter(runner, command, texts, logs / f"{peer.name}.log")
        for work in works:
            for case in cases(work):
                results[case.name] = contestants.run(
                    case, options.rounds, options.drop, by_bits=work == "1b"
                )
        results["settings"] = contestants.settings
        results["idle_cpu"] = contestants.idle()
        if QUALITY in works:
            ours = {f"caravan-{name}": bundle for name, bundle in bundles.items()}
            given_file = [peer.name for peer in PEERS if peer.model is None]
            results[QUALITY] = qualities(contestants, ours, given_file, options.threads)
    if works != [QUALITY]:  # which nothing is timed in
        busiest = max(results["idle_cpu"].items(), key=lambda item: item[1], default=("none", 0.0))
        print(f"idle workers used {busiest[1]:.1%} of a processor at most ({busiest[0]})")
    return results


def parsed(arguments: list[str]) -> Options:
    """The command line; ends the process where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    for name in ("--bundle", "--bundle-1b"):
        parser.add_argument(name, action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--work", default=",".join(WORKS))
    parser.add_argument("--peer", help="names of peers; all without it")
    parser.add_argument("--rounds", type=int, default=5, help="at least 1 (default: 5)")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--drop", type=float, default=3.0, help="default: 3 times as slow")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--venvs", type=Path, default=cache / "caravan-peers")
    given = parser.parse_args(arguments)
    if given.rounds < 1 or given.threads < 1 or given.drop < 1:
        parser.error("--rounds, --threads and --drop must be at least 1")
    works, peers = given.work.split(","), given.peer.split(",") if given.peer else None
    for names, known in ((works, WORKS), (peers or [], [peer.name for peer in PEERS])):
        for name in names:
            if name not in known:
                parser.error(f"there is no {name!r:.80}; there are {', '.join(known)}")
    bundles = _bundles(parser, given.bundle)
    if QUALITY in works and bundles and not any(map(holds_reference, bundles.values())):
        parser.error(
            "quality needs a --bundle that was built with --quality: give one, or leave quality "
            "out of --work"
        )
    return Options(
        bundles=bundles,
        large_bundles=_bundles(parser, given.bundle_1b),
        works=works,
        peers=peers,
        rounds=given.rounds,
        threads=given.threads,
        drop=given.drop,
        venvs=given.venvs.absolute(),
    )


def _bundles(parser: argparse.ArgumentParser, pairs: list[str]) -> dict[str, Path]:
    found = {}
    for name, _, path in (pair.partition("=") for pair in pairs):
        if name[:4] not in BITS or not path:
            parser.error(f"{name!r:.80} is no NAME=PATH whose name begins with fp32, int8 or int4")
        if not (Path(path) / "tokenizer.json").is_file():
            parser.error(f"{path} is no bundle: build one with llama-export build")
        found[name] = Path(path)
    return found


def _installed(options: Options, environment: str) -> str | None:
    """Install an environment if a chosen peer needs it; why that failed, if it did."""
    chosen = [peer for peer in PEERS if options.peers is None or peer.name in options.peers]
    if environment not in {peer.environment for peer in chosen}:
        return None
    try:
        install(options.venvs, environment)
    except RecipeError as error:
        return str(error)
    return None


def _smollm2(options: Options) -> Source:
    folder = options.venvs / "models" / "smollm2"
    if not (folder / "hf").exists():
        scratch = folder / "unfinished-hf"
        shutil.rmtree(scratch, ignore_errors=True)
        dequantise(SMOLLM2, scratch)
        scratch.rename(folder / "hf")
    return Source(folder, folder / "hf", SMOLLM2, packed=True)


def _large(options: Options) -> Source:
    folder, tokenizer = options.venvs / "models" / LARGE, _smollm2(options).huggingface
    if not (folder / "hf").exists():
        command = [sys.executable, "-m", "scripts.peers.random_model", LARGE, str(tokenizer)]
        subprocess.run([*command, str(SMOLLM2), str(folder)], check=True)
    return Source(folder, folder / "hf", folder / "f16.gguf", packed=False)


def _built(options: Options, folder: str, source: list[str], names: list[str]) -> dict[str, Path]:
    """Our bundles of a model, built unless they are there."""
    found = {}
    for name in names:
        found[name] = options.venvs / "models" / folder / f"caravan-{name}"
        if not found[name].exists():
            command = [sys.executable, "-m", "llama_export", "build", *source, "--quiet"]
            subprocess.run([*command, "--precision", name, "--output", found[name]], check=True)
    return found


def _cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split())
    return set()


if __name__ == "__main__":
    main()
