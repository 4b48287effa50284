"""What runs under emulation: products and the engine, measured against numpy's numbers.

usage: python -m tests.old_cpu.worker FOLDER THREADS

FOLDER is one that ``tests.old_cpu.cases`` filled, with torch and onnx, on the real processor. Here
neither is imported. Prints one line of JSON, which ``tests.old_cpu.proof`` judges.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_runtime.backends.ort_cpu import OrtCpu, import_onnxruntime, open_session
from llama_runtime.bundle import Bundle, open_bundle
from llama_runtime.contract import MIN_CHUNK, SLOTS, cache_capacity
from llama_runtime.params import SamplingParams
from llama_runtime.slots_engine import slots_engine
from llama_runtime.step_batch import Step
from llama_runtime.tokenizer import Tokenizer
from tests.wrapped_backend import Wrapped

Rows = npt.NDArray[np.float32]

EPSILON = float(np.finfo(np.float32).eps)
MAX_LEN = 128


def main() -> None:
    """Run every part and print its figures."""
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    figures: dict[str, Any] = {"features": cpu_features(), "threads": threads}
    bundle = open_bundle(folder / "bundle")
    graph = bundle.graph_path(SLOTS.name)
    packed = Runner(bundle, open_session(graph, threads))
    unpacked = Runner(bundle, open_unpacked_session(graph, threads))
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "products": lambda: products(folder, threads),
        "bytes": lambda: byte_products(folder, threads),
        "runtime": lambda: runtime(folder, packed),
        "company": lambda: company(folder, packed),
        "unpacked_company": lambda: company(folder, unpacked),
    }
    for name, part in parts.items():
        started = time.monotonic()
        figures[name] = part()
        figures[name]["seconds"] = round(time.monotonic() - started, 1)
    figures["torch_free"] = not {"torch", "onnx"} & sys.modules.keys()
    print(json.dumps(figures))


def cpu_features() -> list[str]:
    """The vector extensions that numpy's dispatcher finds by CPUID, as every library's does."""
    found = importlib.import_module("numpy._core._multiarray_umath").__cpu_features__
    return [name for name in ("AVX", "FMA3", "AVX2", "AVX512F") if found[name]]


# --- packed products ----------------------------------------------------------------------------


def byte_products(folder: Path, threads: int) -> dict[str, Any]:
    """Products of 1 to 33 rows of bytes: how many numbers are not those of exact arithmetic."""
    result = {"numbers": 0, "wrong": 0}
    for path in sorted(folder.glob("bytes_*.npz")):
        case = np.load(path)
        session = open_session(path.with_suffix(".onnx"), threads)
        for count in (1, 2, 5, 12, 33):
            for found in session.run(None, {"codes": case["codes"][:count]}):
                result["numbers"] += found.size
                result["wrong"] += int((found != case["expected"][:count]).sum())
    return result


def products(folder: Path, threads: int) -> dict[str, Any]:
    """Products of 1 to 33 packed rows: how far from float64, and whose bits depend on the others.

    ``max_error`` counts float32's epsilon, relative to the sum of the terms' absolute values.
    """
    result = {"shapes": 0, "products": 0, "max_error": 0.0, "other_bits": 0, "one_row_differs": 0}
    for path in sorted(folder.glob("product_*.npz")):
        case = np.load(path)
        x, expected, scale = case["x"], case["expected"], case["scale"]
        session = open_session(path.with_suffix(".onnx"), threads)

        def run(rows: Rows, session: Any = session) -> Rows:
            return session.run(None, {"x": rows})[0]  # type: ignore[no-any-return]

        together = run(x)
        for count in range(1, len(x) + 1):
            rows = run(x[:count])
            error = np.abs(rows - expected[:count]) / scale[:count]
            result["max_error"] = max(result["max_error"], float(error.max()) / EPSILON)
            differs = not same_bits(rows, together[:count])
            result["one_row_differs" if count == 1 else "other_bits"] += differs
        copies = run(np.repeat(x[:1], len(x), axis=0))
        result["other_bits"] += not same_bits(copies, np.repeat(together[:1], len(x), axis=0))
        result["products"] += len(x) + 1
        result["shapes"] += 1
    return result


def same_bits(one: Rows, other: Rows) -> bool:
    """Whether two arrays are the same bytes."""
    return one.tobytes() == other.tobytes()


# --- the engine ---------------------------------------------------------------------------------


def open_unpacked_session(graph: Path, threads: int) -> Any:
    """A session whose products of one row take another kernel than those of more.

    ONNX Runtime has such a kernel for float32 weights that it hasn't packed, on every processor: so
    here the one-row probe has something to find.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class Recorded(Wrapped):
    """Keeps every row of logits that is sampled, and what kind of steps it saw."""

    def __init__(self, backend: OrtCpu) -> None:
        super().__init__(backend)
        self.rows: dict[int, list[Rows]] = {}
        self.steps = 0
        self.idle_steps = 0  # with a slot that nobody uses
        self.one_row_steps = 0

    def run(self, step: Step) -> Rows:
        logits = super().run(step)
        sampled = [chunk.seq.id for chunk in step.chunks if chunk.samples]
        for sequence_id, row in zip(sampled, logits, strict=False):
            self.rows.setdefault(sequence_id, []).append(row.copy())
        self.steps += 1
        self.idle_steps += len(step.chunks) < len(step.query_seqlens)
        self.one_row_steps += sum(chunk.num_tokens for chunk in step.chunks) == 1
        return logits


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    max_tokens: int


