"""Streams that share batches must not know of each other: each gets the pixels it has alone."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families as parse

from shared.contracts.events import EventKind
from shared.telemetry import names
from shared.telemetry.names import METRICS
from tests.support import clips
from tests.support.lab import Lab, Running, difference, frames_of
from tests.support.observe import metrics_named, metrics_pages

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

FRAMES = 61
LIGHT = ("ingest", "motion", "scheduler", "egress")


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=[1, 2], ids=["one stage", "two stages"])
async def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with Lab.start(tmp_path_factory.mktemp("many"), stages=request.param) as lab:
        yield lab


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return (
        clips.make_clip(folder / "a.mp4", frames=FRAMES, width=176, height=112, seed=1),
        clips.make_clip(folder / "b.mp4", frames=FRAMES, width=176, height=112, seed=2),
    )


def copied(lab: Lab, pair: tuple[Path, Path]) -> tuple[Path, Path]:
    """The sources inside the folder that the lab's services may read."""
    names = []
    for path in pair:
        target = lab.folder / path.name
        if not target.exists():
            target.write_bytes(path.read_bytes())
        names.append(target)
    return names[0], names[1]


def shared_batches(lab: Lab, *streams: Running) -> int:
    wanted = {running.stream for running in streams}
    return sum(wanted <= {item["stream"] for item in batch["items"]} for batch in lab.batches())


@pytest.mark.parametrize("steps", [2, 4])
async def test_two_streams_that_share_batches_give_each_the_pixels_it_has_alone(
    lab: Lab, pair: tuple[Path, Path], steps: int
) -> None:
    a, b = copied(lab, pair)
    alone_a = await lab.run(a, lab.folder / f"alone-a-{steps}.mp4", steps=steps, seed=5)
    alone_b = await lab.run(b, lab.folder / f"alone-b-{steps}.mp4", steps=steps, seed=6, prompt="a neon picture")
    together = await asyncio.gather(
        lab.begin(a, lab.folder / f"both-a-{steps}.mp4", steps=steps, seed=5),
        lab.begin(b, lab.folder / f"both-b-{steps}.mp4", steps=steps, seed=6, prompt="a neon picture"),
    )
    await asyncio.gather(*(lab.end(running) for running in together))
    assert shared_batches(lab, *together) >= 5, "the batch log must show that they shared forwards"
    for alone, both in zip((alone_a, alone_b), together, strict=True):
        assert both.last.event is EventKind.STOPPED, both.last.reason
        assert alone.output is not None
        assert both.output is not None
        assert len(frames_of(both.output)) == FRAMES
        assert difference(frames_of(alone.output), frames_of(both.output)) <= 1


async def test_changing_one_streams_prompt_and_seed_leaves_the_other_untouched(
    lab: Lab, pair: tuple[Path, Path]
) -> None:
    a, b = copied(lab, pair)
    alone_b = await lab.run(b, lab.folder / "undisturbed.mp4", seed=6)
    calm_a = await lab.run(a, lab.folder / "calm.mp4", seed=5)
    changing, calm = await asyncio.gather(
        lab.begin(a, lab.folder / "changing.mp4", seed=5), lab.begin(b, lab.folder / "calm-b.mp4", seed=6)
    )
    applied = await lab.update(changing, prompt="a neon picture", seed=99)
    await asyncio.gather(lab.end(changing), lab.end(calm))
    assert applied.event is EventKind.APPLIED, applied.reason
    assert applied.chunk >= 0
    assert applied.version == 2
    assert calm.output is not None
    assert alone_b.output is not None
    assert difference(frames_of(alone_b.output), frames_of(calm.output)) <= 1
    assert changing.output is not None
    assert calm_a.output is not None
    before, after = frames_of(calm_a.output), frames_of(changing.output)
    first = 5 + 4 * (applied.chunk - 1) if applied.chunk else 0
    assert difference(before[:first], after[:first]) <= 1 if first else True
    assert difference(before[first:], after[first:]) > 20, "from its chunk on the new prompt shows"


async def test_every_service_exports_its_metrics(lab: Lab) -> None:
    """After the streams above: what each process serves at /metrics, beside what the table declares."""
    pages = await asyncio.to_thread(metrics_pages, lab.system.run_id)
    assert {module for module, _ in pages} == {f"services.{name}" for name in LIGHT} | {"services.worker"}
    families = [family for page in pages.values() for family in parse(page)]
    samples = [sample for family in families for sample in family.samples]
    exported = {family.name + "_total" * (family.type == "counter") for family in families}
    assert {name for name in exported if name.startswith("rheocast_")} == set(METRICS)
    assert metrics_named() <= exported, "every metric that an alert or a dashboard names is there"
    assert not [s for s in samples if s.name == names.METRICS_FAILED and s.value]
    on_time = sum(s.value for s in samples if s.name == names.FRAMES_CLOSED and s.labels["verdict"] == "on_time")
    shown = sum(s.value for s in samples if s.name == f"{names.FRAME_LATENCY}_count")
    assert on_time == shown > 0
    if promtool := shutil.which("promtool"):
        for page in pages.values():
            checked = subprocess.run(
                [promtool, "check", "metrics"], input=page, text=True, capture_output=True, check=False
            )
            assert checked.returncode == 0, checked.stdout + checked.stderr
