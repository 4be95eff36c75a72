"""The cores that this process shares with everything else on its machine, and how busy they are.

Where a container has a quota of its own (cgroup v2), that is what is shared, by the processes in it; else the cores that
this process may run on, with everything that runs there.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import psutil

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
CGROUP = Path("/sys/fs/cgroup")
IDLE = ("idle", "iowait", "nice", "guest", "guest_nice")  # whoever is "nice" makes room; guests are in the rest already


class Cores:
    """``host`` is the same for all that share them, ``count`` how many they are."""

    def __init__(self, boot_id: Path = BOOT_ID, cgroup: Path = CGROUP) -> None:
        self._cgroup = cgroup
        affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        self._cpus = sorted(affinity)
        self.host, self.count = _machine(boot_id), float(len(self._cpus))
        self._quota = _quota(cgroup)
        if self._quota is not None:
            self.count = min(self.count, self._quota)
            self.host = f"{self.host}-{cgroup.stat().st_ino}"

    def busy_s(self) -> float:
        """CPU seconds that were used of them so far, by whomever; only differences mean something."""
        if self._quota is not None:
            lines = (self._cgroup / "cpu.stat").read_text().splitlines()
            used = next((line.split()[1] for line in lines if line.startswith("usage_usec ")), "0")
            return int(used) / 1e6
        times = psutil.cpu_times(percpu=True)
        mine = [times[cpu] for cpu in self._cpus if cpu < len(times)]
        return sum(value for each in mine for name, value in each._asdict().items() if name not in IDLE)


def _machine(boot_id: Path) -> str:
    """The running kernel's id: containers of one machine have the same."""
    try:
        return boot_id.read_text().strip()
    except OSError:
        return f"{uuid.getnode():012x}"


def _quota(cgroup: Path) -> float | None:
    """The cores that a container may use; None: no limit."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None
