"""Frames that wait at egress carry their source's movement; one that does not fit them is left out, and counts."""

from __future__ import annotations

from collections import Counter

import numpy as np

from services.egress.core import Emit
from services.egress.waiting import Waiting
from shared.contracts.events import ChunkCaptured, FrameStamp, SourceTotals
from shared.media.flow import FlowFinder
from shared.media.steadying import Place
from tests.support.messages import ref, stamp

PIXELS = np.zeros((4, 64, 96, 3), np.uint8)
FRAMES = tuple(FrameStamp(index=n, pts=n, captured_ns=n) for n in range(4))


def test_a_movement_that_does_not_fit_is_left_out_once_for_the_chunk() -> None:
    counted: list[str] = []
    waiting = Waiting(counted.append)
    fits = FlowFinder().chunk(list(PIXELS)).to_bytes()
    for chunk, flow in ((0, fits), (1, fits[:-3]), (2, b"")):
        stamped = stamp(chunk=chunk, frames=FRAMES)
        waiting.captured(ChunkCaptured(stamp=stamped, pixels=ref(), rmse=(0.0,) * 4, totals=SourceTotals(), flow=flow))
        waiting.came(stamped, PIXELS)
    given = [waiting.frame(Emit(chunk, n, FRAMES[n]), 9) for chunk in range(3) for n in range(4)]
    assert [frame.flow is not None for frame in given] == [True] * 4 + [False] * 8
    assert [frame.place for frame in given[:4]] == [Place(0, n, n == 3) for n in range(4)]
    assert Counter(counted) == {"flow_unusable": 1}
