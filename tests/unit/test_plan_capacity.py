"""Capacity plans: published rules of thumb come out, profiles name their sources, and wrong names are told in one line."""

from __future__ import annotations

import json
import math
from itertools import combinations

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from services.cli.commands import cli
from services.cli.errors import CommandError
from services.cli.plan import Plan, make_plan
from shared.engine.plan.capacity import cut, group_capacity
from shared.engine.plan.devices import DeviceError, device_profile, device_profiles
from shared.engine.plan.spec import spec_of


def planned(
    model: str = "wan2.1-1.3b",
    size: str | None = "832x480",
    fps: float | None = 10,
    steps: int = 2,
    device: str = "h100",
    streams: int | None = None,
    per_group: int | None = None,
    price: float | None = None,
) -> Plan:
    return make_plan(model, size, fps, steps, device, streams, per_group, price)


def test_four_h100_serve_five_streams_of_ten_frames_and_a_hundred_need_eighty() -> None:
    plan = planned(streams=100, price=2.0)
    assert plan.devices_per_group == 4
    assert plan.total_fps_per_group == pytest.approx(50, rel=0.02)
    assert plan.streams_per_group == 5
    assert (plan.groups, plan.devices) == (20, 80)
    assert plan.cost_per_stream_hour == pytest.approx(80 * 2.0 / 100)


def test_two_4090_serve_two_streams_of_eight_frames() -> None:
    plan = planned(size="512x512", fps=8, steps=1, device="rtx4090")
    assert plan.devices_per_group == 2
    assert plan.total_fps_per_group == pytest.approx(16.6, rel=0.02)
    assert plan.streams_per_group == 2
    four = planned(size="512x512", fps=8, steps=1, device="rtx4090", per_group=4)
    assert four.total_fps_per_group == pytest.approx(24, rel=0.02)
    assert planned(steps=1, device="rtx4090", per_group=4).total_fps_per_group == pytest.approx(16, rel=0.05)


@pytest.mark.parametrize(
    ("model", "size", "steps", "published", "within"),
    [
        ("wan2.1-1.3b", "832x480", 1, 42.26, 0.01),  # fitted
        ("wan2.1-14b", "832x480", 1, 39.24, 0.01),  # fitted
        ("wan2.1-1.3b", "512x512", 1, 61.57, 0.06),
        ("wan2.1-1.3b", "512x512", 4, 60, 0.08),
        ("wan2.1-14b", "512x512", 1, 58.28, 0.06),
    ],
)
def test_what_one_stream_reached_on_four_h100(
    model: str, size: str, steps: int, published: float, within: float
) -> None:
    assert planned(model=model, size=size, steps=steps).single_stream_fps == pytest.approx(published, rel=within)


def test_the_embedded_model_as_it_was_measured() -> None:
    plan = planned(model="rheo-tiny", size="320x192", device="cpu-2core", fps=12)
    assert plan.total_fps_per_group == pytest.approx(23.8, rel=0.06), "every service, docs/benchmarks.md"
    assert plan.streams_per_group == 2


def test_an_autoencoder_that_costs_less_serves_more() -> None:
    assert planned(model="wan2.1-1.3b-fast").streams_per_group > planned().streams_per_group


def test_memory_can_be_what_limits() -> None:
    plan = planned(model="wan2.1-14b", size="832x480", fps=0.2, steps=1, device="rtx4090", per_group=4)
    assert plan.limited_by == "memory"
    none = planned(model="wan2.1-14b", fps=0.1, device="rtx4090", per_group=1)
    assert none.streams_per_group == 0
    assert none.devices is None


def test_every_profile_says_where_its_figures_come_from() -> None:
    for profile in device_profiles().values():
        assert profile.sources, profile.name
        assert profile.fitted_to, profile.name
        assert profile.predicts, profile.name
        assert bool(profile.measured) != bool(profile.peak_tflops), profile.name


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=8), st.integers(1, 4))
def test_the_cut_is_the_best_there_is(layers: list[float], parts: int) -> None:
    def slowest(bounds: tuple[int, ...]) -> float:
        return max(sum(layers[a:b]) for a, b in zip((0, *bounds), (*bounds, len(layers)), strict=True))

    ways = [tuple(sorted(way)) for way in combinations(list(range(len(layers) + 1)) * parts, parts - 1)]
    assert math.isclose(slowest(tuple(cut(layers, parts))), min(slowest(way) for way in ways), rel_tol=1e-6)


def test_more_devices_in_a_group_never_serve_less() -> None:
    spec, device = spec_of("wan2.1-14b"), device_profile("h100")
    totals = [group_capacity(spec, 832, 480, 10, 2, device, n).total_fps for n in range(1, 9)]
    assert totals == sorted(totals)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"device": "tpu"}, r"no device 'tpu'; known: cpu-2core, h100, rtx4090"),
        ({"model": "nothing"}, r"no model 'nothing' here; known: .*wan2.1-1.3b"),
        ({"size": "830x480"}, r"multiples of 16"),
        ({"device": "cpu-2core"}, r"measured with rheo-tiny only"),
    ],
)
def test_what_is_not_known_is_one_line(change: dict[str, str], line: str) -> None:
    with pytest.raises(CommandError, match=line) as refused:
        planned(**change)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


def test_a_device_file_with_an_unknown_model_names_the_known() -> None:
    with pytest.raises(DeviceError, match="rheo-tiny"):
        device_profile("cpu-2core").times(spec_of("wan2.1-1.3b"), 320, 192)


def test_the_command_prints_people_and_machines_the_same() -> None:
    asked = ["plan", "--device", "h100", "--size", "832x480", "--fps", "10", "--streams", "100"]
    text = CliRunner().invoke(cli, asked)
    assert text.exit_code == 0
    assert "5 streams per group" in text.output
    assert "80 devices" in text.output
    assert "assumed:" in text.output
    machine = json.loads(CliRunner().invoke(cli, [*asked, "--json"]).output)
    assert (machine["streams_per_group"], machine["devices"]) == (5, 80)
