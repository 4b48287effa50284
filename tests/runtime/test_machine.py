"""Threads obey affinity and quotas; memory is what the machine, container and limits leave."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from llama_runtime import machine
from llama_runtime.machine import Memory, available_memory, default_threads

GB = 10**9


@pytest.fixture
def cgroup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty stand-in for the control groups, on a machine whose affinity allows 12."""
    root = tmp_path / "cgroup"
    root.mkdir()
    monkeypatch.setattr(machine, "CGROUP_ROOT", root)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    return root


@pytest.fixture
def proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cgroup: Path) -> Path:
    """A stand-in for /proc: a machine with 16 GB free, and a process without groups."""
    root = tmp_path / "proc"
    (root / "self").mkdir(parents=True)
    (root / "meminfo").write_text(
        "MemTotal:       32000000 kB\nMemFree:  1 kB\nMemAvailable:   15625000 kB\nHugePages: 0\n"
    )
    (root / "self" / "status").write_text("Name:\tpython\nVmSize:\t500000 kB\nVmData:\t100000 kB\n")
    monkeypatch.setattr(machine, "PROC", root)
    return root


def write_group(folder: Path, **files: object) -> None:
    """A control group; ``memory_max=5`` is ``memory.max``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{content}\n")


def write_version_1(cgroup: Path, quota: str, period: str) -> None:
    (cgroup / "cpu").mkdir()
    (cgroup / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (cgroup / "cpu" / "cpu.cfs_period_us").write_text(period)


def test_without_a_container_it_is_the_affinity(cgroup: Path) -> None:
    assert default_threads() == 12


def test_without_affinity_it_is_the_count_of_processors(
    cgroup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert default_threads() == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert default_threads() == 1


@pytest.mark.parametrize(
    ("content", "threads"),
    [
        ("400000 100000\n", 4),
        ("150000 100000\n", 1),
        ("50000 100000\n", 1),  # half a processor is not "no limit"
        ("1000 100000\n", 1),
        ("9000000 100000\n", 12),
        ("max 100000\n", 12),
        ("", 12),
        ("nonsense\n", 12),
        ("100000 0\n", 12),
    ],
)
def test_the_quota_of_cgroup_version_2_counts_whole_processors(
    cgroup: Path, content: str, threads: int
) -> None:
    (cgroup / "cpu.max").write_text(content)
    assert default_threads() == threads


@pytest.mark.parametrize(
    ("quota", "period", "threads"),
    [("300000\n", "100000\n", 3), ("-1\n", "100000\n", 12), ("25000\n", "100000\n", 1)],
)
def test_the_quota_of_cgroup_version_1_does_too(
    cgroup: Path, quota: str, period: str, threads: int
) -> None:
    write_version_1(cgroup, quota, period)
    assert default_threads() == threads


def test_this_machine_has_at_least_one() -> None:
    assert 1 <= default_threads() <= (os.cpu_count() or 1)


def in_groups(proc: Path, *lines: str) -> None:
    (proc / "self" / "cgroup").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("own", ["500000 100000", "max 100000"])
def test_the_quotas_of_this_group_and_of_those_above_it_hold(
    proc: Path, cgroup: Path, own: str
) -> None:
    in_groups(proc, "0::/kube/pod/app")
    write_group(cgroup / "kube" / "pod" / "app", cpu_max=own)
    assert default_threads() == (5 if own.startswith("5") else 12)
    write_group(cgroup / "kube", cpu_max="300000 100000")
    write_group(cgroup / "kube" / "pod" / "other", cpu_max="100000 100000")  # not ours
    assert default_threads() == 3


def test_a_quota_of_version_1_lies_in_this_group_too(proc: Path, cgroup: Path) -> None:
    in_groups(proc, "3:cpu,cpuacct:/docker/app", "2:cpuset:/elsewhere", "0::/")
    files = {"cpu_cfs_quota_us": 200_000, "cpu_cfs_period_us": 100_000}
    write_group(cgroup / "cpu" / "docker" / "app", **files)
    write_group(cgroup / "cpu" / "elsewhere", **{**files, "cpu_cfs_quota_us": 100_000})
    assert default_threads() == 2


# --- memory -------------------------------------------------------------------------------------

linux = pytest.mark.skipif(sys.platform == "win32", reason="Windows is asked in another way")


@linux
def test_without_limits_it_is_what_the_machine_can_free(proc: Path) -> None:
    assert available_memory() == Memory(16 * GB, "this machine")
    assert available_memory(mapped_bytes=GB) == Memory(16 * GB, "this machine")


@linux
def test_without_meminfo_it_is_all_memory_of_the_machine(proc: Path) -> None:
    (proc / "meminfo").unlink()
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert available_memory() == Memory(whole, "this machine")


@linux
@pytest.mark.parametrize("folder", ["", "kube", "kube/pod"])
@pytest.mark.parametrize("limit", ["memory_max", "memory_high"])
def test_limits_of_version_2_hold_in_this_group_and_above(
    proc: Path, cgroup: Path, folder: str, limit: str
) -> None:
    in_groups(proc, "0::/kube/pod")
    unlimited = {"memory_max": "max", "memory_high": "max", "memory_current": 9 * GB}
    for group in (cgroup / "kube", cgroup / "kube" / "pod", cgroup / "other"):
        write_group(group, **unlimited)
    write_group(cgroup / "other", memory_max=GB)
    assert available_memory() == Memory(16 * GB, "this machine")
    statistics = f"anon 5\ninactive_file {GB}\nactive_file {2 * GB}\nunevictable 7"
    write_group(
        cgroup / folder,
        **unlimited | {limit: 10 * GB, "memory_stat": statistics},
    )
    assert available_memory() == Memory(4 * GB, "container")


@linux
def test_inside_a_container_its_own_group_is_the_root(proc: Path, cgroup: Path) -> None:
    write_group(cgroup, memory_max=3 * GB, memory_current=GB)
    for path in ("/", "/../other", "/host/path/that/is/not/here"):
        in_groups(proc, f"0::{path}")
        assert available_memory() == Memory(2 * GB, "container")
    (proc / "self" / "cgroup").unlink()
    assert available_memory() == Memory(2 * GB, "container")


@linux
def test_limits_of_version_1_hold_too(proc: Path, cgroup: Path) -> None:
    in_groups(proc, "4:memory:/docker/app", "1:cpu:/", "0::/")
    none = 0x7FFFFFFFFFFFF000  # what version 1 says without a limit
    root, app = cgroup / "memory", cgroup / "memory" / "docker" / "app"
    write_group(root, memory_limit_in_bytes=none, memory_usage_in_bytes=20 * GB)
    assert available_memory() == Memory(16 * GB, "this machine")
    write_group(
        app,
        memory_limit_in_bytes=2 * GB,
        memory_usage_in_bytes=GB,
        memory_stat=f"inactive_file 1\ntotal_inactive_file {GB // 2}\ntotal_active_file 0",
    )
    assert available_memory() == Memory(3 * GB // 2, "container")


@linux
def test_a_group_beyond_its_limit_leaves_nothing(proc: Path, cgroup: Path) -> None:
    write_group(cgroup, memory_max=GB, memory_current=2 * GB)
    assert available_memory() == Memory(0, "container")


@linux
@pytest.mark.parametrize("files", [{}, {"memory_max": ""}, {"memory_max": "x", "memory_stat": "x"}])
def test_a_group_that_says_nothing_sensible_sets_no_limit(
    proc: Path, cgroup: Path, files: dict[str, str]
) -> None:
    write_group(cgroup, memory_current=GB, **files)
    assert available_memory() == Memory(16 * GB, "this machine")


@linux
@pytest.mark.parametrize(
    ("kind", "bound"), [("RLIMIT_AS", "ulimit -v"), ("RLIMIT_DATA", "ulimit -d")]
)
def test_limits_of_the_process_count_files_that_will_be_mapped(
    proc: Path, monkeypatch: pytest.MonkeyPatch, kind: str, bound: str
) -> None:
    import resource

    limits = {getattr(resource, kind): 8 * GB}
    unlimited = resource.RLIM_INFINITY
    monkeypatch.setattr(
        resource, "getrlimit", lambda which: (limits.get(which, unlimited), unlimited)
    )
    used = {"ulimit -v": 512_000_000, "ulimit -d": 102_400_000}[bound]
    assert available_memory() == Memory(8 * GB - used, bound)
    assert available_memory(mapped_bytes=GB) == Memory(7 * GB - used, bound)
    assert available_memory(mapped_bytes=9 * GB) == Memory(0, bound)


def test_this_machine_has_some_memory() -> None:
    assert 50_000_000 < available_memory().num_bytes < 2**50
