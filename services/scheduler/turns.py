"""Whose start comes next: one queue per tenant, in turn, and only so many opened at once. Pure.

Opening a stream takes workers' time and answers; a tenant that asks for a hundred must not make others wait for them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from shared.contracts.commands import StartStream


@dataclass(slots=True)
class _Tenant:
    waiting: deque[StartStream] = field(default_factory=lambda: deque[StartStream]())
    opening: int = 0
    served: int = 0  # the turn at which it was served last


@dataclass(slots=True)
class Turns:
    """At most ``opening`` starts at once, ``per_tenant`` of them of one tenant; ``waiting`` may wait per tenant."""

    opening: int = 8
    per_tenant: int = 2
    waiting: int = 32
    refused: int = 0
    _tenants: dict[str, _Tenant] = field(default_factory=lambda: dict[str, _Tenant]())
    _turn: int = 0

    def offer(self, command: StartStream) -> bool:
        """Queue a start; False when its tenant has too many waiting."""
        tenant = self._tenants.setdefault(command.spec.tenant, _Tenant())
        if len(tenant.waiting) >= self.waiting:
            self.refused += 1
            return False
        tenant.waiting.append(command)
        return True

    def next(self) -> StartStream | None:
        """The start that may be opened now, or None. Of those waiting, the tenant with the fewest opening, then in turn."""
        if sum(tenant.opening for tenant in self._tenants.values()) >= self.opening:
            return None
        able = [each for each in self._tenants.values() if each.waiting and each.opening < self.per_tenant]
        if not able:
            return None
        tenant = min(able, key=lambda each: (each.opening, each.served))
        self._turn += 1
        tenant.served = self._turn
        tenant.opening += 1
        return tenant.waiting.popleft()

    def opened(self, command: StartStream) -> None:
        """A start that :meth:`next` gave is through, whatever became of it."""
        name = command.spec.tenant
        tenant = self._tenants.get(name)
        if tenant is not None:
            tenant.opening -= 1
            if tenant.opening <= 0 and not tenant.waiting:
                del self._tenants[name]

    def withdraw(self, stream: str) -> StartStream | None:
        """A stream that still waits is stopped: its start, which will not be given any more. None: it does not wait."""
        for tenant in self._tenants.values():
            for command in tenant.waiting:
                if command.stream == stream:
                    tenant.waiting.remove(command)
                    return command
        return None
