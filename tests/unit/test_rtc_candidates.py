"""Candidates are counted over a whole session: each one costs the event loop."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("aiortc")

from aiortc import RTCPeerConnection

from shared.rtc.fragments import MAX_CANDIDATES, Fragment, FragmentError, Trickled
from shared.rtc.peer import Peer
from shared.rtc.places import Places


def fragment(count: int, start: int = 0) -> Fragment:
    lines = [f"candidate:{n} 1 UDP {n + 1} 192.0.2.7 {50000 + n} typ host" for n in range(start, start + count)]
    return Fragment("", tuple(Trickled(line, "0", 0) for line in lines), False)


class _Transport:
    """Counts what the library would pair."""

    def __init__(self) -> None:
        self.added = 0

    async def addRemoteCandidate(self, candidate: Any) -> None:
        self.added += 1


def watched(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> _Transport:
    transport = _Transport()
    transceiver = type("T", (), {"receiver": type("R", (), {"transport": type("D", (), {"transport": transport})})})
    monkeypatch.setattr(peer.pc, "getTransceivers", lambda: [transceiver])
    return transport


async def test_many_small_fragments_are_refused_like_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(Places(), 5.0, lambda peer: None)
    transport = watched(peer, monkeypatch)
    for start in range(0, MAX_CANDIDATES, 8):
        await peer.trickle(fragment(8, start))
    with pytest.raises(FragmentError, match="in one session"):
        await peer.trickle(fragment(1))
    await peer.trickle(Fragment("", (), False))
    assert transport.added == MAX_CANDIDATES
    await peer.close()


async def test_those_of_the_offer_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    viewer = RTCPeerConnection()
    viewer.addTransceiver("video", direction="recvonly")
    await viewer.setLocalDescription(await viewer.createOffer())
    bare = [line for line in viewer.localDescription.sdp.splitlines() if not line.startswith("a=candidate:")]
    offered = MAX_CANDIDATES - 4
    sdp = "\r\n".join([*bare, *(f"a={trickled.line}" for trickled in fragment(offered).candidates)]) + "\r\n"
    peer = Peer(Places(), 5.0, lambda peer: None)

    async def prepare() -> None:
        pass

    await peer.answer(sdp, prepare)
    transport = watched(peer, monkeypatch)
    with pytest.raises(FragmentError, match="in one session"):
        await peer.trickle(fragment(5, offered))
    await peer.trickle(fragment(4, offered))
    assert transport.added == 4
    await peer.close()
    await viewer.close()


async def test_once_connected_they_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(Places(), 5.0, lambda peer: None)
    transport = watched(peer, monkeypatch)
    monkeypatch.setattr(Peer, "connected", True)
    for _ in range(3):
        await peer.trickle(fragment(MAX_CANDIDATES))
    assert transport.added == 0
    await peer.close()
