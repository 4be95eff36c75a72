"""The frame number burnt into a picture by the latency benchmark: read back, also from a blurred and darkened one."""

from __future__ import annotations

import numpy as np

from bench.latency import BITS, Meter, draw, figures, number_of, read


def test_numbers_are_read_back_and_wrong_fields_are_noticed() -> None:
    for number in (0, 1, 2, 255, 1023, 4095, 4096, 5000):
        picture = draw(number, 192, 112).astype(np.float32).mean(-1)
        blurred = (picture + np.roll(picture, 3, 1) + np.roll(picture, 2, 0)) / 3 * 0.6 + 20
        assert read(blurred.astype(np.uint8)) == number % (1 << BITS)
    good = draw(77, 192, 112)[..., 0]
    good[10:50, 5:20] = 255 - good[10:50, 5:20]
    assert read(good) is None
    assert number_of(1) is None


def test_figures_are_of_what_was_read() -> None:
    meter = Meter()
    meter.latencies = [100.0, 200.0, 300.0, 900.0]
    found = figures(meter, 12.0)
    assert (found["p50_ms"], found["p95_ms"], found["allowed_ms"]) == (200.0, 900.0, 500.0)
