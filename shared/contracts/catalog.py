"""The catalog: subject → messages → delivery, senders and readers. ``docs/asyncapi.yaml`` is generated from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from shared.contracts import commands as c
from shared.contracts import events as e
from shared.contracts import moving as m
from shared.contracts import operating as o
from shared.contracts import signalling as r
from shared.contracts import sinks as k
from shared.contracts import sources as u
from shared.contracts import subjects as s
from shared.contracts import tiers as t
from shared.contracts.refs import Wire


class Delivery(StrEnum):
    """Core: at most once, for frames and batches. JetStream: kept and acknowledged. Request: request and reply."""

    CORE = "core"
    JETSTREAM = "jetstream"
    REQUEST = "request"


@dataclass(frozen=True, slots=True)
class Channel:
    """One subject pattern. ``messages`` is its tagged union, told apart by ``kind``; ``replies`` is for requests."""

    subject: str
    messages: tuple[type[Wire], ...]
    delivery: Delivery
    senders: tuple[str, ...]
    readers: tuple[str, ...]
    replies: tuple[type[Wire], ...] = ()


CHANNELS: tuple[Channel, ...] = (
    Channel(
        s.stream("*", "chunk"),
        (e.ChunkCaptured, e.SourceEnded),
        Delivery.CORE,
        ("ingest",),
        ("worker", "scheduler", "egress"),
    ),
    Channel(s.stream("*", "audio"), (e.AudioCaptured,), Delivery.CORE, ("ingest",), ("egress",)),
    Channel(s.stream("*", "latents"), (e.LatentsEncoded,), Delivery.CORE, ("worker",), ("motion",)),
    Channel(s.stream("*", "motion"), (e.MotionEstimated,), Delivery.CORE, ("motion",), ("scheduler",)),
    Channel(s.pipeline_stage("*", "*"), (e.StageBatch,), Delivery.CORE, ("scheduler", "worker"), ("worker",)),
    Channel(
        s.pipeline_done("*"), (e.BatchDone, e.PipelineFault, e.PromptReady), Delivery.CORE, ("worker",), ("scheduler",)
    ),
    Channel(s.stream("*", "denoised"), (e.LatentsDenoised,), Delivery.CORE, ("worker",), ("worker",)),
    Channel(
        s.stream("*", "frames"),
        (e.FramesDecoded, e.ChunkDropped),
        Delivery.CORE,
        ("ingest", "worker", "motion", "scheduler"),
        ("egress", "gateway"),
    ),
    Channel(s.stream("*", "closed"), (e.ChunkClosed,), Delivery.CORE, ("egress",), ("ingest", "scheduler", "gateway")),
    Channel(
        s.stream("*", "control"),
        (c.StartStream, c.UpdateStream, c.StopStream, o.MigrateStream, k.AddSink, k.RemoveSink),
        Delivery.JETSTREAM,
        ("gateway", "platform", "egress"),
        ("scheduler",),
    ),
    Channel(
        s.stream("*", "event"),
        (e.StreamEvent,),
        Delivery.JETSTREAM,
        ("scheduler", "ingest", "egress"),
        ("scheduler", "gateway", "platform", "egress"),
    ),
    Channel(
        s.assign("*"),
        (
            c.TakeStream,
            c.LeaveStream,
            c.PreparePrompt,
            c.PauseStream,
            c.ScaleLoras,
            t.PaceStream,
            k.ChangeSinks,
            *m.MOVES,
        ),
        Delivery.JETSTREAM,
        ("scheduler",),
        ("ingest", "worker", "egress", "motion"),
    ),
    Channel(s.stream("*", "push"), (u.PushedFrame,), Delivery.CORE, ("platform", "gateway", "egress"), ("ingest",)),
    Channel(s.stream("*", "out"), (k.FramePublished,), Delivery.CORE, ("egress",), ("platform", "gateway")),
    Channel(s.stream("*", "preview"), (k.SourcePreviewed,), Delivery.CORE, ("ingest",), ("gateway",)),
    Channel(s.stream("*", "looking"), (k.Looking,), Delivery.CORE, ("gateway",), ("ingest", "egress")),
    Channel(
        s.stream("*", "whip"),
        (r.RtcOffer, r.RtcCandidate, r.RtcClose),
        Delivery.REQUEST,
        ("gateway",),
        ("ingest",),
        (r.RtcAnswer,),
    ),
    Channel(
        s.stream("*", "whep"),
        (r.RtcOffer, r.RtcCandidate, r.RtcClose),
        Delivery.REQUEST,
        ("gateway",),
        ("egress",),
        (r.RtcAnswer,),
    ),
    Channel(
        s.stream("*", "peer"),
        (r.RtcOffer, r.RtcCandidate, r.RtcClose),
        Delivery.REQUEST,
        ("gateway",),
        ("egress",),
        (r.RtcAnswer,),
    ),
    Channel(s.TAKEN, (e.StreamTaken,), Delivery.CORE, ("ingest", "worker", "egress"), ("scheduler",)),
    Channel(s.MOVED, m.MOVED, Delivery.CORE, ("worker",), ("scheduler",)),
    Channel(s.beat("*"), (e.Beat,), Delivery.CORE, ("every service",), ("scheduler",)),
    Channel(
        s.tensor_get("*"),
        (c.TensorGet, c.TensorRelease),
        Delivery.REQUEST,
        ("every service",),
        ("the owner",),
        (c.TensorPart,),
    ),
    Channel(s.CAPACITY, (t.CapacityAsked,), Delivery.REQUEST, ("gateway",), ("scheduler",), (t.CapacityTold,)),
    Channel(
        s.FLEET,
        (o.FleetAsked, o.DrainWorker, o.CutPipeline),
        Delivery.REQUEST,
        ("gateway", "platform"),
        ("scheduler",),
        (o.FleetTold,),
    ),
    Channel(s.TEXT_ENCODE, (c.TextEncode,), Delivery.REQUEST, ("scheduler",), ("worker",), (c.TextEncoded,)),
)


def matches(pattern: str, subject: str) -> bool:
    """Whether ``subject`` falls under ``pattern``, in which ``*`` stands for one token."""
    wanted, given = pattern.split("."), subject.split(".")
    return len(wanted) == len(given) and all(w in ("*", g) for w, g in zip(wanted, given, strict=True))


def channel_of(subject: str) -> Channel:
    """The channel a subject belongs to. Raises LookupError for a subject outside the catalog."""
    for channel in CHANNELS:
        if matches(channel.subject, subject):
            return channel
    raise LookupError(f"subject {subject!r} is not in the catalog")
