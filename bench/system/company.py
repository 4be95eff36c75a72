"""Who uses the machine's cores: our processes one by one, and whoever else is there."""

from __future__ import annotations

import os
import time

import psutil

from bench.system.driver import Driver
from shared.cores import Cores


def cpu_by_process(driver: Driver) -> dict[str, float]:
    """CPU seconds so far by name: services, the servers under this process, this process itself."""
    names = {driver.pid(name): name for name in driver.names}
    me = psutil.Process(os.getpid())
    seconds: dict[str, float] = {}
    for process in [me, *me.children(recursive=True)]:
        try:
            times, name = process.cpu_times(), names.get(process.pid) or process.name()
        except psutil.NoSuchProcess:
            continue
        seconds["bench" if process is me else name] = times.user + times.system
    return seconds


class Company:
    """Cores that processes which are not ours use meanwhile: figures taken in company are worth little."""

    def __init__(self, driver: Driver) -> None:
        self._driver, self._cores = driver, Cores()
        self._began, self._foreign_s = time.monotonic(), self._foreign()

    def _foreign(self) -> float:
        return self._cores.busy_s() - sum(cpu_by_process(self._driver).values())

    def in_use(self) -> float:
        """Cores, since the beginning."""
        return round(max(0.0, self._foreign() - self._foreign_s) / max(1e-3, time.monotonic() - self._began), 3)
