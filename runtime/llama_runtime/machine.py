"""What this process may use of the machine it runs on."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")


def default_threads() -> int:
    """Processors that this process may use: its affinity, within the container's quota."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    quota = _quota(CGROUP_ROOT)
    return allowed if quota is None else min(allowed, quota)


def _quota(root: Path) -> int | None:
    """Whole processors, at least 1, of the container's CPU quota (cgroup version 2, then 1)."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None  # "max" or -1: no quota
    return max(1, int(quota) // int(period))
