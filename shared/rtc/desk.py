"""Answers the gateway's requests for one stream: offers, trickled candidates, closings. Sessions are bounded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from shared.bus.port import Bus, BusError, Received, Subscription
from shared.contracts import subjects
from shared.contracts.refs import Wire
from shared.contracts.signalling import RtcAnswer, RtcCandidate, RtcClose, RtcOffer, RtcRefusal
from shared.rtc.fragments import FragmentError, parse_fragment
from shared.rtc.places import RtcSettings

if TYPE_CHECKING:
    from shared.rtc.peer import Peer

log = logging.getLogger(__name__)

MISSING = "this instance has no WebRTC: install rheocast with its extra `webrtc`"


class RtcDesk:
    """The sessions of one stream on ``rheo.stream.<id>.<leaf>``.

    ``admit`` may refuse an offer before anything is opened (RefusedOfferError); ``wire`` gets the peer with the offer
    applied and connects its tracks; ``left`` is told when a peer is gone. All run on the loop.
    """

    def __init__(
        self,
        stream: str,
        leaf: str,
        settings: RtcSettings,
        *,
        most: int,
        admit: Callable[[RtcOffer], Awaitable[None]],
        open_tracks: Callable[[Peer, Any], None],
        wire: Callable[[Peer, Any], Awaitable[None]],
        left: Callable[[Peer], None],
    ) -> None:
        self._stream, self._leaf, self._settings, self._most = stream, leaf, settings, most
        self._admit, self._open_tracks, self._wire, self._left = admit, open_tracks, wire, left
        self._subscription: Subscription | None = None
        self._closed = False
        self.peers: dict[str, Peer] = {}
        self.counters: dict[str, int] = {}

    async def start(self, bus: Bus) -> None:
        """Serve. Raises BusError."""
        self._subscription = await bus.serve(subjects.stream(self._stream, self._leaf), self.serve)

    async def close(self) -> None:
        """Serve no more; every peer is sent away."""
        self._closed = True
        if self._subscription is not None:
            with suppress(BusError):
                await self._subscription.unsubscribe()
        await asyncio.gather(*(peer.close() for peer in list(self.peers.values())), return_exceptions=True)

    async def serve(self, received: Received) -> Wire:
        """One request."""
        message = received.message
        if isinstance(message, RtcOffer):
            return await self._offer(message)
        peer = self.peers.get(message.session)
        if peer is None:
            return RtcAnswer(session=message.session, unknown=True, error="there is no such session: offer again")
        if isinstance(message, RtcClose):
            await peer.close()
            return RtcAnswer(session=peer.id)
        return await self._candidate(peer, message)

    async def send_away(self, session: str) -> None:
        """Close one peer."""
        peer = self.peers.get(session)
        if peer is not None:
            await peer.close()

    async def _offer(self, offer: RtcOffer) -> RtcAnswer:
        try:
            from shared.rtc.peer import Peer, RefusedOfferError, parsed_offer
        except ImportError:
            return RtcAnswer(error=MISSING, refusal=RtcRefusal.UNAVAILABLE)
        peer: Peer | None = None
        try:
            if self._closed:
                raise RefusedOfferError(RtcRefusal.UNAVAILABLE, "the stream ends")
            described = parsed_offer(offer.sdp)
            await self._admit(offer)
            if len(self.peers) >= self._most:
                raise RefusedOfferError(RtcRefusal.FULL, f"{self._most} peers are here already; try again later")
            peer = made = Peer(self._settings.places, self._settings.rtc_connect_s, self._on_end)
            self.peers[made.id] = made
            self._open_tracks(made, described)
            answer = await made.answer(offer.sdp, lambda: self._wire(made, described))
        except RefusedOfferError as error:
            if peer is not None:
                await peer.close()
            self._count(f"refused_{error.refusal.value}")
            return RtcAnswer(error=str(error), refusal=error.refusal)
        self._count("offers")
        return RtcAnswer(session=made.id, sdp=answer, etag=made.etag)

    async def _candidate(self, peer: Peer, message: RtcCandidate) -> RtcAnswer:
        from shared.rtc.peer import RefusedOfferError

        if message.etag and message.etag != peer.etag:
            return RtcAnswer(
                session=peer.id, etag=peer.etag, refusal=RtcRefusal.STALE, error="this is not the ICE session that runs"
            )
        try:
            await peer.trickle(parse_fragment(message.fragment))
        except FragmentError as error:
            return RtcAnswer(session=peer.id, etag=peer.etag, refusal=RtcRefusal.INVALID, error=str(error))
        except RefusedOfferError as error:
            return RtcAnswer(session=peer.id, etag=peer.etag, refusal=error.refusal, error=str(error))
        return RtcAnswer(session=peer.id, etag=peer.etag)

    def _on_end(self, peer: Peer) -> None:
        if self.peers.pop(peer.id, None) is not None:
            self._left(peer)

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1
