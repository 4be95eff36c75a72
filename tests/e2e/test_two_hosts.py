"""One pipeline over two hosts: NATS, Redis and most services on one, the second stage and the decoder on the other.

The hosts are network namespaces of this machine with a cable between them that can be made slow and lossy. This test's own
connections are made from the first host.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from services.cli.topology import Topology
from shared.client import Api
from shared.contracts.commands import FileSource, StreamSpec
from shared.contracts.events import EventKind
from tests.support.clips import make_clip
from tests.support.hosts import Hosts, SpreadSystem, hosts, why_not
from tests.support.lab import Lab, difference, frames_of, reconciles

WHY_NOT = why_not()
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(150),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]
PORT = 7860
WIDTH, HEIGHT, FRAMES = 96, 64, 33
PICTURES = WIDTH * HEIGHT * 3 * FRAMES  # bytes


@dataclass
class Spread:
    """The system, its hosts, and what a stream looks like whose workers are all on one of them."""

    hosts: Hosts
    system: SpreadSystem
    lab: Lab
    clip: Path


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def spread(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Spread]:
    folder = tmp_path_factory.mktemp("hosts")
    clip = make_clip(folder / "in.mp4", width=WIDTH, height=HEIGHT, frames=FRAMES, fps=16)
    topology = Topology(
        model="rheo-tiny",
        stages=2,
        read_roots=(folder,),
        write_roots=(folder,),
        gateway_port=PORT,
        extra_env={"RHEOCAST_MEDIA_DIR": str(folder)},
    )
    with hosts() as made, made.inside("a"):
        system = SpreadSystem(made, topology, folder)
        try:
            await system.start()
            yield Spread(made, system, Lab(system, folder, folder / "batches.jsonl"), clip)  # type: ignore[arg-type]
        finally:
            await system.stop()


async def through(spread: Spread, name: str, **fields: object) -> Path:
    """The clip, restyled without a loss."""
    output = spread.lab.folder / name
    running = await spread.lab.run(spread.clip, output, width=WIDTH, height=HEIGHT, seed=7, **fields)
    assert running.last.event is EventKind.STOPPED, running.events
    assert reconciles(running.last)
    assert running.last.totals is not None
    assert running.last.totals.on_time == FRAMES
    return output


async def test_two_hosts_make_the_same_pixels_as_one(spread: Spread) -> None:
    spread.hosts.cable()
    one = await through(spread, "one.mp4")
    assert spread.hosts.cable()["bytes"] < 5_000, "nothing has to leave the host"
    await spread.system.move("worker-1", "b")
    spread.hosts.cable()
    two = await through(spread, "two.mp4")
    carried = spread.hosts.cable()
    assert carried["bytes"] > PICTURES, "the pictures came over the cable"
    assert difference(frames_of(one), frames_of(two)) == 0
    assert difference(frames_of(one), frames_of(spread.clip)) > 50, "they are restyled"


async def test_a_slow_and_lossy_cable_costs_time_but_no_frame(spread: Spread) -> None:
    spread.hosts.cable(delay_ms=20, loss=0.01)
    output = await through(spread, "lossy.mp4")
    carried = spread.hosts.cable(delay_ms=20, loss=0.01)
    assert carried["lost"] > 0, carried
    assert difference(frames_of(spread.lab.folder / "two.mp4"), frames_of(output)) == 0


async def test_a_live_stream_over_it_accounts_for_every_frame(spread: Spread) -> None:
    spec = StreamSpec(source=FileSource(path="in.mp4"), prompt="neon", width=WIDTH, height=HEIGHT, fps=8, steps=1)
    async with Api(f"http://127.0.0.1:{PORT}") as api:
        view = await api.ended((await api.start(spec.model_copy(update={"deadline_ms": 5000}))).id)
    assert (view.state, view.ledger.closed) == ("stopped", view.ledger.frames_in), view
    assert view.ledger.frames_in in (FRAMES // 2, FRAMES // 2 + 1), "half the clip's rate"
    assert view.ledger.on_time + view.ledger.late > 0, view
