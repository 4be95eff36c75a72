"""What a worker's results become: the messages of encode and decode, built from the chunk's own."""

from __future__ import annotations

from services.worker.device_thread import Outcome
from shared.contracts.commands import NoSource, TakeStream
from shared.contracts.events import (
    ChunkCaptured,
    FramesDecoded,
    LatentsDenoised,
    LatentsEncoded,
    StageTiming,
)
from shared.contracts.refs import TensorRef
from shared.engine.plan.spec import FRAMES_PER_LATENT


def latent_frames(pixel_frames: int) -> int:
    """Latent frames of a chunk: a stream's first latent frame holds one pixel frame, every other one four."""
    return -(-pixel_frames // FRAMES_PER_LATENT)


def encoded(message: ChunkCaptured, outcome: Outcome, ref: TensorRef, took: StageTiming) -> LatentsEncoded:
    """A chunk's latents are in ``ref``."""
    return LatentsEncoded(
        stamp=message.stamp,
        latents=ref,
        latent_frames=outcome.value.latents.shape[0],
        rmse=message.rmse,
        signature=outcome.value.signature,
        timings=(took,),
    )


def passed_by(message: ChunkCaptured) -> LatentsEncoded:
    """A chunk without a source has nothing to encode: its latents will be pure noise."""
    return LatentsEncoded(
        stamp=message.stamp,
        latents=message.pixels,
        latent_frames=latent_frames(message.stamp.pixel_frames),
        rmse=message.rmse,
    )


def is_passed_by(take: TakeStream) -> bool:
    """Whether the stream has no source."""
    return isinstance(take.spec.source, NoSource)


def way_until(message: LatentsDenoised, index: int) -> tuple[StageTiming, ...]:
    """All hops so far of the ``index``-th chunk of a block: its own until they were joined, then those of the block."""
    return (*message.arrived[index], *message.timings) if index < len(message.arrived) else message.timings


def decoded(message: LatentsDenoised, index: int, ref: TensorRef, took: StageTiming) -> FramesDecoded:
    """The pixels of the block's ``index``-th chunk are in ``ref``."""
    return FramesDecoded(
        stamp=message.stamps[index],
        pixels=ref,
        steps=message.steps,
        prompt_version=message.prompt_version,
        timings=(*way_until(message, index), took),
    )
