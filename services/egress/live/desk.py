"""The live sinks of one stream: what commands and viewers ask of them, and what is told of them."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import partial
from pathlib import Path

from services.egress.live.fanout import Fanout
from services.egress.live.feed import Feed, News, Told
from services.egress.live.h264 import SOFTWARE, best_encoder
from services.egress.live.muxers import RTMP, HlsMuxer, Mp4Muxer, Muxer, RtmpMuxer
from services.egress.sinks.port import OutFrame, SinkError
from shared.bus.port import Bus, BusError, Received, Subscription
from shared.clock import Clock
from shared.contracts import subjects
from shared.contracts.events import EventKind, StreamEvent
from shared.contracts.sinks import ChangeSinks, FramePublished, HlsSink, Looking, Mp4Sink, NatsSink, RtmpSink, Sink
from shared.media.addresses import AddressError, AddressRules, check_url
from shared.media.errors import MediaError
from shared.media.paths import inside

log = logging.getLogger(__name__)

MAX_PUBLISHED_BYTES = 900_000  # the broker's default limit, with room for the rest
MAX_REMEMBERED = 256


class LiveDesk:
    """``sink`` goes into the stream's sink thread. ``taken()`` gives the files that other streams write."""

    def __init__(
        self,
        stream: str,
        size: tuple[int, int],
        rate: Fraction,
        roots: Sequence[Path],
        encoder: str,
        rules: AddressRules,
        bus: Bus,
        clock: Clock,
        taken: Callable[[], Collection[Path]],
    ) -> None:
        self.stream, self.epoch, self.size = stream, 0, size
        self._opened = size
        self._rules = rules
        self._roots, self._bus, self._clock, self._taken = roots, bus, clock, taken
        self.sink = Fanout(size, rate, lambda: encoder_of(encoder), self._publish, self._hear)
        self.files: dict[str, Path] = {}
        self.others: dict[str, str] = {}  # sinks that are not live ones: their kinds
        self.remove_other: Callable[[str], asyncio.Future[str] | None] = lambda name: None
        self._subscription: Subscription | None = None
        self._asked: OrderedDict[str, StreamEvent | None] = OrderedDict()  # command → its answer, for repetitions
        self._opening: dict[str, str] = {}  # sink → the command that waits for it
        self._leaving: set[str] = set()  # removed; their ids and files are taken until they have ended
        self._tasks: set[asyncio.Task[None]] = set()
        self._too_big = False

    async def start(self, sinks: Sequence[Sink], added: Collection[str] = ()) -> None:
        """Hear who looks, and open the live ones of these; one that cannot be is told. Raises BusError.

        ``added`` are ids of sinks that an egress before this one was given while it ran: their files go on.
        """
        self._subscription = await self._bus.subscribe(subjects.stream(self.stream, "looking"), self._on_looking)
        for sink in sinks:
            try:
                if isinstance(sink, Mp4Sink) and sink.id not in added:
                    self.others[sink.id] = sink.kind
                else:
                    self._add(sink, resume=sink.id in added)
            except SinkError as error:
                await self._answer("", f"sink {sink.id}: {error}", sink=sink.id, gone=True)

    async def change(self, message: ChangeSinks) -> None:
        """Add or remove one; a repetition is answered again."""
        if message.command in self._asked:
            if (answer := self._asked[message.command]) is not None:
                await self._send(answer)
            return
        self._asked[message.command] = None
        while len(self._asked) > MAX_REMEMBERED:
            self._asked.popitem(last=False)
        if message.add is not None:
            leaving = message.add.id in self._leaving
            try:
                if leaving:
                    raise SinkError(f"sink {message.add.id} has not ended yet: wait for that, or give another id")
                if self.sink.has(message.add.id) or message.add.id in self.others:
                    raise SinkError(f"there is a sink {message.add.id} already")
                if isinstance(message.add, Mp4Sink | HlsSink | RtmpSink):
                    self._opening[message.add.id] = message.command
                self._add(message.add)
            except SinkError as error:
                self._opening.pop(message.add.id, None)
                gone = leaving or (not self.sink.has(message.add.id) and message.add.id not in self.others)
                await self._answer(message.command, str(error), sink=message.add.id, gone=gone)
                return
            if message.add.id not in self._opening:
                await self._answer(message.command, "")
        else:
            self._spawn(self._remove(message.remove, message.command))

    async def resize(self, width: int, height: int) -> None:
        """The stream has another size from here on: files and pushes keep theirs, and that is told."""
        keep = self.sink.resize(width, height)
        if (width, height) != self._opened:
            keep += [name for name, kind in self.others.items() if kind == "mp4"]
        if keep:
            names = "sinks " + ", ".join(keep) if len(keep) > 1 else f"sink {keep[0]}"
            line = f"{names} keep{'' if len(keep) > 1 else 's'} the size at opening: {width}×{height} is fitted into it"
            await self._answer("", line)

    async def close(self) -> None:
        """Nobody is heard any more. The sinks end with the sink thread."""
        if self._subscription is not None:
            with suppress(BusError):
                await self._subscription.unsubscribe()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _add(self, sink: Sink, *, resume: bool = False) -> None:
        """Raises SinkError."""
        make: Callable[[], Muxer] | None = None
        if isinstance(sink, HlsSink):
            if not self._roots:
                raise SinkError("this egress may write no files: set RHEOCAST_FILE_ROOTS")
            make = partial(HlsMuxer, sink, self._roots[0] / "hls" / self.stream)
        elif isinstance(sink, RtmpSink):
            try:
                check_url(sink.url, RTMP, self._rules)
            except AddressError as error:
                raise SinkError(str(error)) from None
            make = partial(RtmpMuxer, sink, self._rules)
        elif isinstance(sink, Mp4Sink):
            try:
                path = inside(sink.path, self._roots, verb="write")
            except MediaError as error:
                raise SinkError(str(error)) from None
            if path in self._taken():
                raise SinkError(f"{path.name}: another stream is writing it; choose another name")
            self.files[sink.id] = path
            make = partial(Mp4Muxer, sink.model_copy(update={"path": str(path)}), resume)
        elif not isinstance(sink, NatsSink):
            self.others[sink.id] = sink.kind
            return  # discarded frames need nobody, and WebRTC has its own desk
        self.sink.add(sink, make)

    async def _remove(self, name: str, command: str) -> None:
        """Answered when it has ended: a recording's file is there then."""
        if name in self._leaving:
            await self._answer(command, f"sink {name} is being removed already", sink=name)
            return
        self._leaving.add(name)
        other, feed = self.remove_other(name), self.sink.remove(name)
        made, failed = "", ""
        if other is not None:
            try:
                made = await other
            except SinkError as error:
                failed = str(error)
        if feed is not None:
            if not await has_ended(feed):
                feed.when_ended(on_loop(partial(self._free, name)))
                await self._answer(command, f"sink {name} did not end within {feed.patience_s:g} s", sink=name)
                return
            made = feed.made
            if feed.gone and feed.kind != "rtmp":  # of a push nothing is left to be complete
                failed = feed.error
        self._free(name)
        log.info("stream %s: sink %s removed: %s", self.stream, name, failed or made or "done")
        await self._answer(command, f"sink {name}: {failed}" if failed else "", sink=name if failed else "")

    def _free(self, name: str) -> None:
        """It has ended."""
        self._leaving.discard(name)
        self.files.pop(name, None)
        self.others.pop(name, None)
        self._opening.pop(name, None)

    def _hear(self, told: Told) -> None:
        name, gone = told.sink, told.news is News.GONE
        if told.news is News.SLOW:
            self._spawn(self._answer("", f"sink {name}: {told.reason}", sink=name))
            return
        command = self._opening.pop(name, "")
        if gone:
            self.sink.remove(name)
            self.files.pop(name, None)
        if told.news is not News.LIVE:
            self._spawn(self._answer(command, f"sink {name}: {told.reason}", sink=name, gone=gone))
        elif command:
            self._spawn(self._answer(command, "", told.chunk, sink=name))

    async def _answer(self, command: str, warning: str, chunk: int = -1, *, sink: str = "", gone: bool = False) -> None:
        event = StreamEvent(
            stream=self.stream,
            event=EventKind.WARNING if warning else EventKind.APPLIED,
            service="egress",
            at_ns=self._clock.now_ns(),
            reason=warning,
            command=command,
            chunk=chunk,
            epoch=self.epoch,
            sink=sink,
            gone=gone,
        )
        if command in self._asked:
            self._asked[command] = event
        await self._send(event)

    async def _send(self, event: StreamEvent) -> None:
        try:
            await self._bus.publish(subjects.stream(self.stream, "event"), event)
        except BusError as error:
            log.warning("stream %s: %s was not told: %s", self.stream, event.reason or event.event, error)

    async def _on_looking(self, received: Received) -> None:
        message: Looking = received.message
        if message.what == "result":
            self.sink.look(message.max_fps)

    async def _publish(self, frame: OutFrame, data: bytes, format_: str) -> None:
        if len(data) > MAX_PUBLISHED_BYTES:
            if not self._too_big:
                self._too_big = True
                most = f"at most {MAX_PUBLISHED_BYTES} fit a message"
                await self._answer(
                    "", f"a frame as {format_} has {len(data)} bytes, {most}: use jpeg, or a smaller size"
                )
            return
        message = FramePublished(
            stream=self.stream,
            chunk=frame.chunk,
            pts=frame.pts,
            captured_ns=frame.captured_ns,
            shown_ns=frame.shown_ns,
            format="rgb24" if format_ == "rgb24" else "jpeg",
            width=frame.pixels.shape[1],
            height=frame.pixels.shape[0],
            data=data,
        )
        try:
            await self._bus.publish(subjects.stream(self.stream, "out"), message)
        except BusError as error:
            log.debug("stream %s: a picture was not published: %s", self.stream, error)

    def _spawn(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # pyright: ignore[reportArgumentType, reportCallIssue]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def has_ended(feed: Feed) -> bool:
    """Whether it ends within its patience. No thread waits for it meanwhile."""
    over = asyncio.Event()
    feed.when_ended(on_loop(over.set))
    with suppress(TimeoutError):
        async with asyncio.timeout(feed.patience_s):
            await over.wait()
    return over.is_set()


def on_loop(work: Callable[[], None]) -> Callable[[], None]:
    """For any thread to call: it is done on this loop."""
    loop = asyncio.get_running_loop()

    def tell() -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(work)

    return tell


def encoder_of(setting: str) -> str:
    """``auto``: hardware where it really works."""
    return best_encoder() if setting == "auto" else setting or SOFTWARE
