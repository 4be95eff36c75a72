"""What a host's cores do besides the forwards, learnt from workers' beats and the chunks that came by. Pure.

A worker's beat tells the CPU seconds that were used of its host's cores, by whomever, and those of its own forwards. The
rest is ingest, egress and the other services, the servers, and whatever else runs there. Of that rest

    cores = fixed + per_chunk * chunks a second + per_mpix * million pixels a second

is followed by a Kalman filter of these three numbers: what is seen with many streams and with few tells them apart, and
``fixed`` may change at any time (another program starts) while the others hardly do. Hosts are told apart by their ids.

The CPU seconds of forwards are steadier than the times that they take: these depend on who else wants a core just then. So
what a pipeline's forwards use on a host, for each unit of *work* that it does (latent tokens through a step, or through the
autoencoder), is remembered, and prices are corrected until they say the same (:meth:`HostMeter.correct`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from services.scheduler.pricing import Host, Priced
from shared.contracts.beats import Beat

WINDOW_S = 2.0  # one observation
GONE_S = 10.0  # a worker that has not been heard of for so long uses nothing
# Until it is measured: cores, CPU seconds a chunk and a million pixels; and how far off each may be.
PRIOR, SPREAD = (0.1, 0.012, 0.03), (0.1, 0.006, 0.03)
DRIFT_PER_S = (0.03, 2e-5, 1e-4)
NOISE = 0.05  # cores, of one observation
MOST_SIGMAS = 3.0  # one that is further off counts as this far: a moment of something else moves little
CROWDING, CROWDING_WEIGHT = 0.25, 0.1  # until measured, and how much each observation counts
FULL_ENOUGH = 0.3  # below this share of the cores in use nothing can be said about crowding
WORK_WEIGHT = 0.2  # of each observation of what a unit of work uses, once there are a few
MOST_CORRECTED = 2.0  # as a factor, either way; one observation counts no further off what is known, either
BUSY_ENOUGH = 0.05  # thread seconds a second, below which nothing was measured


@dataclass(slots=True)
class Rest:
    """The three numbers, and how sure they are: the covariance of the filter."""

    at: list[float] = field(default_factory=lambda: list(PRIOR))
    sure: list[list[float]] = field(
        default_factory=lambda: [[s * s if i == j else 0.0 for j in range(3)] for i, s in enumerate(SPREAD)]
    )

    def observe(self, cores: float, chunks_per_s: float, mpix_per_s: float, seconds: float) -> None:
        """So much was used during the last ``seconds``, with so much going on."""
        seen = (1.0, chunks_per_s, mpix_per_s)
        for i, drift in enumerate(DRIFT_PER_S):
            self.sure[i][i] += drift * drift * seconds
        gain = [sum(self.sure[i][j] * seen[j] for j in range(3)) for i in range(3)]
        variance = sum(gain[i] * seen[i] for i in range(3)) + NOISE * NOISE
        most = MOST_SIGMAS * variance**0.5
        off = max(-most, min(most, cores - sum(a * s for a, s in zip(self.at, seen, strict=True))))
        self.at = [max(0.0, a + g / variance * off) for a, g in zip(self.at, gain, strict=True)]
        self.sure = [[self.sure[i][j] - gain[i] * gain[j] / variance for j in range(3)] for i in range(3)]


@dataclass(slots=True)
class _Worker:
    beat: Beat  # at the start of the window
    since_s: float
    heard_s: float
    compute: float = 0.0  # cores, in the last window
    thread: float = 0.0
    closed: bool = False  # whether there was one


@dataclass(slots=True)
class _Use:
    """What one pipeline's forwards use of a host. ``blocks``: what its workers there held when this was learnt."""

    blocks: tuple[tuple[str, str, int, int], ...] = ()
    done: float = 0.0  # units of the pipeline's, as of the last observation
    per_work: float = 0.0  # CPU seconds
    observations: int = 0
    correction: float = 1.0

    def observe(self, cores: float, seconds: float, done: float) -> None:
        """So much was used for the work since the last time."""
        work, self.done = done - self.done, done
        if work <= 0 or cores < BUSY_ENOUGH:
            return
        seen = cores * seconds / work
        if self.observations > 1 / WORK_WEIGHT:
            seen = min(MOST_CORRECTED * self.per_work, max(self.per_work / MOST_CORRECTED, seen))
        self.observations += 1
        self.per_work += max(WORK_WEIGHT, 1.0 / self.observations) * (seen - self.per_work)


@dataclass(slots=True)
class _Machine:
    cores: float
    rest: Rest = field(default_factory=Rest)
    crowding: float = CROWDING
    used: float = 0.0  # cores, while forwards were measured
    chunks: float = 0.0  # of pipelines on it, since the last observation
    mpix: float = 0.0
    uses: dict[str, _Use] = field(default_factory=lambda: dict[str, _Use]())  # by pipeline


