"""The sampler's kernel alone, at Llama 3's vocabulary."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from llama_runtime import SamplingParams
from llama_runtime.backends.cuda_device import Device
from llama_runtime.backends.cuda_sampler import CudaSampler
from llama_runtime.sequence import Sequence
from llama_runtime.step_arrays import ROW, row_of

VOCAB_SIZE = 128_256
ROWS = (1, 32, 128)
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "whole": {"temperature": 1.0},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "top_k 50, top_p": {"temperature": 0.8, "top_p": 0.95, "top_k": 50},
}
# Standard deviations of logits: those of random weights, and those of a model that knows something.
SPREADS = {"flat": 1.0, "steep": 3.0}
REPEATS = 20


def sampler(rounds: int) -> dict[str, Any]:
    """Microseconds for some rows of each kind."""
    device = Device(0)
    most = max(ROWS)
    kernels = CudaSampler(
        device,
        "float16",
        vocab_size=VOCAB_SIZE,
        num_slots=most,
        max_rows=most,
        eos_token_ids=(),
    )
    results: dict[str, Any] = {}
    logits = device.allocate(2 * most * VOCAB_SIZE)
    rows = device.allocate(ROW.itemsize * most)
    for spread, deviation in SPREADS.items():
        values = np.random.default_rng(0).standard_normal((most, VOCAB_SIZE)) * deviation
        device.upload(logits, values.astype(np.float16))
        for kind, options in KINDS.items():
            packed = np.array([_row(i, options) for i in range(most)], ROW)
            device.upload(rows, packed)
            times = {
                count: [_microseconds(device, kernels, logits, rows, count) for _ in range(rounds)]
                for count in ROWS
            }
            medians = {count: statistics.median(found) for count, found in times.items()}
            results[f"{spread}, {kind}"] = medians
            shown = ", ".join(f"{count} rows {time:.0f} us" for count, time in medians.items())
            print(f"sampler, {spread} logits, {kind:<16} {shown}", flush=True)
    device.close()
    return results


def _row(slot: int, options: dict[str, Any]) -> Any:
    seq = Sequence(slot, [1], 1, SamplingParams(**options), slot, None)  # type: ignore[arg-type]
    seq.slot = slot
    return row_of(seq, VOCAB_SIZE)


def _microseconds(
    device: Device, kernels: CudaSampler, logits: int, rows: int, count: int
) -> float:
    """Of one launch, in a captured run of several."""
    with device.captured() as captured:
        for _ in range(REPEATS):
            kernels.sample(logits, rows, 0, count)
    begin, end = (device._call("cudaEventCreate") for _ in range(2))
    device.launch(captured[0])
    device.record(begin)
    device.launch(captured[0])
    device.record(end)
    device.wait(end)
    device.destroy(captured[0])
    return float(1e3 * device._call("cudaEventElapsedTime", begin, end) / REPEATS)
