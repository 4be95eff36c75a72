"""A client of both ways (Scope's protocol): one peer that sends the stream's source, sees its result, and changes it by a data
channel. Runs on the event loop.

The stream belongs to its client: when the client has been away for ``peer_grace_s`` the stream is stopped.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from services.egress.rtc.fanout import Fanout
from services.egress.rtc.live_vp8 import LiveVp8
from services.egress.rtc.peer_input import PeerInput
from services.egress.rtc.viewers import WhepDesk
from services.egress.sinks.whep import WhepSink
from shared.bus.port import Bus, BusError, Received, Subscription
from shared.clock import Clock
from shared.contracts import subjects
from shared.contracts.commands import StopStream, StreamPatch, TakeStream, UpdateStream
from shared.contracts.events import EventKind, StreamEvent
from shared.contracts.signalling import RtcOffer, RtcRefusal
from shared.contracts.sources import PushedFrame, PushSource
from shared.rates import Rates
from shared.rtc.desk import RtcDesk
from shared.rtc.places import RtcSettings
from shared.rtc.scope_parameters import ParametersError, Wanted, read_message

if TYPE_CHECKING:
    from shared.rtc.peer import Peer

log = logging.getLogger(__name__)

FIRST_S = 20.0  # the client is waited for so long, at least
WATCH_S = 0.25
STOP_AGAIN_S = 5.0
ANSWER_S = 5.0  # how long a change waits for the scheduler's answer before the next is sent
GAP_S = 0.1  # between two changes: what comes meanwhile is sent as one
GOODBYE_S = 1.0
WARNINGS_PER_S, WARNINGS_BURST = 0.2, 3


def ways_of(directions: Sequence[str], takes_input: bool) -> list[str]:
    """Our direction for each video section of an offer: one section is sent to, one received from, the rest is idle.

    Raises ValueError with what the offer lacks.
    """
    ours = ["inactive"] * len(directions)
    out = next((n for n, given in enumerate(directions) if given in ("sendrecv", "recvonly")), None)
    if out is None:
        raise ValueError("the offer receives no video: make a video section sendrecv or recvonly")
    ours[out] = "sendonly"
    if takes_input:
        into = next((n for n, given in enumerate(directions) if given in ("sendrecv", "sendonly")), None)
        if into is None:
            raise ValueError('the offer sends no video: add a track, or ask with "input_mode": "text"')
        ours[into] = "sendrecv" if into == out else "recvonly"
    return ours


class PeerDesk:
    """The client of one stream. ``sink`` encodes VP8, for clients that take no H.264; the others share the viewers' encode."""

    def __init__(self, take: TakeStream, viewers: WhepDesk, settings: RtcSettings, bus: Bus, clock: Clock) -> None:
        self._stream, self._bus, self._clock = take.stream, bus, clock
        self._grace_s = take.spec.peer_grace_s or 1.0
        size = take.width, take.height
        self.sink = WhepSink(*size, Fanout(), LiveVp8)
        self._ways = {"H264": (viewers.fanout, viewers.sink), "VP8": (self.sink.fanout, self.sink)}
        self._input = PeerInput(take.stream, size, self._push) if isinstance(take.spec.source, PushSource) else None
        self._desk = RtcDesk(
            take.stream,
            "peer",
            settings,
            most=1,
            admit=self._admit,
            open_tracks=self._open_tracks,
            wire=self._wire,
            left=self._left,
        )
        self._joined: dict[str, str] = {}  # peer → the codec it sees
        self._channel: Any = None
        self._wanted, self._wants = Wanted(), asyncio.Event()
        self._asked = ""  # the command that waits for its answer
        self._answered = asyncio.Event()
        self._over = asyncio.Event()
        self._error = ""
        self._told: set[str] = set()
        self._warnings = Rates(WARNINGS_PER_S, WARNINGS_BURST)
        self._away_since = time.monotonic()
        self._came = False
        self._subscription: Subscription | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.counters = self._input.counters if self._input is not None else {}

    async def start(self) -> None:
        """Take the client's offer. Raises BusError."""
        self._subscription = await self._bus.subscribe(subjects.stream(self._stream, "event"), self._on_event)
        await self._desk.start(self._bus)
        if self._input is not None:
            self._input.start()
        self._spawn(self._watch())
        self._spawn(self._carry_out())

    async def close(self) -> None:
        """The stream is over: say so, and let the client go."""
        if self._desk.peers and self._channel is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), GOODBYE_S)
            await self._say_goodbye()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._desk.close()
        if self._input is not None:
            await self._input.close()
        if self._subscription is not None:
            with suppress(BusError):
                await self._subscription.unsubscribe()

    def resize(self, size: tuple[int, int]) -> None:
        """The stream goes on in another size; the result's pictures tell theirs themselves."""
        if self._input is not None:
            self._input.size = size

    # --- the session -------------------------------------------------------------------------------------------------

    async def _admit(self, offer: RtcOffer) -> None:
        """One client; the desk's bound sees to that."""

    def _open_tracks(self, peer: Peer, offer: Any) -> None:
        """Say what each section of the offer is for, before the library makes receivers that nobody reads."""
        from services.egress.rtc import sending
        from shared.rtc.peer import RefusedOfferError

        videos = [media for media in offer.media if media.kind == "video"]
        try:
            ours = ways_of([media.direction or "sendrecv" for media in videos], self._input is not None)
        except ValueError as error:
            raise RefusedOfferError(RtcRefusal.INVALID, str(error)) from None
        for direction in ours:
            transceiver = peer.pc.addTransceiver("video", direction=direction)
            transceiver.setCodecPreferences(sending.h264_or_vp8())
        for media in offer.media:
            if media.kind == "audio":
                peer.pc.addTransceiver("audio", direction="inactive")

    async def _wire(self, peer: Peer, offer: Any) -> None:
        from services.egress.rtc import sending
        from shared.rtc.receiving import VideoTap

        for transceiver in peer.pc.getTransceivers():
            codecs = {codec.payloadType: codec.name for codec in transceiver._codecs if codec.payloadType is not None}
            if transceiver.kind == "video" and transceiver.direction in ("sendonly", "sendrecv"):
                codec = "VP8" if transceiver._codecs[0].name.upper() == "VP8" else "H264"
                fanout, sink = self._ways[codec]
                self._joined[peer.id] = codec
                transceiver.sender.replaceTrack(sending.PacketTrack("video", fanout.join(peer.id)[0]))
                sending.on_key_request(transceiver.sender, fanout.want_key)
                sink.viewers = len(fanout)
            if self._input is not None and transceiver.direction in ("recvonly", "sendrecv"):
                tap = VideoTap(peer.id, transceiver.receiver, codecs, self._input.inbox, lambda: None)
                self._input.inbox.ask_key = tap.ask_key
        peer.pc.on("datachannel", self._on_channel)
        peer.pc.on("connectionstatechange", lambda: self._on_state(peer))
        self._came = True

    def _on_state(self, peer: Peer) -> None:
        codec = self._joined.get(peer.id)
        if peer.connected and codec is not None:
            self._ways[codec][0].want_key()  # the one made while it connected has gone by

    def _left(self, peer: Peer) -> None:
        codec = self._joined.pop(peer.id, None)
        if codec is not None:
            fanout, sink = self._ways[codec]
            fanout.leave(peer.id)
            sink.viewers = len(fanout)
        self._channel = None
        self._away_since = time.monotonic()
        log.info("stream %s: its client is gone", self._stream)

    async def _watch(self) -> None:
        """Stop the stream once nobody is there for it; asked again until it ends."""
        while True:
            await asyncio.sleep(WATCH_S)
            away_s = 0.0 if self._desk.peers else time.monotonic() - self._away_since
            if away_s > (self._grace_s if self._came else max(FIRST_S, self._grace_s)):
                log.info("stream %s: nobody came back for %.0f s", self._stream, away_s)
                stop = StopStream(command=secrets.token_hex(8), stream=self._stream, drain=False)
                with suppress(BusError, OSError):
                    await self._bus.publish(subjects.stream(self._stream, "control"), stop)
                await asyncio.sleep(STOP_AGAIN_S)

    async def _push(self, frame: PushedFrame) -> None:
        await self._bus.publish(subjects.stream(self._stream, "push"), frame)

    # --- the data channel --------------------------------------------------------------------------------------------

    def _on_channel(self, channel: Any) -> None:
        self._channel = channel
        channel.on("message", self._on_message)

    def _on_message(self, message: str | bytes) -> None:
        try:
            parameters = read_message(message)
            self._wanted.add(parameters)
        except ParametersError as error:
            self._count("peer_bad_messages")
            self._warn(f"a message on the data channel is passed over: {error}")
            return
        if new := [name for name in parameters.not_served if name not in self._told]:
            self._told.update(new)
            self._warn(f"these parameters change nothing here: {', '.join(new)}")
        self._wants.set()

    async def _carry_out(self) -> None:
        """What is wanted, one command at a time."""
        while True:
            await self._wants.wait()
            self._wants.clear()
            for patch in self._wanted.take():
                try:
                    await self._ask(patch)
                except (BusError, OSError) as error:
                    self._warn(f"a change could not be passed on: {error}")
            await asyncio.sleep(GAP_S)

    async def _ask(self, patch: StreamPatch) -> None:
        command = UpdateStream(command=secrets.token_hex(8), stream=self._stream, patch=patch)
        self._asked = command.command
        self._answered.clear()
        await self._bus.publish(subjects.stream(self._stream, "control"), command)
        self._count("peer_changes")
        with suppress(TimeoutError):
            await asyncio.wait_for(self._answered.wait(), ANSWER_S)

    async def _on_event(self, received: Received) -> None:
        event: StreamEvent = received.message
        if event.command and event.command == self._asked:
            self._answered.set()
        if event.event in (EventKind.STOPPED, EventKind.FAILED):
            self._error = event.reason if event.event is EventKind.FAILED else ""
            self._over.set()

    async def _say_goodbye(self) -> None:
        channel = self._channel
        if channel is None or channel.readyState != "open":
            return
        said = {"type": "stream_stopped", **({"error_message": self._error} if self._error else {})}
        with suppress(Exception):  # the library raises whatever a dying connection makes it raise
            channel.send(json.dumps(said))
            until = time.monotonic() + GOODBYE_S
            while channel.bufferedAmount and time.monotonic() < until:
                await asyncio.sleep(0.02)

    # --- telling -----------------------------------------------------------------------------------------------------

    def _warn(self, reason: str) -> None:
        """A warning event; too many are left out and counted."""
        if self._warnings.take("", time.monotonic()) > 0:
            self._count("peer_warnings_left_out")
            return
        self._spawn(self._tell(reason))

    async def _tell(self, reason: str) -> None:
        event = StreamEvent(
            stream=self._stream,
            event=EventKind.WARNING,
            service="egress",
            at_ns=self._clock.now_ns(),
            reason=reason[:500],
        )
        with suppress(BusError, OSError):
            await self._bus.publish(subjects.stream(self._stream, "event"), event)

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