@dataclass
class Run:
    """What each request of a run got, in order of the requests."""

    rows: list[Rows]  # [tokens, V] each
    token_ids: list[list[int]]
    backend: Recorded


class Runner:
    """Runs requests through one session, with any number of slots."""

    def __init__(self, bundle: Bundle, session: Any) -> None:
        self.geometry = bundle.manifest.geometry
        self._session = session
        self._token_bytes = Tokenizer(bundle.tokenizer_path).byte_table
        # What the one-row probe finds, which an `LLM` asks once.
        self.row_multiple = self._backend(1, MIN_CHUNK, None).row_multiple

    def _backend(self, slots: int, capacity: int, row_multiple: int | None) -> OrtCpu:
        return OrtCpu(
            self._session,
            self.geometry,
            num_slots=slots,
            capacity=capacity,
            row_multiple=row_multiple,
        )

    def run(
        self,
        requests: list[Request],
        slots: int,
        chunk: int = MIN_CHUNK,
        arrivals: Callable[[int], int] = lambda waiting: waiting,
    ) -> Run:
        """Run all requests; ``arrivals`` says how many of those that wait come before a step."""
        backend = self._backend(slots, cache_capacity(MAX_LEN, chunk), self.row_multiple)
        recorded = Recorded(backend)
        engine = slots_engine(
            recorded,
            self._token_bytes,
            (),
            vocab_size=self.geometry.vocab_size,
            max_batch=slots,
            max_len=MAX_LEN,
            prompt_budget=chunk,
            max_chunk=chunk,
        )
        waiting, sequences = list(requests), []
        while waiting or engine.has_work:
            count = arrivals(len(waiting)) if engine.has_work else 1
            for request in waiting[:count]:
                params = SamplingParams(
                    max_tokens=request.max_tokens, temperature=0.0, ignore_eos=True
                )
                sequences.append(engine.add(request.prompt, params))
            del waiting[:count]
            engine.step()
        if engine.failure is not None:
            raise engine.failure
        engine.check()
        rows = [np.stack(recorded.rows[seq.id]) for seq in sequences]
        return Run(rows, [seq.completion_token_ids for seq in sequences], recorded)


def read_requests(folder: Path) -> list[Request]:
    """The requests of the case."""
    return [Request(**r) for r in json.loads((folder / "requests.json").read_text())]


def runtime(folder: Path, runner: Runner) -> dict[str, Any]:
    """A ragged job with more requests than slots: how far its logits and tokens are from numpy."""
    requests = read_requests(folder)
    run = runner.run(requests, slots=3)
    expected = np.load(folder / "expected.npz")
    difference, tokens = 0.0, 0
    for i, (rows, token_ids) in enumerate(zip(run.rows, run.token_ids, strict=True)):
        right = expected[f"tokens_{i}"]
        # What follows a first different token is another text.
        same = int((np.array(token_ids) == right).cumprod().sum())
        tokens += same
        error = np.abs(rows - expected[f"logits_{i}"])[: same + 1]
        difference = max(difference, float(error.max()))
    return {
        "requests": len(requests),
        "tokens": sum(request.max_tokens for request in requests),
        "equal_tokens": tokens,
        "max_logit_difference": difference,
        "steps": run.backend.steps,
        "steps_with_idle_slots": run.backend.idle_steps,
    }


def company(folder: Path, runner: Runner) -> dict[str, Any]:
    """Each request alone, then all mixed by random schedules: rows of logits with other bits."""
    requests = read_requests(folder)
    result = {"row_multiple": runner.row_multiple, "schedules": 0, "rows": 0, "other_bits": 0}
    result["one_row_steps"] = 0
    alone = []
    for request in requests:
        run = runner.run([request], slots=1)
        result["one_row_steps"] += run.backend.one_row_steps
        alone.append(run.rows[0])
    for seed in range(json.loads((folder / "schedules.json").read_text())):
        choose = random.Random(seed)
        members = choose.sample(range(len(requests)), len(requests))

        def arrivals(waiting: int, choose: random.Random = choose) -> int:
            return choose.choice([0, 1, 1, 2, waiting])

        run = runner.run(
            [requests[i] for i in members],
            choose.randint(2, 5),
            (64, 100, MIN_CHUNK)[seed % 3],
            arrivals,
        )
        for i, rows in zip(members, run.rows, strict=True):
            result["rows"] += len(rows)
            result["other_bits"] += sum(
                not same_bits(*pair) for pair in zip(rows, alone[i], strict=True)
            )
        result["schedules"] += 1
    return result


if __name__ == "__main__":
    main()
