"""The publishers of one stream: one at a time, who may go and come back. Runs on the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from shared.bus.port import Bus
from shared.contracts.events import EventKind
from shared.contracts.signalling import RtcOffer, RtcRefusal
from shared.rtc.desk import RtcDesk
from shared.rtc.inbox import Inbox
from shared.rtc.places import RtcSettings

if TYPE_CHECKING:
    from shared.rtc.peer import Peer
    from shared.rtc.receiving import VideoTap

log = logging.getLogger(__name__)

LOST_S = 1.5  # without a frame for so long the source counts as lost, and another publisher may come
WATCH_S = 0.2
FIRST_S = 60.0  # the first publisher is waited for so long, at least


class WhipDesk:
    """Answers offers for one stream and fills its inbox; tells when the source is lost and back.

    Nobody for ``reconnect_s``: the inbox ends.
    """

    def __init__(
        self,
        stream: str,
        tell: Callable[[EventKind, str], None],
        reconnect_s: float,
        settings: RtcSettings,
        bus: Bus,
        inbox: Inbox,
    ) -> None:
        self._stream, self._tell, self._reconnect_s, self._bus, self._inbox = stream, tell, reconnect_s, bus, inbox
        self._desk = RtcDesk(
            stream,
            "whip",
            settings,
            most=2,  # the one who is there, and the one who takes over
            admit=self._admit,
            open_tracks=lambda peer, offer: None,
            wire=self._wire,
            left=self._left,
        )
        self._publisher = ""  # the session whose media counts
        self._tap: VideoTap | None = None
        self._taps: list[Any] = []
        self._seen_s = time.monotonic()
        self._began = False
        self._lost = False
        self._watcher: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        inbox.ask_key = self._ask_key

    async def start(self) -> None:
        """Take offers. Raises BusError."""
        await self._desk.start(self._bus)
        self._watcher = asyncio.create_task(self._watch(), name=f"whip-{self._stream}")

    async def close(self) -> None:
        """Send the publisher away and end the inbox."""
        self._inbox.end()
        if self._watcher is not None:
            self._watcher.cancel()
        await self._desk.close()
        await asyncio.gather(*([self._watcher] if self._watcher else []), *self._tasks, return_exceptions=True)

    # --- sessions ----------------------------------------------------------------------------------------------------

    async def _admit(self, offer: RtcOffer) -> None:
        """One publisher at a time: a second one is refused while the first one's picture comes."""
        from shared.rtc.peer import RefusedOfferError

        if not self._publisher:
            return
        if not offer.takeover and time.monotonic() - self._seen_s < max(LOST_S, self._connecting_s()):
            raise RefusedOfferError(
                RtcRefusal.BUSY,
                "somebody publishes to this stream: wait until they have left, or offer with takeover=true",
            )
        await self._desk.send_away(self._publisher)

    def _connecting_s(self) -> float:
        """A publisher who is about to connect is not pushed aside so soon."""
        peer = self._desk.peers.get(self._publisher)
        return 5.0 if peer is not None and not peer.connected else 0.0

    async def _wire(self, peer: Peer, offer: Any) -> None:
        from shared.rtc.peer import RefusedOfferError
        from shared.rtc.receiving import AudioTap, VideoTap, drain, only_opus

        taps: list[Any] = []
        tracks: list[Any] = []
        video: VideoTap | None = None
        with_sound = False
        for transceiver in peer.pc.getTransceivers():
            if transceiver.receiver.track is None:
                continue
            codecs = {codec.payloadType: codec.name for codec in transceiver._codecs if codec.payloadType is not None}
            if transceiver.kind == "video" and video is None:
                video = VideoTap(peer.id, transceiver.receiver, codecs, self._inbox, lambda: self._on_frame(peer.id))
                tracks.append(transceiver.receiver.track)
            elif transceiver.kind == "audio" and not with_sound:
                only_opus(transceiver)
                taps.append(AudioTap(peer.id, transceiver.receiver, self._inbox))
                with_sound = any(name.lower() == "opus" for name in codecs.values())
        if video is None:
            raise RefusedOfferError(RtcRefusal.INVALID, "the offer sends no video: make it sendonly")
        self._inbox.with_sound = with_sound
        self._publisher, self._tap, self._taps = peer.id, video, taps
        self._seen_s = time.monotonic()
        for track in tracks:
            self._spawn(self._until_end(peer, drain(track)))

    async def _until_end(self, peer: Peer, end: Awaitable[None]) -> None:
        await end
        await peer.close()

    def _left(self, peer: Peer) -> None:
        if peer.id == self._publisher:
            log.info("stream %s: its publisher is gone", self._stream)
            self._publisher, self._tap = "", None
            if self._began and not self._lost:
                self._lost = True
                self._tell(EventKind.SOURCE_LOST, "the publisher has left")

    def _on_frame(self, session: str) -> None:
        if session != self._publisher:
            return
        self._seen_s = time.monotonic()
        if self._lost or not self._began:
            came_back, self._lost, self._began = self._began, False, True
            self._tell(EventKind.SOURCE_BACK, "the picture goes on" if came_back else "the picture comes")

    def _ask_key(self) -> None:
        if self._tap is not None:
            self._tap.ask_key()

    # --- watching ----------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        self._tell(EventKind.LISTENING, f"/v1/streams/{self._stream}/whip")
        while True:
            await asyncio.sleep(WATCH_S)
            silent_s = time.monotonic() - self._seen_s
            if self._began and not self._lost and silent_s > LOST_S:
                self._lost = True
                self._tell(EventKind.SOURCE_LOST, f"no picture for {silent_s:.1f} s")
            if self._lost and self._tap is not None:
                # The path may be whole again with nothing but references to what was lost.
                self._tap.ask_key()
            if silent_s > (self._reconnect_s if self._began else max(FIRST_S, self._reconnect_s)):
                who = "the publisher did not come back" if self._began else "nobody published"
                self._inbox.end(f"{who} within {silent_s:.0f} s")
                return

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
