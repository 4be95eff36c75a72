"""What the playout makes of measured compute times: the figures of one live stream of 16 fps, in virtual time."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from services.egress.core import Rules, StreamCore
from services.egress.stats import StreamMeter
from shared.contracts.events import ChunkStamp, FrameStamp, SourceTotals, StreamStats

MS = 1_000_000
FRAME = 62_500_000
START = 1_700_000_000_000 * MS


def stamp(chunk: int, deadline: int) -> ChunkStamp:
    first, count = (0, 5) if chunk == 0 else (4 * chunk + 1, 4)
    frames = tuple(
        FrameStamp(
            index=index,
            pts=index,
            captured_ns=START + index * FRAME,
            deadline_ns=START + index * FRAME + deadline,
            duration=1,
        )
        for index in range(first, first + count)
    )
    return ChunkStamp(stream="s", epoch=1, chunk=chunk, frames=frames, live=True, time_base=(1, 16))


def play(chunks: int, compute_ms: float, spread_ms: float, slow: float, deadline: int = 600 * MS) -> StreamStats:
    """Chunks are ready ``compute_ms`` ± ``spread_ms`` after they are captured; a share ``slow`` of them 120 ms later."""
    dice = random.Random(7)
    core, meter = StreamCore(Rules(live=True, deadline_ns=deadline), 1), StreamMeter(START)
    now = START

    def until(time: int) -> None:
        nonlocal now
        while True:
            for emit in core.due(now, 1000).emits:
                meter.emitted(emit.frame, now, Fraction(1, 16))
            following = core.next_at(now)
            if following is None or following > time:
                break
            now = max(now + 1, following + dice.randrange(2 * MS))  # a loop wakes a little late
        now = max(now, time)

    for number in range(chunks):
        made = stamp(number, deadline)
        took = max(20.0, dice.gauss(compute_ms, spread_ms)) + 120.0 * (dice.random() < slow)
        took += 90.0 if number == 0 else 0.0  # two latent frames, and the steps one after the other
        until(made.frames[-1].captured_ns + int(took * MS))
        core.captured(made, SourceTotals(captured=4 * number + 5, numbered=4 * number + 5, chunks=number + 1), now)
        core.ready(made, now)
    until(now + 1000 * MS)
    return meter.stats()


@pytest.mark.parametrize("slow", [0.0, 0.02])
def test_sixty_seconds_of_sixteen_fps_stay_below_400_ms_and_20_ms_of_jitter(slow: float) -> None:
    stats = play(240, compute_ms=165.0, spread_ms=7.0, slow=slow)
    assert stats.first_frame_ms < 1000
    assert stats.latency_p95_ms < 400
    assert stats.jitter_p95_ms < 20
    assert stats.cpr > 0.99
    assert stats.frames_out == 961


def test_a_stream_with_time_to_spare_is_not_held_back_by_its_deadline() -> None:
    quick = play(120, compute_ms=60.0, spread_ms=3.0, slow=0.0, deadline=5000 * MS)
    assert quick.latency_p50_ms < 275
    assert quick.jitter_p95_ms < 15
