"""What this process may use of the machine it runs on: processors and memory.

Both are bounded by the control groups of the process, which is how containers and services are
limited. A process is in one group of each hierarchy; the limits of that group and of all groups
above it hold.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC = Path("/proc")
_MEMORY_LIMITS = (  # the limit, what is used of it, and how the statistics name all below too
    ("memory.max", "memory.current", ""),
    ("memory.high", "memory.current", ""),  # beyond it the kernel slows a process to a crawl
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),  # version 1
)


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory that this process may still take.

    Attributes:
        num_bytes: how much.
        bound: what sets the bound, such as ``this machine``, ``container`` or ``ulimit -v``.
    """

    num_bytes: int
    bound: str


def default_threads() -> int:
    """Processors that this process may use: its affinity, within the container's quota."""
    return min(affinity(), processor_quota() or sys.maxsize)


def affinity() -> int:
    """Processors that this process may run on; all of the machine where none are excluded."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_quota() -> int | None:
    """Whole processors, at least 1, of the tightest quota that holds; None if there is none."""
    quota = min(map(_quota, _control_groups("cpu")), default=sys.maxsize)
    return None if quota == sys.maxsize else quota


def container_memory() -> int | None:
    """Bytes of the tightest limit of the control groups; None if none is below the machine's."""
    limits = [
        int(limit)
        for group in _control_groups("memory")
        for file, _, _ in _MEMORY_LIMITS
        if (limit := _text(group / file).strip()).isdigit()
    ]
    tightest = min(limits, default=sys.maxsize)
    return tightest if tightest < total_memory() else None


def available_memory(mapped_bytes: int = 0) -> Memory:
    """Memory that this process may take without harm to itself or to others.

    Pages of files that the kernel can drop count as free.

    Args:
        mapped_bytes: files that will be mapped. They take address space, which ``ulimit`` counts,
            and no memory of their own.

    Returns:
        The tightest of what the machine has free, the limits of the control groups, and
        ``ulimit -v`` and ``-d``. On macOS, which doesn't say what is free, all of the machine.
    """
    bounds = [Memory(_free_memory(), "this machine")]
    for group in _control_groups("memory"):
        bounds += [Memory(room, "container") for room in _group_room(group)]
    bounds += [
        Memory(max(0, room - mapped_bytes), limit) for limit, room in _process_limits().items()
    ]
    return min(bounds, key=lambda memory: memory.num_bytes)


def _control_groups(controller: str) -> Iterator[Path]:
    """The groups that bound this process, of both versions, outermost first.

    Inside a container its own group may be mounted in place of the root while its path is still
    that of the host; what isn't there is left out.
    """
    paths = {"": "/", controller: "/"}  # of version 2, and of version 1
    for line in _text(PROC / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        paths.update({name: path for name in names.split(",") if name in paths})
    roots = {CGROUP_ROOT: "", CGROUP_ROOT / "unified": "", CGROUP_ROOT / controller: controller}
    for root, version in roots.items():
        group = root
        yield group
        for part in paths[version].strip("/").split("/"):
            group = group / part
            if part in ("", "..") or not group.is_dir():
                break
            yield group


def _quota(group: Path) -> int:
    """Whole processors, at least 1, of a group's CPU quota; ``sys.maxsize`` if it has none."""
    quota, _, period = _text(group / "cpu.max").partition(" ")
    if not period:
        quota = _text(group / "cpu.cfs_quota_us")
        period = _text(group / "cpu.cfs_period_us")
    quota, period = quota.strip(), period.strip()
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return sys.maxsize  # "max" or -1
    return max(1, int(quota) // int(period))


def _group_room(group: Path) -> Iterator[int]:
    """Bytes left under each memory limit of a group; file pages that can be dropped don't count."""
    stat = _numbers(group / "memory.stat", separator=" ")
    for limit_file, usage_file, prefix in _MEMORY_LIMITS:
        limit, usage = _text(group / limit_file).strip(), _text(group / usage_file).strip()
        if limit.isdigit() and usage.isdigit():  # "max" is no limit, and version 1's is enormous
            files = (stat.get(f"{prefix}{name}_file", 0) for name in ("inactive", "active"))
            yield max(0, int(limit) - int(usage) + sum(files))


if sys.platform == "win32":
    import ctypes

    class _MemoryStatus(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            ("total", ctypes.c_ulonglong),
            ("free", ctypes.c_ulonglong),
            ("commit_limit", ctypes.c_ulonglong),
            ("commit_free", ctypes.c_ulonglong),
            ("virtual_total", ctypes.c_ulonglong),
            ("virtual_free", ctypes.c_ulonglong),
            ("virtual_extended", ctypes.c_ulonglong),
        )

    def total_memory() -> int:
        """Bytes of the machine's memory."""
        return int(_memory_status().total)

    def _free_memory() -> int:
        """What is free, within what the system can promise: there untouched pages count too."""
        status = _memory_status()
        return min(int(status.free), int(status.commit_free))

    def _memory_status() -> _MemoryStatus:
        status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
        if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
            raise OSError("GlobalMemoryStatusEx failed")
        return status

    def _process_limits() -> dict[str, int]:
        return {}

else:
    import resource

    def total_memory() -> int:
        """Bytes of the machine's memory."""
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def _free_memory() -> int:
        """What is free, or all of the machine where the system doesn't say."""
        meminfo = _numbers(PROC / "meminfo", separator=":")
        if "MemAvailable" in meminfo:
            return 1024 * meminfo["MemAvailable"]
        return total_memory()

    def _process_limits() -> dict[str, int]:
        """Bytes left under each limit of the process itself, by the command that sets it."""
        used = _numbers(PROC / "self" / "status", separator=":")
        left = {}
        for name, kind, field in (
            ("ulimit -v", resource.RLIMIT_AS, "VmSize"),
            ("ulimit -d", resource.RLIMIT_DATA, "VmData"),
        ):
            limit, _ = resource.getrlimit(kind)
            if limit != resource.RLIM_INFINITY:
                left[name] = limit - 1024 * used.get(field, 0)
        return left


def _text(path: Path) -> str:
    """The contents of a file of the kernel; empty where there is none."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _numbers(path: Path, *, separator: str) -> dict[str, int]:
    """The lines of a file of the kernel that give a number, by name; in the unit of the line."""
    found = {}
    for line in _text(path).splitlines():
        name, _, value = line.partition(separator)
        words = value.split()
        if words and words[0].isdigit():
            found[name] = int(words[0])
    return found
