"""The viewers of one stream. Runs on the event loop."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from services.egress.rtc.fanout import Fanout
from services.egress.sinks.whep import WhepSink
from shared.bus.port import Bus
from shared.contracts.signalling import RtcOffer, RtcRefusal
from shared.rtc.desk import RtcDesk
from shared.rtc.places import RtcSettings

if TYPE_CHECKING:
    from shared.rtc.peer import Peer

log = logging.getLogger(__name__)


class WhepDesk:
    """Answers viewers' offers; ``sink`` is what encodes for them."""

    def __init__(self, stream: str, width: int, height: int, most: int, settings: RtcSettings) -> None:
        self._stream = stream
        self.fanout = Fanout()
        self.sink = WhepSink(width, height, self.fanout)
        self._desk = RtcDesk(
            stream,
            "whep",
            settings,
            most=most,
            admit=self._admit,
            open_tracks=self._open_tracks,
            wire=self._wire,
            left=self._left,
        )

    async def start(self, bus: Bus) -> None:
        """Take offers. Raises BusError."""
        await self._desk.start(bus)

    async def close(self) -> None:
        """Every viewer is sent away."""
        await self._desk.close()

    async def _admit(self, offer: RtcOffer) -> None:
        """Viewers are bounded by the desk."""

    def _open_tracks(self, peer: Peer, offer: Any) -> None:
        """Tracks to send, for the kinds that the viewer offers to receive."""
        from services.egress.rtc import sending

        video, audio = self.fanout.join(peer.id)
        for kind, queue, codecs in (("video", video, sending.h264_only()), ("audio", audio, sending.opus_only())):
            if any(media.kind == kind and media.direction in ("recvonly", "sendrecv") for media in offer.media):
                transceiver = peer.pc.addTransceiver(sending.PacketTrack(kind, queue), direction="sendonly")
                transceiver.setCodecPreferences(codecs)
                if kind == "video":
                    sending.on_key_request(transceiver.sender, self.fanout.want_key)
        self.sink.viewers = len(self.fanout)

    async def _wire(self, peer: Peer, offer: Any) -> None:
        from shared.rtc.peer import RefusedOfferError

        if not any(t.kind == "video" and t.sender.track is not None for t in peer.pc.getTransceivers()):
            raise RefusedOfferError(RtcRefusal.INVALID, "the offer receives no video: make it recvonly")
        peer.pc.on("connectionstatechange", lambda: self._on_state(peer))

    def _on_state(self, peer: Peer) -> None:
        if peer.connected:
            self.fanout.want_key()  # the one made while it connected has gone by

    def _left(self, peer: Peer) -> None:
        self.fanout.leave(peer.id)
        self.sink.viewers = len(self.fanout)
