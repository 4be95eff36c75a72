"""Where each millisecond of the last chunks went. Heard only of streams that somebody asks about."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from pydantic import BaseModel, Field

from services.gateway.traces import search_url, trace_of
from shared.bus.port import Bus, Received, Subscription
from shared.contracts import subjects
from shared.contracts.events import ChunkDropped, ChunkEnd, ChunkStamp, FramesDecoded, StageTiming
from shared.contracts.views import TraceList

KEPT = 50
MAX_STREAMS = 64
FORGET_S = 60.0  # nobody asked for so long: not heard any more


class ChunkTimes(BaseModel):
    """One chunk's way. ``captured_ns`` is its last frame's; ``closed_ns`` when its verdict came (0: not yet).

    ``hops`` in their order; what is between two moments and in no hop was spent on the bus.
    """

    chunk: int
    pts: int
    frames: int
    captured_ns: int
    published_ns: int
    decoded_ns: int = 0
    closed_ns: int = 0
    steps: int = 0
    prompt_version: int = 0
    hops: tuple[StageTiming, ...] = ()
    dropped: str = ""


class ChunkList(BaseModel):
    """The newest chunks of a stream, oldest first. The first question begins the listening: ask again."""

    chunks: list[ChunkTimes] = Field(default_factory=list[ChunkTimes])


@dataclass(slots=True)
class _Way:
    """What was heard of a chunk: from who made its frames or gave it up, and from who closed it."""

    stamp: ChunkStamp | None = None
    timings: tuple[StageTiming, ...] = ()
    end: ChunkEnd | None = None


@dataclass(slots=True)
class _Heard:
    asked_s: float
    subscription: Subscription | None = None
    chunks: OrderedDict[int, ChunkTimes] = field(default_factory=lambda: OrderedDict[int, ChunkTimes]())
    ways: OrderedDict[int, _Way] = field(default_factory=lambda: OrderedDict[int, _Way]())

    def way(self, chunk: int) -> _Way:
        """Of this chunk; the oldest make room."""
        found = self.ways.get(chunk)
        if found is None:
            found = self.ways[chunk] = _Way()
            while len(self.ways) > KEPT:
                self.ways.popitem(last=False)
        return found


class Chunks:
    """The waterfall's figures, by stream."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._heard: OrderedDict[str, _Heard] = OrderedDict()

    async def of(self, stream: str) -> ChunkList:
        """The newest chunks; from the first question on they are heard."""
        return ChunkList(chunks=list((await self._listen(stream)).chunks.values()))

    async def traces(self, stream: str, jaeger: str = "") -> TraceList:
        """The same as waterfalls, each from capture to verdict. ``jaeger``: its address, "" for none."""
        ways = sorted((await self._listen(stream)).ways.items())
        found = [trace_of(chunk, way.stamp, way.timings, way.end, jaeger) for chunk, way in ways]
        return TraceList(stream=stream, chunks=found, jaeger_url=search_url(jaeger, stream))

    async def _listen(self, stream: str) -> _Heard:
        now = time.monotonic()
        heard = self._heard.get(stream)
        if heard is None:
            heard = self._heard[stream] = _Heard(now)
            try:
                heard.subscription = await self._bus.subscribe(subjects.stream(stream, "frames"), self._on_frames)
            except BaseException:  # NATS is away, or who asked has gone: the next question tries again
                if self._heard.get(stream) is heard:
                    del self._heard[stream]
                raise
            if self._heard.get(stream) is not heard:  # others were asked for meanwhile, too many of them
                await heard.subscription.unsubscribe()
                return heard
        heard.asked_s = now
        self._heard.move_to_end(stream)
        await self._forget(now)
        return heard

    def on_ends(self, stream: str, ends: tuple[ChunkEnd, ...]) -> None:
        """These chunks have their verdicts."""
        if (heard := self._heard.get(stream)) is not None:
            for end in ends:
                heard.way(end.chunk).end = end

    def on_progress(self, stream: str, through: int) -> None:
        """Every chunk below ``through`` is closed."""
        heard = self._heard.get(stream)
        if heard is None:
            return
        now = time.time_ns()
        for chunk, times in heard.chunks.items():
            if chunk < through and not times.closed_ns:
                heard.chunks[chunk] = times.model_copy(update={"closed_ns": now})

    async def _on_frames(self, received: Received) -> None:
        message: FramesDecoded | ChunkDropped = received.message
        heard = self._heard.get(message.stamp.stream)
        if heard is None:
            return
        if message.stamp.chunk == 0:  # a new stream of the same id
            heard.chunks.clear()
            heard.ways.clear()
        way = heard.way(message.stamp.chunk)
        way.stamp, way.timings = message.stamp, message.timings
        heard.chunks[message.stamp.chunk] = times_of(message.stamp, message, received.received_ns)
        while len(heard.chunks) > KEPT:
            heard.chunks.popitem(last=False)

    async def _forget(self, now: float) -> None:
        """Those nobody asked about lately, and the oldest of too many."""
        over = len(self._heard) - MAX_STREAMS
        for index, (stream, heard) in enumerate(list(self._heard.items())):
            if index >= over and now - heard.asked_s <= FORGET_S:
                continue
            if self._heard.pop(stream, None) is not None and heard.subscription is not None:
                await heard.subscription.unsubscribe()


def times_of(stamp: ChunkStamp, message: FramesDecoded | ChunkDropped, received_ns: int) -> ChunkTimes:
    """A chunk's figures as they are told when its frames are made, or given up."""
    last = stamp.frames[-1] if stamp.frames else None
    times = ChunkTimes(
        chunk=stamp.chunk,
        pts=stamp.frames[0].pts if stamp.frames else -1,
        frames=len(stamp.frames),
        captured_ns=last.captured_ns if last is not None else 0,
        published_ns=stamp.published_ns,
        decoded_ns=received_ns,
    )
    if isinstance(message, ChunkDropped):
        return times.model_copy(update={"dropped": f"{message.service}:{message.reason}", "decoded_ns": 0})
    made = {"steps": message.steps, "prompt_version": message.prompt_version, "hops": message.timings}
    return times.model_copy(update=made)
