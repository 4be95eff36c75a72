"""SDP as text: trickled fragments (RFC 8840), and which candidates are of any use. Pure."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

MAX_CANDIDATES = 64  # of a whole session: the library pairs each one with each of ours, on the event loop
_UFRAG = re.compile(r"^a=ice-ufrag:(\S+)\s*$", re.MULTILINE)


class FragmentError(ValueError):
    """Not a fragment. The message is one line."""


@dataclass(frozen=True, slots=True)
class Trickled:
    """One candidate (what follows ``a=``), and the m-section it belongs to."""

    line: str
    mid: str | None
    index: int


@dataclass(frozen=True, slots=True)
class Fragment:
    """A parsed ``application/trickle-ice-sdpfrag``. ``ended``: no candidate follows."""

    ufrag: str
    candidates: tuple[Trickled, ...]
    ended: bool


def parse_fragment(text: str) -> Fragment:
    """What a fragment says; candidates that are of no use here are left out. Raises FragmentError."""
    ufrag, mid, index, ended = "", None, -1, False
    found: list[Trickled] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line:
            continue
        if len(line) < 2 or line[1] != "=":
            raise FragmentError(f"line {number} is no SDP: send lines like a=candidate:… and a=mid:0")
        if line.startswith("m="):
            index, mid = index + 1, None
        elif line.startswith("a=ice-ufrag:"):
            ufrag = line.partition(":")[2]
        elif line.startswith("a=mid:"):
            mid = line.partition(":")[2]
        elif line == "a=end-of-candidates":
            ended = True
        elif line.startswith("a=candidate:"):
            if len(found) >= MAX_CANDIDATES:
                raise FragmentError(f"more than {MAX_CANDIDATES} candidates: send fewer")
            if is_useful(line[2:]):
                found.append(Trickled(line[2:], mid, max(0, index)))
    return Fragment(ufrag, tuple(found), ended)


def is_useful(candidate: str) -> bool:
    """Whether ``candidate:…`` is UDP with a numeric address.

    Names (browsers hide host addresses behind mDNS ones) are not looked up: such a peer reaches us, and its address is
    learned from its own checks. TCP candidates are not spoken here.
    """
    parts = candidate.split()
    if len(parts) < 8 or parts[2].lower() != "udp" or parts[6] != "typ":
        return False
    if not (parts[1].isdigit() and parts[3].isdigit() and parts[5].isdigit() and 0 < int(parts[5]) < 65536):
        return False
    try:
        address = ipaddress.ip_address(parts[4])
    except ValueError:
        return False
    return not (address.is_multicast or address.is_unspecified)


def without_useless(sdp: str) -> str:
    """An offer without the candidates that are of no use. Raises FragmentError for too many of them."""
    lines = sdp.splitlines()
    if candidates_in(sdp) > MAX_CANDIDATES:
        raise FragmentError(f"more than {MAX_CANDIDATES} candidates: offer fewer")
    kept = [line for line in lines if not line.startswith("a=candidate:") or is_useful(line.strip()[2:])]
    return "\r\n".join(kept) + "\r\n"


def candidates_in(sdp: str) -> int:
    """How many candidates a description brings."""
    return sum(line.startswith("a=candidate:") for line in sdp.splitlines())


def advertised(sdp: str, public: str) -> str:
    """An answer whose host candidates and connection lines name ``public`` (behind a 1:1 NAT); empty: as it is."""
    if not public:
        return sdp
    out: list[str] = []
    for line in sdp.splitlines():
        parts = line.split(" ")
        if line.startswith("a=candidate:") and len(parts) >= 8 and parts[7] == "host":
            parts[4] = public
        elif line.startswith("c=IN IP") and parts[-1] not in ("0.0.0.0", "::"):  # noqa: S104 - text of an SDP
            parts[1:] = ["IP6" if ":" in public else "IP4", public]
        out.append(" ".join(parts))
    return "\r\n".join(out) + "\r\n"


def ufrag_of(sdp: str) -> str:
    """The ICE user name in a description; empty when there is none."""
    found = _UFRAG.search(sdp)
    return found.group(1) if found is not None else ""
