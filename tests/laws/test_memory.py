"""Memory: a run's peak, what untouched cache costs, and that long runs don't grow.

``scripts/prove_memory`` runs the soak for longer, on the real model.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llama_runtime.llm import LLM
from llama_runtime.settings import DEFAULT_PREFIX_TOKENS
from scripts.soak import MAX_BATCH, MAX_LEN, soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MB = 10**6
PEAK_BYTES = 350 * MB  # the most that a run takes beside its weights and the cache that it touches
TOKEN_BYTES = 46_080  # keys and values of one token of the real model

# 32 prompts of 130 tokens: the widest chunk of every slot, and a step of every other kind. What
# the cache holds are the only pages without huge pages.
RUN = """
import json, re, sys
from pathlib import Path
from llama_runtime import LLM, SamplingParams

def status(field):
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\\s*(\\d+) kB$", text, re.MULTILINE)[1]) * 1024

def resident(pattern):
    mappings = re.split(r"\\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    sizes = [re.search(r"^Rss:\\s*(\\d+) kB$", one, re.MULTILINE)[1]
             for one in mappings if re.search(pattern, one, re.MULTILINE)]
    return sum(map(int, sizes)) * 1024

CACHE, FILE = r"^VmFlags:.* nh\\b", r"model\\.safetensors$"

with LLM(sys.argv[1], max_batch=32, max_len=2048, threads=2) as llm:
    untouched, unread = resident(CACHE), resident(FILE)
    prompts = [[(7 * i + 31 * j) % 40_000 for j in range(130)] for i in range(32)]
    llm.generate(prompts, SamplingParams(max_tokens=3, temperature=1.0, top_p=0.9, ignore_eos=True))
    plan = llm.memory_plan
    print(json.dumps({
        "peak": status("VmHWM"), "held": status("VmRSS"), "untouched": untouched,
        "touched": resident(CACHE), "unread": unread, "read": resident(FILE),
        "weights": plan.weights, "cache": plan.cache, "workspace": plan.workspace,
        "prefixes": plan.prefixes,
    }))
"""

PEAK_OF_CHILD = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stderr=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.fixture(scope="module")
def figures(real_bundle: Path) -> dict[str, int]:
    """What a run of the real model took, in bytes."""
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(real_bundle)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found: dict[str, int] = json.loads(run.stdout)
    return found


@pytest.fixture(scope="module")
def weights(real_bundle: Path) -> int:
    return (real_bundle / "model.safetensors").stat().st_size


def test_the_peak_is_weights_and_cache_touched_and_350_mb_at_most(
    figures: dict[str, int], weights: int
) -> None:
    assert weights < figures["peak"] < weights + figures["touched"] + PEAK_BYTES


def test_cache_that_is_not_touched_costs_nothing(figures: dict[str, int]) -> None:
    assert figures["cache"] > 3_000 * MB
    assert figures["untouched"] <= 16 * 60 * 1024  # the probe's own few slots
    # The prompts fill the store of prefixes: 128 tokens of each are before its last chunk.
    tokens = 32 * 133 * TOKEN_BYTES + figures["prefixes"]
    assert figures["prefixes"] == 32 * 128 * TOKEN_BYTES
    pages = 32 * 3 * 60 * 4096  # of each slot, KV head and buffer one may be touched in part
    assert tokens - 32 * TOKEN_BYTES <= figures["touched"] <= tokens + pages


def test_of_a_tied_embedding_only_the_rows_looked_up_are_in_memory_twice(
    figures: dict[str, int],
) -> None:
    """The file was read for packing; what stays of it is what the probe and the run looked up."""
    embedding = 49_152 * 576 * 4
    assert figures["unread"] < embedding / 2
    assert figures["unread"] < figures["read"] < embedding


def test_the_plan_counts_what_the_step_really_holds(figures: dict[str, int], weights: int) -> None:
    """Neither less, nor so much more that a setting is refused which would fit.

    Pages of the weight file can be dropped and come back, so the plan counts them as free.
    """
    assert weights < figures["weights"] < weights + 2 * MB  # with the graph
    rest = figures["held"] - weights - figures["touched"] - figures["read"]
    assert 0.6 * figures["workspace"] < rest <= figures["workspace"]


@pytest.mark.parametrize(("prompt_words", "max_tokens"), [(3, 8), (140, 2)])
def test_the_command_keeps_to_that_peak(
    real_bundle: Path, weights: int, tmp_path: Path, prompt_words: int, max_tokens: int
) -> None:
    """As a user has it: a file of prompts, each in a slot of its own."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{i}{' word' * prompt_words}\n" for i in range(32)))
    given = ["--no-chat", "--max-tokens", str(max_tokens), "--bundle", str(real_bundle)]
    # Through a small process: the peak that the system counts begins with that of the parent.
    command = [sys.executable, "-m", "llama_runtime", "batch", str(prompts), *given]
    run = subprocess.run(
        [sys.executable, "-c", PEAK_OF_CHILD, *command],
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    peak = int(run.stdout) * 1024
    lines = (tmp_path / "prompts.results.jsonl").read_text().splitlines()
    spent = [json.loads(line)["usage"] for line in lines]
    tokens = sum(one["prompt_tokens"] + one["completion_tokens"] for one in spent)
    kept = min(DEFAULT_PREFIX_TOKENS, sum(one["prompt_tokens"] for one in spent))
    assert weights < peak < weights + (tokens + kept) * TOKEN_BYTES + PEAK_BYTES


def test_memory_does_not_grow_with_requests_aborts_and_dropped_streams(tiny_bundle: Path) -> None:
    with LLM(tiny_bundle, max_batch=MAX_BATCH, max_len=MAX_LEN, threads=1) as llm:
        found = soak(llm, requests=4000, seed=7, say=print)
        llm._engine._engine.check()
        assert llm.stats().running == llm.stats().waiting == 0
    assert found.requests >= 4000
    assert min(found.failed, found.aborted, found.dropped) > 20
    assert found.steady, found
