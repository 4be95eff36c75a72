"""What a host does besides the forwards is learnt by host, and told apart by how much of it comes with the streams."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.scheduler.host_meter import CROWDING, PRIOR, HostMeter
from services.scheduler.pricing import Priced
from services.worker.core import Job, JobQueue, Rank
from services.worker.hands import Hands
from services.worker.threads import Threads
from shared.contracts.beats import Beat
from shared.cores import Cores

CHUNK_PIXELS = 4 * 160 * 96


class Machine:
    """A host with a worker whose forwards take ``compute`` cores, and ``rest(chunks a second)`` by everything else."""

    def __init__(self, meter: HostMeter, name: str = "here", worker: str = "w0") -> None:
        self.meter, self.name, self.worker = meter, name, worker
        self.now = self.busy = self.compute = self.thread = 0.0
        self.pipeline, self.blocks = "p0", (0, 5)

    def run(self, seconds: float, chunks: float, rest: float, compute: float = 0.5, stretched: float = 1.0) -> None:
        for _ in range(int(seconds * 2)):
            self.now += 0.5
            self.busy += 0.5 * (rest + compute)
            self.compute += 0.5 * compute
            self.thread += 0.5 * compute * stretched
            for _ in range(round(0.5 * chunks)):
                self.meter.chunk((self.worker,), CHUNK_PIXELS)
                self.meter.work(self.pipeline, UNITS)
            self.beat()

    def beat(self, **changes: object) -> None:
        told = Beat(
            service="worker",
            instance=self.worker,
            incarnation="1",
            host=self.name,
            pipeline=self.pipeline,
            first_block=self.blocks[0],
            last_block=self.blocks[1],
            cores=2.0,
            host_busy_s=self.busy,
            compute_s=self.compute,
            thread_s=self.thread,
        )
        self.meter.beat(told.model_copy(update=changes), self.now)


def test_what_comes_with_streams_is_told_from_what_is_always_there() -> None:
    here = Machine(HostMeter())
    for chunks in (4.0, 20.0, 10.0, 24.0):
        here.run(20, chunks, 0.2 + 0.02 * chunks)
    (host,) = here.meter.hosts(("w0",))
    mpix = CHUNK_PIXELS * 1e-6
    assert host.fixed == pytest.approx(0.2, abs=0.03)
    assert host.per_chunk + host.per_mpix * mpix == pytest.approx(0.02, rel=0.1)
    here.run(30, 24.0, 0.2 + 0.5 + 0.02 * 24)
    (later,) = here.meter.hosts(("w0",))
    assert later.fixed == pytest.approx(0.7, abs=0.1), "another program has begun"
    assert later.per_chunk == pytest.approx(host.per_chunk, rel=0.2), "and streams cost what they cost"


def test_a_moment_of_something_else_moves_little() -> None:
    here = Machine(HostMeter())
    here.run(20, 10.0, 0.3)
    (before,) = here.meter.hosts(("w0",))
    here.run(2, 10.0, 1.4)
    (after,) = here.meter.hosts(("w0",))
    assert after.fixed - before.fixed < 0.25


UNITS = 180  # of work, for each chunk


def test_prices_are_corrected_to_what_forwards_use() -> None:
    here = Machine(HostMeter())

    def corrected(cores: float, chunks: float) -> float:
        here.meter.correct("p0", {"here": Priced(cores, UNITS * chunks), "elsewhere": Priced(1.0, 1.0)})
        (host,) = here.meter.hosts(("w0",))
        return host.correction * cores

    here.run(4, 20.0, 0.4, compute=0.9)
    for _ in range(20):
        here.run(2, 20.0, 0.4, compute=0.9)
    assert corrected(0.75, 20.0) == pytest.approx(0.9, rel=0.02)
    for price in (0.6, 1.2, 0.8):  # forwards take longer or shorter by the clock, with as many CPU seconds
        assert corrected(price, 20.0) == pytest.approx(0.9, rel=0.02)
    assert corrected(2.0, 40.0) == pytest.approx(1.8, rel=0.02), "many have just been let in, and are not there yet"
    for _ in range(10):  # half of them are paused, or have less than they were promised: less is done, and less used
        here.run(2, 10.0, 0.4, compute=0.45)
    assert corrected(0.75, 20.0) == pytest.approx(0.9, rel=0.02)
    for _ in range(30):
        here.run(2, 20.0, 0.4, compute=1.2)
    assert corrected(0.75, 20.0) == pytest.approx(1.2, rel=0.02), "instructions have become slower"
    assert corrected(0.1, 20.0) == pytest.approx(0.2), "not more than by half or twice"
    here.run(4, 0.0, 0.4, compute=0.0)
    assert corrected(0.75, 20.0) == pytest.approx(1.2, rel=0.02), "nothing is done, and nothing learnt"
    assert not here.meter.correct("p0", {"here": Priced()}), "nobody is let in"


def test_one_window_of_something_else_corrects_little() -> None:
    here = Machine(HostMeter())
    here.run(60, 20.0, 0.4, compute=0.9)
    here.run(2, 2.0, 0.4, compute=1.6)  # weights are loaded, say
    here.meter.correct("p0", {"here": Priced(0.9, UNITS * 20.0)})
    (host,) = here.meter.hosts(("w0",))
    assert 0.98 < host.correction < 1.25


def test_a_pipeline_is_corrected_by_what_it_uses_itself() -> None:
    meter = HostMeter()
    ours, theirs = Machine(meter, "host", "w0"), Machine(meter, "host", "w1")
    theirs.pipeline = "p1"  # a GPU's: it does a lot and uses no core
    for _ in range(20):
        ours.run(2, 10.0, 0.1, compute=0.5)
        theirs.run(2, 100.0, 0.1, compute=0.0)
    meter.correct("p0", {"host": Priced(0.4, UNITS * 10.0)})
    meter.correct("p1", {"host": Priced(0.0, UNITS * 100.0)})
    (first,), (second,) = meter.hosts(("w0",)), meter.hosts(("w1",))
    assert first.correction == pytest.approx(1.25, rel=0.05)
    assert second.correction == 1.0


def test_blocks_that_changed_hands_are_learnt_anew() -> None:
    here = Machine(HostMeter())
    here.run(20, 20.0, 0.4, compute=0.9)
    assert here.meter.correct("p0", {"here": Priced(0.75, UNITS * 20.0)})
    here.blocks = (0, 2)
    here.run(4, 0.0, 0.4, compute=0.0)
    assert not here.meter.correct("p0", {"here": Priced(0.75, UNITS * 20.0)}), "half of the blocks: nobody knows"
    (host,) = here.meter.hosts(("w0",))
    assert host.correction == 1.0


def test_hosts_are_not_mixed_up_and_who_tells_nothing_has_none() -> None:
    meter = HostMeter()
    busy, idle = Machine(meter, "busy", "w0"), Machine(meter, "idle", "w1")
    for _ in range(20):
        busy.run(1, 8.0, 1.2)
        idle.run(1, 8.0, 0.1)
    first, second = meter.hosts(("w0", "w1"))
    assert (first.name, first.stages, second.name, second.stages) == ("busy", (0,), "idle", (1,))
    assert first.fixed > 0.9 > 0.2 > second.fixed
    assert meter.hosts(("unknown",)) == ()
    meter.beat(Beat(service="worker", instance="w2", incarnation="1"), 1.0)
    assert meter.hosts(("w2",)) == ()


def test_two_workers_of_a_host_are_both_left_out_of_the_rest() -> None:
    meter = HostMeter()
    first, second = Machine(meter, worker="w0"), Machine(meter, worker="w1")
    for _ in range(40):  # the same host: what it does is what both tell
        for each in (first, second):
            each.now += 0.5
            each.busy += 0.5 * (0.3 + 0.4 + 0.6)
        first.compute += 0.5 * 0.4
        second.compute += 0.5 * 0.6
        for each in (first, second):
            each.beat()
    (host,) = meter.hosts(("w0", "w1"))
    assert host.fixed == pytest.approx(0.3, abs=0.05)


def test_crowding_is_what_forwards_wait_for_cores() -> None:
    here = Machine(HostMeter())
    here.run(60, 10.0, 0.6, compute=1.0, stretched=1.4)
    (host,) = here.meter.hosts(("w0",))
    assert host.used == pytest.approx(1.6)
    assert host.stretch(1.6) == pytest.approx(1.4, abs=0.02)
    quiet = Machine(HostMeter())
    quiet.run(20, 1.0, 0.1, compute=0.2, stretched=3.0)
    assert quiet.meter.hosts(("w0",))[0].crowding == CROWDING, "nearly idle cores tell nothing"


def test_a_worker_that_was_started_again_counts_anew() -> None:
    here = Machine(HostMeter())
    here.run(20, 0.0, 0.1)
    here.beat(incarnation="2", host_busy_s=0.0, compute_s=0.0)
    here.busy = here.compute = here.thread = 0.0
    here.beat(incarnation="2")
    (host,) = here.meter.hosts(("w0",))
    assert host.fixed == pytest.approx(0.1, abs=0.03)
    assert PRIOR[0] > 0


def test_cores_are_the_machines_or_the_containers(tmp_path: Path) -> None:
    boot = tmp_path / "boot_id"
    boot.write_text("abc\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    limited = Cores(boot, tmp_path)
    assert (limited.count, limited.busy_s()) == (0.5, 2.5)
    assert limited.host.startswith("abc-")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    free = Cores(boot, tmp_path)
    assert free.host == "abc"
    assert free.count >= 1
    assert free.busy_s() > 0
    assert Cores(tmp_path / "none", tmp_path).host


def test_small_forwards_have_one_thread_and_large_ones_all_unless_cores_are_crowded() -> None:
    threads = Threads(2)
    assert threads.count("stage", 60) == 2, "nothing is known yet"
    threads.learn("stage", 240, 0.060, 0.040)
    threads.learn("encode", 240, 0.006, 0.0055)
    assert (threads.count("stage", 60), threads.count("stage", 240)) == (1, 2)
    assert (threads.count("encode", 240), threads.count("encode", 480)) == (1, 2), "no gain was measured"
    assert threads.wide_from == {"stage": 240, "encode": 480}
    threads.is_crowded(0.8)
    assert threads.count("stage", 240) == 1
    threads.is_crowded(0.1)
    run, shares = threads.within("stage", 240, lambda: 3)
    assert (run(), shares) == (3, False)
    assert threads.used_s > 0
    threads.assume(300)
    assert threads.wide_from == {"stage": 300, "encode": 300}
    assert Threads(1).within("stage", 240, lambda: 4)[1]


def test_a_second_hand_helps_with_what_may_run_beside_the_first() -> None:
    jobs: JobQueue[str] = JobQueue()
    hands = Hands(jobs, 2)

    def put(rank: Rank, name: str, deadline: int, shares: bool = True) -> None:
        jobs.put(Job(rank, deadline, deadline, name, shares))

    def begin(hand: int) -> str | None:
        job = hands.begin(hand)
        return None if job is None else job.work

    put(Rank.STAGE, "batch 1", 1)
    put(Rank.STAGE, "batch 2", 2)
    put(Rank.DECODE, "picture 1", 3)
    put(Rank.DECODE, "picture 2", 4)
    assert begin(1) is None, "the first hand begins"
    assert (begin(0), begin(1)) == ("batch 1", "picture 1"), "not two batches: a stream's caches bear one at a time"
    hands.end(1)
    assert begin(1) == "picture 2"
    hands.end(0)
    put(Rank.CONTROL, "close", 0, shares=False)
    assert begin(0) is None, "what runs alone is next, so nothing begins beside the picture"
    hands.end(1)
    assert (begin(1), begin(0)) == (None, "close")
    assert begin(1) is None
    hands.end(0)
    assert begin(0) == "batch 2"
    put(Rank.ENCODE, "large", 9, shares=False)
    assert begin(1) is None
    hands.end(0)
    assert begin(0) == "large"
