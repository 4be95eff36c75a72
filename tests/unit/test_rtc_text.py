"""SDP fragments, ICE servers, and the fan-out to viewers: pure."""

from __future__ import annotations

import base64
import hashlib
import hmac

import pytest
from pydantic import ValidationError

from services.egress.rtc.fanout import KEY_EVERY_NS, MAX_VIDEO, Encoded, Fanout
from services.gateway.ice import IceSettings, ice_servers, link_headers
from services.gateway.settings import Settings as GatewaySettings
from shared.rtc.fragments import FragmentError, advertised, is_useful, parse_fragment, ufrag_of, without_useless
from shared.rtc.places import RtcSettings

HOST = "candidate:1 1 UDP 2122252543 192.0.2.7 50000 typ host"


def test_a_fragment_is_read() -> None:
    text = f"a=ice-ufrag:EsAw\r\na=ice-pwd:x\r\nm=video 9 RTP 0\r\na=mid:0\r\na={HOST}\r\na=end-of-candidates\r\n"
    fragment = parse_fragment(text)
    assert (fragment.ufrag, fragment.ended) == ("EsAw", True)
    assert [(c.line, c.mid, c.index) for c in fragment.candidates] == [(HOST, "0", 0)]
    assert parse_fragment("").candidates == ()
    with pytest.raises(FragmentError, match="line 1"):
        parse_fragment("hello")
    with pytest.raises(FragmentError, match="more than"):
        parse_fragment("\r\n".join(f"a={HOST}" for _ in range(100)))


@pytest.mark.parametrize(
    "candidate",
    [
        "candidate:1 1 UDP 1 3f2a-77.local 9 typ host",
        "candidate:1 1 TCP 1 192.0.2.7 9 typ host",
        "candidate:1 1 UDP 1 example.com 9 typ host",
        "candidate:1 1 UDP 1 224.0.0.1 9 typ host",
        "candidate:1 1 UDP x 192.0.2.7 9 typ host",
        "candidate:1 1 UDP 1 192.0.2.7 99999 typ host",
        "candidate:2",
    ],
)
def test_candidates_of_no_use_are_left_out(candidate: str) -> None:
    assert not is_useful(candidate)
    assert candidate not in without_useless(f"v=0\r\na={candidate}\r\na={HOST}\r\n")
    assert is_useful(HOST)


def test_an_answer_tells_the_public_address() -> None:
    sdp = f"v=0\r\nc=IN IP4 10.0.0.5\r\na=ice-ufrag:abcd\r\na={HOST}\r\n"
    told = advertised(sdp, "203.0.113.9")
    assert "c=IN IP4 203.0.113.9" in told
    assert "UDP 2122252543 203.0.113.9 50000 typ host" in told
    assert advertised(sdp, "") == sdp
    assert ufrag_of(sdp) == "abcd"


def test_settings_say_what_would_do() -> None:
    assert RtcSettings(rtc_hosts="127.0.0.1, every", rtc_ports="40000-40010").places.ports == (40000, 40010)
    for wrong in ({"rtc_hosts": "lo"}, {"rtc_ports": "9-8"}, {"rtc_public_ip": "x"}):
        with pytest.raises(ValidationError):
            RtcSettings(**wrong)
    with pytest.raises(ValidationError, match="no STUN or TURN URL"):
        GatewaySettings(ice_stun="http://example.com")


def test_turn_credentials_are_the_clients_own_for_a_while() -> None:
    settings = IceSettings(ice_stun="stun:a:1", ice_turn="turn:b:2, turns:b:3", ice_turn_secret="s", ice_turn_ttl_s=600)
    stun, turn = ice_servers(settings, "anna", 1000.0)
    assert (stun.urls, stun.username) == (["stun:a:1"], None)
    assert turn.username == "1600:anna"
    mac = hmac.new(b"s", b"1600:anna", hashlib.sha1).digest()
    assert turn.credential == base64.b64encode(mac).decode()
    assert link_headers([stun, turn])[0] == '<stun:a:1>; rel="ice-server"'
    assert len(link_headers([stun, turn])) == 3
    assert ice_servers(IceSettings(), "x", 0.0) == []


def test_fifty_viewers_cost_one_encode_and_a_slow_one_only_itself() -> None:
    fanout = Fanout()
    queues = [fanout.join(f"v{n}")[0] for n in range(50)]
    assert fanout.takes_key(0)
    assert not fanout.takes_key(KEY_EVERY_NS * 2)
    fanout.video(Encoded(b"k", 0, True))
    for n in range(1, MAX_VIDEO + 2):
        fanout.video(Encoded(b"d", n, False))
        for queue in queues[1:]:
            while queue.pop() is not None:
                pass
    assert fanout.encoded == MAX_VIDEO + 2
    assert queues[0].dropped > 0
    assert not any(queue.dropped for queue in queues[1:])
    assert fanout.takes_key(KEY_EVERY_NS * 3), "the slow one is helped by a key frame"
    fanout.video(Encoded(b"k", 99, True))
    first = queues[0].pop()
    assert first is not None
    assert (first.key, first.pts) == (True, 99)
    fanout.leave("v0")
    assert len(fanout) == 49


def test_whoever_joins_begins_with_a_key_frame() -> None:
    fanout = Fanout()
    queue, _ = fanout.join("v")
    fanout.video(Encoded(b"d", 0, False))
    assert queue.pop() is None
    fanout.video(Encoded(b"k", 1, True))
    found = queue.pop()
    assert found is not None
    assert found.pts == 1
