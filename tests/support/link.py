"""A cable between two network namespaces, in user space: it delays every packet and loses some, as told on stdin.

``python -m tests.support.link NAMESPACE NAMESPACE``: makes the TUN device ``rheo0`` in each and carries packets between them.
Each line of stdin sets "<delay in ms> <share that is lost>"; it is answered by a line of JSON with what was carried since
the last one. Ends when stdin does. (The kernel's own ``tc netem`` is not everywhere.)
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import struct
import sys
import time

DEVICE = "rheo0"
MTU = 1500
MOST_WAITING = 4000  # packets on the way; more are lost, as in a router's queue
CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000


def enter(fd: int) -> None:
    """Move the calling thread into the network namespace that ``fd`` stands for."""
    if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")


def opened(namespace: str | None) -> int:
    """A file descriptor of a named network namespace; None: of the calling thread's own."""
    path = "/proc/thread-self/ns/net" if namespace is None else f"/run/netns/{namespace}"
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def tun_in(namespace: str) -> int:
    """The file descriptor of a new TUN device in a namespace; the device lives as long as it is open."""
    enter(opened(namespace))
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH14x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    return fd


class Cable:
    """Two ends; what goes in at one comes out at the other, ``delay_s`` later, or is lost."""

    def __init__(self, ends: tuple[int, int]) -> None:
        self._other = {ends[0]: ends[1], ends[1]: ends[0]}
        self._random = random.Random(1)
        self._waiting: list[tuple[float, int, int, bytes]] = []
        self._number = 0
        self.delay_s, self.loss = 0.0, 0.0
        self.carried = self.lost = self.bytes = 0

    def wait_s(self) -> float | None:
        """Until the next packet is due."""
        return max(0.0, self._waiting[0][0] - time.monotonic()) if self._waiting else None

    def take(self, end: int) -> None:
        """All packets that wait at one end."""
        while True:
            try:
                packet = os.read(end, 65536)
            except BlockingIOError:
                return
            if self._random.random() < self.loss or len(self._waiting) >= MOST_WAITING:
                self.lost += 1
                continue
            self._number += 1
            due = time.monotonic() + self.delay_s
            heapq.heappush(self._waiting, (due, self._number, self._other[end], packet))

    def give(self) -> None:
        """What is due."""
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            _, _, end, packet = heapq.heappop(self._waiting)
            try:
                os.write(end, packet)
                self.carried, self.bytes = self.carried + 1, self.bytes + len(packet)
            except OSError:  # its end is down, or its queue is full
                self.lost += 1

    def told(self) -> str:
        """What was carried since the last time."""
        line = json.dumps({"packets": self.carried, "lost": self.lost, "bytes": self.bytes})
        self.carried = self.lost = self.bytes = 0
        return line


def main() -> None:
    ends = (tun_in(sys.argv[1]), tun_in(sys.argv[2]))
    cable = Cable(ends)
    print("ready", flush=True)
    poll = select.poll()
    for fd in (*ends, sys.stdin.fileno()):
        poll.register(fd, select.POLLIN)
    while True:
        wait_s = cable.wait_s()
        for fd, _ in poll.poll(None if wait_s is None else wait_s * 1000):
            if fd in ends:
                cable.take(fd)
                continue
            line = sys.stdin.buffer.raw.readline()  # type: ignore[attr-defined]
            if not line:
                return
            delay_ms, loss = line.split()
            cable.delay_s, cable.loss = float(delay_ms) / 1000, float(loss)
            print(cable.told(), flush=True)
        cable.give()


if __name__ == "__main__":
    main()
