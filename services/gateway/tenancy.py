"""Who asks: the tenant, from a header."""

from __future__ import annotations

from typing import Annotated

from fastapi import Header

from shared.contracts.tiers import TENANT_PATTERN

TENANT_HEADER = "X-Rheocast-Tenant"

Tenant = Annotated[
    str,
    Header(
        alias=TENANT_HEADER,
        pattern=TENANT_PATTERN,
        description="Whose request this is: quotas, rates and fair turns are by tenant.",
    ),
]
