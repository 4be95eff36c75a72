"""What a tenant may have: so many streams, such a share; and whose turn it is when there is not enough. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field

CLAIM_S = 30.0  # how long what becomes free is kept for a tenant that was refused below its fair share
MAX_CLAIMS = 256


class TenantLimits(BaseModel):
    """One tenant's limits. ``max_streams`` 0: any number. ``max_share`` is of what a model's pipelines carry in all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_streams: int = Field(default=0, ge=0)
    max_share: float = Field(default=1.0, gt=0.0, le=1.0)


@dataclass(slots=True)
class Usage:
    """What a tenant has: streams, and the sum of the loads they were admitted with."""

    streams: int = 0
    load: float = 0.0


@dataclass(slots=True)
class _Claim:
    until_s: float
    load: float


@dataclass(slots=True)
class Tenants:
    """Usage by tenant, and the claims of those that were refused while they had less than their share."""

    default: TenantLimits = field(default_factory=TenantLimits)
    special: dict[str, TenantLimits] = field(default_factory=lambda: dict[str, TenantLimits]())
    usage: dict[str, Usage] = field(default_factory=lambda: dict[str, Usage]())
    _claims: dict[str, _Claim] = field(default_factory=lambda: dict[str, _Claim]())

    def limits(self, tenant: str) -> TenantLimits:
        """This tenant's limits."""
        return self.special.get(tenant, self.default)

    def enter(self, tenant: str, load: float) -> None:
        """The tenant got a stream; its claim, if it had one, is met."""
        used = self.usage.setdefault(tenant, Usage())
        used.streams += 1
        used.load += load
        claim = self._claims.get(tenant)
        if claim is not None:
            claim.load -= load
            if claim.load <= 1e-9:
                del self._claims[tenant]

    def leave(self, tenant: str, load: float) -> None:
        """The tenant has one stream less."""
        used = self.usage.get(tenant)
        if used is None:
            return
        used.streams -= 1
        used.load = max(0.0, used.load - load)
        if used.streams <= 0:
            del self.usage[tenant]

    def is_full(self, tenant: str) -> bool:
        """Whether it has all the streams that it may have, so that no tier would do."""
        most = self.limits(tenant).max_streams
        return bool(most) and self.usage.get(tenant, Usage()).streams >= most

    def complaint(self, tenant: str, load: float, whole: float) -> str:
        """Why the tenant may not have a stream of this load more, or "". ``whole`` is what all pipelines carry."""
        limits, used = self.limits(tenant), self.usage.get(tenant, Usage())
        if self.is_full(tenant):
            return f"tenant {tenant} has {used.streams} of {limits.max_streams} streams: stop one first"
        if limits.max_share < 1.0 and used.load + load > limits.max_share * whole + 1e-9:
            return (
                f"tenant {tenant} may use {limits.max_share:.0%} of what there is and would have "
                f"{(used.load + load) / whole if whole else 1.0:.0%}: stop a stream first, or ask for less"
            )
        return ""

    def fair(self, tenant: str, whole: float, now_s: float) -> float:
        """What the tenant may expect when all that have or want something want as much as they can get."""
        wanting = {*self.usage, tenant, *(name for name, claim in self._claims.items() if claim.until_s > now_s)}
        return whole / len(wanting)

    def claim(self, tenant: str, load: float, whole: float, now_s: float) -> None:
        """The tenant was refused for want of room: what becomes free is kept for it, if it has less than its share."""
        self._expire(now_s)
        used = self.usage.get(tenant, Usage())
        if load > 0 and used.load + load <= self.fair(tenant, whole, now_s) and len(self._claims) < MAX_CLAIMS:
            self._claims[tenant] = _Claim(now_s + CLAIM_S, load)

    def kept_from(self, tenant: str, load: float, whole: float, now_s: float) -> float:
        """How much is kept for others, if the tenant would pass its fair share with a stream of this load."""
        if not self._claims:
            return 0.0
        others = sum(c.load for name, c in self._claims.items() if name != tenant and c.until_s > now_s)
        used = self.usage.get(tenant, Usage())
        return others if used.load + load > self.fair(tenant, whole, now_s) + 1e-9 else 0.0

    def _expire(self, now_s: float) -> None:
        for name in [name for name, claim in self._claims.items() if claim.until_s <= now_s]:
            del self._claims[name]
