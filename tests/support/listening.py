"""Waiting for a peer that was just started, without connecting: one that serves a single client would take it for that."""

from __future__ import annotations

import asyncio

import psutil


async def listening(pid: int, timeout_s: float = 20.0) -> None:
    """Until the process listens on some TCP port. Raises TimeoutError; psutil.NoSuchProcess if it has ended."""
    process = psutil.Process(pid)
    async with asyncio.timeout(timeout_s):
        while not any(c.status == psutil.CONN_LISTEN for c in process.net_connections("tcp")):
            await asyncio.sleep(0.05)
