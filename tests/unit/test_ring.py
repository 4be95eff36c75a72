"""The ring of a slot: as it should be, and as the public code has it."""

from __future__ import annotations

import pytest

from shared.engine.plan.ring import Contents, ReferenceRing, Ring, RingError, place_of


def test_the_ring_fills_in_order_then_the_oldest_frame_that_is_no_sink_goes():
    ring = Ring(6, 3)
    assert ring.write(0, 2) == (0, 1)
    assert [ring.write(frame, 1) for frame in range(2, 6)] == [(2,), (3,), (4,), (5,)]
    assert ring.contents == (0, 1, 2, 3, 4, 5)
    assert [ring.write(frame, 1) for frame in range(6, 10)] == [(3,), (4,), (5,), (3,)]
    assert ring.contents == (0, 1, 2, 9, 7, 8)
    assert ring.valid == 6


def test_a_block_of_three_wraps_around_behind_the_sinks():
    ring = Ring(6, 3)
    assert ring.write(0, 4) == (0, 1, 2, 3)
    assert ring.write(4, 3) == (4, 5, 3)  # the last two places, then the first one after the sinks
    assert ring.contents == (0, 1, 2, 6, 4, 5)
    assert ring.write(7, 3) == (4, 5, 3)
    assert ring.contents == (0, 1, 2, 9, 7, 8)


def test_while_it_fills_only_written_places_are_valid():
    ring = Ring(6, 3)
    assert ring.valid == 0
    ring.write(0, 3)
    assert (ring.valid, ring.contents) == (3, (0, 1, 2, None, None, None))


def test_the_same_frames_again_overwrite_the_same_places():
    ring = Ring(5, 2)
    ring.write(0, 2)
    assert ring.write(2, 1) == ring.write(2, 1) == (2,)
    assert ring.write(3, 1) == (3,)


def test_what_does_not_fit_is_refused_with_what_would():
    ring = Ring(6, 3)
    with pytest.raises(RingError, match="1…6 do"):
        ring.write(0, 7)
    ring.write(0, 6)
    with pytest.raises(RingError, match="1…3 do"):
        ring.write(6, 4)
    with pytest.raises(RingError, match="at least one place must roll"):
        Ring(3, 3)


def test_a_replaced_sink_does_not_cost_the_rolling_window_a_frame():
    ring = Ring(5, 2)
    for frame in range(6):
        ring.write(frame, 1)
    assert ring.contents == (0, 1, 5, 3, 4)
    assert ring.write_sink(6, 1) == (1,)
    assert ring.write(7, 1) == (3,)  # 3 was the oldest, and still is
    assert ring.contents == (0, 6, 5, 7, 4)


def test_an_empty_place_is_never_taken_for_a_sink():
    ring = Ring(5, 2)
    ring.write(0, 1)
    with pytest.raises(RingError, match="no sink that holds a frame"):
        ring.write_sink(1, 1)
    with pytest.raises(RingError, match="no sink"):
        ring.write_sink(1, 2)


def test_a_fork_goes_on_by_itself_and_a_reset_starts_over():
    ring = Ring(5, 2)
    ring.write(0, 4)
    twin = ring.copy()
    assert twin.write(4, 1) == (4,)
    assert ring.contents == (0, 1, 2, 3, None)
    ring.reset()
    assert ring.write(9, 1) == (0,)


def test_places_are_a_closed_form_that_a_device_can_compute():
    assert [place_of(index, 5, 2) for index in range(9)] == [0, 1, 2, 3, 4, 2, 3, 4, 2]
    assert [place_of(index, 4, 0) for index in range(6)] == [0, 1, 2, 3, 0, 1]


# --- the public code's ring ------------------------------------------------------------------------------------------


def reference(length: int, sinks: int, first: int, frames: int, writes: int) -> tuple[ReferenceRing, list[int]]:
    ring = ReferenceRing(length, sinks)
    ring.write(0, first)
    return ring, [ring.write(first + frames * index, frames)[0] for index in range(writes)]


def test_the_public_ring_of_five_evicts_3_and_4_in_turn_and_never_2():
    ring, places = reference(5, 2, first=2, frames=1, writes=9)
    assert places == [2, 3, 4, 3, 4, 3, 4, 3, 4]
    assert ring.contents[2] == 2  # the oldest frame that is no sink stays for good: a fault


def test_the_public_ring_of_21_evicts_out_of_order_and_attends_places_never_written():
    ring, places = reference(21, 0, first=4, frames=3, writes=6)
    assert places == [4, 7, 10, 13, 16, 5]
    assert ring.valid == 21
    assert ring.contents[19:] == (None, None)
    rest = [ring.write(22 + 3 * index, 3)[0] for index in range(5)]
    assert rest == [7, 10, 13, 16, 5]


def test_a_repeated_start_overwrites_in_the_public_ring_too():
    ring = ReferenceRing(6, 3)
    ring.write(0, 2)
    assert ring.write(2, 1) == ring.write(2, 1) == (2,)
    assert ring.valid == 3


def test_sinks_that_fail_while_the_ring_fills_are_destroyed_later_last_in_first_out():
    """The public test also meets places that hold nothing: similarity 0, so a hit at once."""

    def first_empty_sink(contents: Contents) -> int | None:
        empty = [place for place in range(3) if contents[place] is None]
        return empty[0] if empty else None

    ring = ReferenceRing(6, 3, first_empty_sink)
    ring.write(0, 2)
    for frame in range(2, 6):
        ring.write(frame, 1)
    assert ring.queue[:2] == (3, 1)  # hits waited through the whole fill
    assert ring.write(6, 1) == (2,)
    assert ring.write(7, 1) == (0,)
    assert ring.contents == (7, 1, 6, 3, 4, 5)
    assert {ring.write(frame, 1)[0] for frame in range(8, 20)} <= {3, 4, 5}  # a sink's place is not put back


def test_the_public_rings_reset_and_copy_are_clean():
    ring, _ = reference(5, 2, first=2, frames=1, writes=6)
    twin = ring.copy()
    assert twin.write(8, 1) == ring.write(8, 1)
    ring.reset()
    assert (ring.queue, ring.valid, ring.contents) == ((), 0, (None,) * 5)
    with pytest.raises(RingError, match="no sink"):
        ring.hit(2)