class HostMeter:
    """All hosts that workers told of. Times in seconds, monotonic."""

    def __init__(self) -> None:
        self._machines: dict[str, _Machine] = {}
        self._workers: dict[str, _Worker] = {}
        self._done: dict[str, float] = {}  # by pipeline: units of work

    def beat(self, beat: Beat, now_s: float) -> None:
        """A heartbeat; only workers' that tell of cores count."""
        if beat.service != "worker" or beat.cores <= 0 or not beat.host:
            return
        known = self._workers.get(beat.instance)
        fresh = known is None or known.beat.incarnation != beat.incarnation or known.beat.host != beat.host
        if known is None or fresh or not beat.ready or beat.host_busy_s < known.beat.host_busy_s:
            self._workers[beat.instance] = _Worker(beat, now_s, now_s)
            return
        machine = self._machines.setdefault(beat.host, _Machine(beat.cores))
        machine.cores, known.heard_s = beat.cores, now_s
        seconds = now_s - known.since_s
        if seconds < WINDOW_S:
            return
        before, known.beat, known.since_s = known.beat, beat, now_s
        known.compute = max(0.0, beat.compute_s - before.compute_s) / seconds
        known.thread = max(0.0, beat.thread_s - before.thread_s) / seconds
        known.closed = True
        here = {name: each for name, each in self._workers.items() if each.beat.host == beat.host}
        here = {name: each for name, each in here.items() if now_s - each.heard_s < GONE_S}
        if beat.instance == min(here):  # one of a host's workers tells for all
            used = min(machine.cores, (beat.host_busy_s - before.host_busy_s) / seconds)
            self._observe(machine, used, list(here.values()), seconds)

    def _observe(self, machine: _Machine, used: float, workers: list[_Worker], seconds: float) -> None:
        compute, thread = sum(each.compute for each in workers), sum(each.thread for each in workers)
        machine.rest.observe(max(0.0, used - compute), machine.chunks / seconds, machine.mpix / seconds, seconds)
        machine.chunks = machine.mpix = 0.0
        for pipeline in {each.beat.pipeline for each in workers}:
            mine = [each for each in workers if each.beat.pipeline == pipeline]
            self._use(machine, pipeline, mine).observe(
                sum(each.compute for each in mine) if all(each.closed for each in mine) else 0.0,
                seconds,
                self._done.get(pipeline, 0.0),
            )
        if thread < BUSY_ENOUGH:
            return
        machine.used = used
        if used >= FULL_ENOUGH * machine.cores and compute > 0:
            crowding = max(0.0, thread / compute - 1.0) * machine.cores / used
            machine.crowding += CROWDING_WEIGHT * (min(1.0, crowding) - machine.crowding)

    def _use(self, machine: _Machine, pipeline: str, workers: list[_Worker]) -> _Use:
        """Begun anew when a worker came or went, or DiT blocks changed hands."""
        beats = sorted((each.beat for each in workers), key=lambda beat: beat.instance)
        blocks = tuple((beat.instance, beat.incarnation, beat.first_block, beat.last_block) for beat in beats)
        use = machine.uses.get(pipeline)
        if use is None or use.blocks != blocks:
            use = machine.uses[pipeline] = _Use(blocks, self._done.get(pipeline, 0.0))
        return use

    def work(self, pipeline: str, units: float) -> None:
        """A pipeline has put so many latent tokens through a step, or through the autoencoder."""
        self._done[pipeline] = self._done.get(pipeline, 0.0) + units

    def correct(self, pipeline: str, priced: Mapping[str, Priced]) -> bool:
        """Correct prices to what forwards use: ``priced``, by host, is what a pipeline's streams take there in a second.

        Whether anything is another now. Where nothing is measured prices stay as they are: on a GPU's host, on a new one.
        """
        changed = False
        for name, promised in priced.items():
            machine = self._machines.get(name)
            use = machine.uses.get(pipeline) if machine is not None else None
            if use is None or min(promised.cores, promised.work, use.per_work) <= 0:
                continue
            factor = use.per_work * promised.work / promised.cores
            before, use.correction = use.correction, min(MOST_CORRECTED, max(1.0 / MOST_CORRECTED, factor))
            changed = changed or before != use.correction
        return changed

    def chunk(self, workers: Iterable[str], pixels: int) -> None:
        """A chunk of so many pixels came by on these workers' pipeline."""
        hosts = {known.beat.host for worker in workers if (known := self._workers.get(worker)) is not None}
        for name in hosts & self._machines.keys():
            self._machines[name].chunks += 1
            self._machines[name].mpix += pixels * 1e-6

    def hosts(self, workers: Iterable[str]) -> tuple[Host, ...]:
        """The hosts of a pipeline's workers, given by stage."""
        stages: dict[str, list[int]] = {}
        pipeline = ""
        for stage, worker in enumerate(workers):
            known = self._workers.get(worker)
            if known is not None and known.beat.host in self._machines:
                stages.setdefault(known.beat.host, []).append(stage)
                pipeline = known.beat.pipeline
        return tuple(self._host(name, pipeline, tuple(mine)) for name, mine in sorted(stages.items()))

    def _host(self, name: str, pipeline: str, stages: tuple[int, ...]) -> Host:
        machine = self._machines[name]
        fixed, per_chunk, per_mpix = machine.rest.at
        use = machine.uses.get(pipeline)
        crowding, correction = machine.crowding, use.correction if use is not None else 1.0
        return Host(name, machine.cores, stages, machine.used, crowding, fixed, per_chunk, per_mpix, correction)
