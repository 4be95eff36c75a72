"""The ring against a plain list: sinks are the first frames ever, and of the others only the newest are left."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared.engine.plan.ring import ReferenceRing, Ring


@given(st.integers(0, 4), st.integers(1, 4), st.lists(st.integers(1, 4), max_size=30), st.integers(1, 8))
def test_the_ring_always_holds_the_sinks_and_the_newest_frames(
    sinks: int, rolling: int, writes: list[int], first: int
) -> None:
    ring = Ring(sinks + rolling, sinks)
    written: list[int] = []
    for size in [min(first, ring.length), *(min(frames, rolling) for frames in writes)]:
        start = len(written)
        before = ring.contents
        places = ring.write(start, size)
        written += range(start, start + size)
        wanted = written[:sinks] + written[sinks:][-rolling:]
        assert sorted(frame for frame in ring.contents if frame is not None) == sorted(wanted)
        assert [ring.contents[place] for place in places] == written[start:]
        kept = [(old, new) for at, (old, new) in enumerate(zip(before, ring.contents, strict=True)) if at not in places]
        assert all(old == new for old, new in kept)
        assert ring.valid == len(wanted)


@given(st.integers(0, 5), st.integers(1, 6), st.integers(1, 40))
def test_the_public_ring_rolls_over_single_frames_in_turn_but_never_over_place_2(
    sinks: int, rolling: int, evictions: int
) -> None:
    """The first chunk's write of two frames queues the end 4, so place 3 is the first that can go, sink or not."""
    ring = ReferenceRing(max(4, sinks + rolling), sinks)
    ring.write(0, 2)
    for frame in range(2, ring.length):
        assert ring.write(frame, 1) == (frame,)
    can_go = range(max(3, sinks), ring.length)
    for index in range(evictions):
        assert ring.write(ring.length + index, 1) == (can_go[index % len(can_go)],)
    assert ring.contents[: can_go.start] == tuple(range(can_go.start))
