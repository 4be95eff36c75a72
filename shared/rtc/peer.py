"""One peer connection that answers an offer: sockets where the settings want them, trickled candidates, an end in any case.

Everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import aioice.ice
import aiortc.sdp
from aioice.candidate import candidate_foundation, candidate_priority
from aiortc import RTCBundlePolicy, RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.exceptions import InvalidStateError, OperationError

from shared.contracts.signalling import RtcRefusal
from shared.media.errors import one_line
from shared.rtc.fragments import (
    MAX_CANDIDATES,
    Fragment,
    FragmentError,
    advertised,
    candidates_in,
    ufrag_of,
    without_useless,
)
from shared.rtc.places import EVERY, Places

log = logging.getLogger(__name__)

PORT_TRIES = 50


class RefusedOfferError(Exception):
    """An offer that is not answered. The message is one line that says what would be."""

    def __init__(self, refusal: RtcRefusal, reason: str) -> None:
        super().__init__(reason)
        self.refusal = refusal


def parsed_offer(sdp: str) -> aiortc.sdp.SessionDescription:
    """The offer as the library reads it. Raises RefusedOfferError."""
    try:
        offer = aiortc.sdp.SessionDescription.parse(without_useless(sdp))
    except FragmentError as error:
        raise RefusedOfferError(RtcRefusal.INVALID, str(error)) from None
    except Exception as error:  # the parser raises whatever a broken line makes it raise
        log.debug("an offer cannot be parsed: %s", error)
        raise RefusedOfferError(RtcRefusal.INVALID, "the offer is no SDP that can be read") from None
    if not any(media.kind == "video" for media in offer.media):
        raise RefusedOfferError(RtcRefusal.INVALID, "the offer has no video: offer one m=video section")
    if len(offer.media) > 8 or not all(media.rtp.muxId for media in offer.media if media.kind in ("video", "audio")):
        raise RefusedOfferError(RtcRefusal.INVALID, "offer at most 8 sections, each with its a=mid")
    if not all(m.dtls and m.dtls.fingerprints and m.ice and m.ice.usernameFragment for m in offer.media):
        raise RefusedOfferError(
            RtcRefusal.INVALID, "the offer has no DTLS fingerprint or no ICE user name in a section"
        )
    return offer


class Peer:
    """A connection with its ``id``. ``on_end`` is called once, when it is over for whatever reason."""

    def __init__(self, places: Places, connect_s: float, on_end: Callable[[Peer], None]) -> None:
        self.id = secrets.token_urlsafe(12)
        self.etag = ""
        self.pc = RTCPeerConnection(RTCConfiguration(iceServers=[], bundlePolicy=RTCBundlePolicy.MAX_BUNDLE))
        self._places, self._connect_s, self._on_end = places, connect_s, on_end
        self._remote_ufrag = ""
        self._candidates = 0  # of the other side, since the offer
        self._ended = False
        self._closing: asyncio.Task[None] | None = None
        self._patience: asyncio.TimerHandle | None = None
        self.pc.on("connectionstatechange", self._on_state)

    @property
    def connected(self) -> bool:
        """Whether media can flow."""
        return self.pc.connectionState == "connected"

    async def answer(self, sdp: str, prepare: Callable[[], Awaitable[None]]) -> str:
        """The answer to an offer. ``prepare`` runs when the offer is known, before anything is promised.

        Raises RefusedOfferError; the connection is closed then.
        """
        self._patience = asyncio.get_running_loop().call_later(self._connect_s, self._give_up)
        try:
            offer = without_useless(sdp)
            self._candidates = candidates_in(offer)
            await self.pc.setRemoteDescription(RTCSessionDescription(offer, "offer"))
            await prepare()
            self._bind()
            await self.pc.setLocalDescription(await self.pc.createAnswer())
        except RefusedOfferError:
            await self.close()
            raise
        except OperationError as error:
            await self.close()
            raise RefusedOfferError(RtcRefusal.CODEC, f"no codec in common: offer H.264 ({one_line(error)})") from None
        except (InvalidStateError, ValueError, OSError, AssertionError, AttributeError, KeyError) as error:
            await self.close()
            raise RefusedOfferError(
                RtcRefusal.INVALID, f"nothing can be made of the offer ({one_line(error) or type(error).__name__})"
            ) from None
        self._remote_ufrag = ufrag_of(sdp)
        answer = self.pc.localDescription.sdp
        self.etag = ufrag_of(answer)
        return advertised(answer, self._places.public)

    async def trickle(self, fragment: Fragment) -> None:
        """Candidates of the other side; once connected they are of no use.

        Raises RefusedOfferError for those of another ICE session, FragmentError for more than a session may have.
        """
        if fragment.ufrag and fragment.ufrag != self._remote_ufrag:
            raise RefusedOfferError(
                RtcRefusal.RESTART, "ICE restarts are not supported: delete the session and offer again"
            )
        found = () if self.connected else fragment.candidates
        if self._candidates + len(found) > MAX_CANDIDATES:
            raise FragmentError(f"more than {MAX_CANDIDATES} candidates in one session: send fewer")
        self._candidates += len(found)
        for trickled in found:
            candidate = aiortc.sdp.candidate_from_sdp(trickled.line.partition(":")[2])
            candidate.sdpMid, candidate.sdpMLineIndex = trickled.mid, trickled.index
            if trickled.mid is not None:
                candidate.sdpMLineIndex = None
            # Sections are bundled: whichever a candidate belongs to, there is one transport.
            for transport in {t.receiver.transport.transport for t in self.pc.getTransceivers()}:
                with suppress(ValueError):  # after the end of candidates
                    await transport.addRemoteCandidate(candidate)
        if fragment.ended:
            with suppress(ValueError):
                await self.pc.addIceCandidate(None)

    async def close(self) -> None:
        """End it."""
        if self._patience is not None:
            self._patience.cancel()
        self._note_end()
        await self.pc.close()

    def _bind(self) -> None:
        """Have the library open its sockets where the settings want them: it knows no loopback and no port range."""
        transports = [transceiver.receiver.transport for transceiver in self.pc.getTransceivers()]
        if self.pc.sctp is not None:
            transports.append(self.pc.sctp.transport)
        for transport in transports:
            gatherer = transport.transport.iceGatherer
            connection = gatherer._connection
            connection.get_component_candidates = _Binding(connection, self._places)

    def _give_up(self) -> None:
        if not self.connected:
            log.info("peer %s did not connect in %g s", self.id, self._connect_s)
            self._closing = asyncio.ensure_future(self.close())

    def _on_state(self) -> None:
        state = self.pc.connectionState
        log.debug("peer %s is %s", self.id, state)
        if state in ("failed", "closed") and self._closing is None:
            self._closing = asyncio.ensure_future(self.close())

    def _note_end(self) -> None:
        if not self._ended:
            self._ended = True
            self._on_end(self)


class _Binding:
    """Host candidates on the addresses and ports of the settings, in place of the library's own."""

    def __init__(self, connection: Any, places: Places) -> None:
        self._connection, self._places = connection, places

    async def __call__(self, component: int, addresses: list[str], timeout: int = 5) -> list[Any]:
        """The component's candidates. Raises OSError when no socket could be opened."""
        hosts = [host for host in self._places.hosts if host != EVERY]
        if EVERY in self._places.hosts:
            hosts += [address for address in addresses if address not in hosts]
        candidates: list[Any] = []
        for host in hosts:
            protocol = await self._open(host)
            if protocol is None:
                continue
            address, port = protocol.transport.get_extra_info("sockname")[:2]
            protocol.local_candidate = aioice.Candidate(
                foundation=candidate_foundation("host", "udp", address),
                component=component,
                transport="udp",
                priority=candidate_priority(component, "host"),
                host=address,
                port=port,
                type="host",
            )
            self._connection._protocols.append(protocol)
            candidates.append(protocol.local_candidate)
        if not candidates:
            raise OSError(f"no UDP port could be opened on {', '.join(hosts)}")
        return candidates

    async def _open(self, host: str) -> Any:
        loop, (low, high) = asyncio.get_running_loop(), self._places.ports
        span = high - low + 1
        start = secrets.randbelow(span)
        ports = [low + (start + offset) % span for offset in range(min(PORT_TRIES, span))] if low else [0]
        for port in ports:
            with suppress(OSError):
                _, protocol = await loop.create_datagram_endpoint(
                    lambda: aioice.ice.StunProtocol(self._connection), local_addr=(host, port)
                )
                return protocol
        return None
