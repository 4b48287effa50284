"""How a machine is shared out among the processes of a job."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from llama_runtime.batch.runners.worker_spec import WorkerSpec
from llama_runtime.errors import CapacityError, RequestError
from llama_runtime.machine import default_threads
from llama_runtime.memory_plan import MemoryPlan, megabytes


@dataclass(frozen=True, slots=True)
class Place:
    """What a worker may use of the machine.

    Attributes:
        spec: what it loads.
        cores: processors; None for those of this process.
    """

    spec: WorkerSpec
    cores: list[int] | None = None


def check_memory(plan: MemoryPlan, count: int, *, on_gpu: bool) -> None:
    """Refuse what doesn't fit into memory as often as it is wanted.

    Args:
        plan: of one process.
        count: how many there are.
        on_gpu: whether each has a device of its own.

    Raises:
        CapacityError: it doesn't fit.
    """
    plan.check()
    if not on_gpu and count * plan.total > plan.available.num_bytes:
        raise CapacityError(
            f"{count} workers need {megabytes(count * plan.total)}, {megabytes(plan.total)} each, "
            f"and {megabytes(plan.available.num_bytes)} are available: give fewer, or a smaller "
            "--max-batch",
            param="workers",
        )


def places(spec: WorkerSpec, count: int, *, on_gpu: bool) -> list[Place]:
    """Share the machine out: a device each, or a group of processors.

    Args:
        spec: what each loads; its threads and devices are those of all together, if given.
        count: how many processes.
        on_gpu: whether they run on devices.

    Raises:
        RequestError: there are fewer devices than processes.
    """
    if on_gpu:
        devices = list(range(count)) if spec.devices is None else spec.devices
        if len(devices) != count:
            raise RequestError(
                f"{count} workers need as many devices, not {len(devices)}: a process has one each",
                param="workers",
            )
        return [Place(replace(spec, devices=[device])) for device in devices]
    threads = max(1, (spec.threads or default_threads()) // count)
    each = replace(spec, threads=threads)
    if not hasattr(os, "sched_getaffinity"):  # nor can they be chosen
        return [Place(each) for _ in range(count)]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count * threads:
        return [Place(each) for _ in range(count)]
    groups = [cores[i * len(cores) // count : (i + 1) * len(cores) // count] for i in range(count)]
    return [Place(each, group) for group in groups]
