"""References: how events speak of pixels, latents and activations without carrying them."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class Wire(BaseModel):
    """Base of everything on the wire: frozen; unknown fields are ignored, so contracts can grow."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")


class TensorPlace(StrEnum):
    """Where the bytes of a tensor are."""

    LOCAL = (
        "local"  # in the owner's process, maybe on its device: only the owner's own roles can read it without a copy
    )
    SHM = "shm"  # in a shared-memory slot of the owner's host
    CUDA_IPC = "cuda_ipc"  # on the owner's GPU, exported to other processes of the host
    INLINE = "inline"  # in the message itself: small tensors only


class TensorRef(Wire):
    """A leased tensor.

    ``owner`` is the instance id of the process that holds it (it answers ``rheo.tensor.<owner>.get``), ``host`` the
    host identity that shared memory is valid on, ``segment`` the shared-memory file name, ``slot`` the slot number,
    ``offset`` the byte offset of the slot's data in the segment, ``generation`` the lease's generation: a slot that was
    reused has another, and reading with an old one is an error, not a wrong picture. ``dtype`` is a numpy name
    ("uint8", "float32", "bfloat16" as raw 16-bit words). ``expires_ns`` is the backstop, on the owner's monotonic clock.
    """

    owner: str
    host: str
    place: TensorPlace
    shape: tuple[int, ...]
    dtype: str
    slot: int = -1
    generation: int = 0
    segment: str = ""
    offset: int = 0
    expires_ns: int = 0
    data: bytes | None = None
