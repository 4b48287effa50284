"""The default number of threads obeys affinity and the container's quota."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llama_runtime import machine
from llama_runtime.machine import default_threads


@pytest.fixture
def cgroup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty stand-in for the control groups, on a machine whose affinity allows 12."""
    monkeypatch.setattr(machine, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    return tmp_path


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
