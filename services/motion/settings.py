"""Motion's settings; the only reader of its environment."""

from __future__ import annotations

from pydantic import Field

from shared.config import ServiceSettings
from shared.engine.plan.noise_controller import NoiseForm


class Settings(ServiceSettings):
    """``noise_form`` (RHEOCAST_NOISE_FORM): measure motion on "pixel" frames or on "latent" signatures.

    ``mirror_s`` is how often changed controllers are copied to Redis; a restart goes on from the last copy.
    ``drained_s``: a stream that was left to drain is let go after so long without a chunk; ``idle_s``: any other is
    forgotten, and found again in the session store when it goes on.
    """

    noise_form: NoiseForm = NoiseForm.PIXEL
    max_streams: int = Field(default=1024, ge=1)
    mirror_s: float = Field(default=0.05, gt=0)
    drained_s: float = Field(default=30.0, gt=0)
    idle_s: float = Field(default=600.0, gt=0)
