"""Admission for the service: from specs, beats and measured costs to demands, shapes and promises, and back to words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from services.scheduler.admission import Admission, Admitted, Rules, tiers_below
from services.scheduler.cost_model import CostModel
from services.scheduler.costs import key_of
from services.scheduler.fleet import Fleet, Pipeline
from services.scheduler.host_meter import HostMeter
from services.scheduler.messenger import RefusedError
from services.scheduler.placing import check_settings, fitting_pipelines
from services.scheduler.pricing import Demand, Shape
from services.scheduler.quotas import Tenants
from services.scheduler.records import StreamRecord
from services.scheduler.settings import Settings
from services.scheduler.settled import Settled
from shared.clock import Clock
from shared.contracts.commands import Mode
from shared.contracts.tiers import CapacityAsked, CapacityTold, Promise, Tier, TierCapacity
from shared.engine.plan.registry import model_spec
from shared.engine.plan.spec import ModelSpec, SpecError

LEAST_MIN_FPS = 4.0
SHOWN_TIERS = 8


class Admitting:
    """Keeps the books of the pipelines that the fleet has. ``costs_of`` gives a pipeline's cost model."""

    def __init__(self, settings: Settings, fleet: Fleet, clock: Clock, costs_of: Callable[[str], CostModel]) -> None:
        self._settings = settings
        self._fleet = fleet
        self._clock = clock
        self.costs_of = costs_of
        self.meter = HostMeter()
        rules = Rules(
            settings.target_load, settings.max_streams, settings.unmeasured_streams, priced=settings.admission
        )
        self.admission = Admission(rules, Tenants(settings.tenant_default, dict(settings.tenants)))

    def admit(self, record: StreamRecord, model: ModelSpec, fitting: Sequence[Pipeline]) -> Pipeline:
        """The pipeline that takes a new stream; its room is reserved until :meth:`leave`. Raises RefusedError."""
        self.refresh(fitting)
        decided = self.admission.admit(
            record.stream, record.spec.tenant, demand_of(record, model), [each.name for each in fitting], self._now()
        )
        if not isinstance(decided, Admitted):
            tier = None if decided.tier is None else tier_of(decided.tier)
            raise RefusedError(decided.reason, decided.retry_after_s, decided.refusal, tier)
        record.demand = decided.demand
        tier = tier_of(decided.demand)
        record.promise = Promise(fps=tier.fps, latency_ms=round(decided.latency_ms, 1), tier=tier)
        return next(each for each in fitting if each.name == decided.pipeline)

    def check_resize(self, record: StreamRecord, model: ModelSpec, width: int, height: int) -> None:
        """Whether there is room for a stream at another size. Raises RefusedError with the reason."""
        asked = record.wish.asked if record.wish is not None else demand_of(record, model)
        demand = replace(asked, width=width, height=height, tokens=model.tokens(width, height))
        decided = self.admission.resized(record.stream, demand, self._now())
        if not isinstance(decided, Admitted):
            line = f"{decided.reason}; the stream goes on at {record.width}×{record.height}"
            raise RefusedError(line, decided.retry_after_s, decided.refusal)

    def resized(self, record: StreamRecord, demand: Demand) -> None:
        """A stream has another size: that is what it was promised now."""
        self.admission.change(record.stream, demand)
        latency_ms = self.admission.latency_ms(record.pipeline, demand)
        record.demand, tier = demand, tier_of(demand)
        record.promise = Promise(fps=tier.fps, latency_ms=round(latency_ms, 1), tier=tier)

    def leave(self, stream: str) -> None:
        """A stream is gone."""
        self.admission.leave(stream, self._now())

    def follow(self) -> None:
        """Books follow the fleet; those of pipelines that are gone are closed when the last stream has left."""
        there = self._fleet.pipelines()
        self.refresh(there)
        names = {each.name for each in there}
        for name, book in list(self.admission.books.items()):
            if name not in names and not book.streams:
                del self.admission.books[name], self.admission.loads[name]

    def refresh(self, pipelines: Sequence[Pipeline]) -> None:
        """Books follow the fleet: pipelines that are new, or whose workers or costs have changed.

        Prices of this very moment are corrected: what costs have moved since the last time is no news of CPU seconds.
        """
        for pipeline in pipelines:
            costs = Settled(self.costs_of(pipeline.name))
            book = self.admission.pipeline(pipeline.name, self._shape(pipeline), costs)
            if book.shape.hosts and self.meter.correct(pipeline.name, book.forwards()):
                self.admission.pipeline(pipeline.name, self._shape(pipeline), costs)

    def capacity(self, asked: CapacityAsked) -> CapacityTold:
        """How many more streams like this, and of lower tiers, would be let in now."""
        try:
            model = model_spec(asked.model, self._settings.models_dir)
            check_settings(model, asked.steps, asked.frames_per_block)
            fitting = fitting_pipelines(self._fleet, asked.model)
            demand = _demand_asked(asked, model)
        except SpecError as error:
            return CapacityTold(model=asked.model, error=str(error))
        except RefusedError as error:
            why, again = error.refusal, error.retry_after_s
            return CapacityTold(model=asked.model, error=str(error), refusal=why, retry_after_s=again)
        self.refresh(fitting)
        names = [each.name for each in fitting]
        admission, now = self.admission, self._now()
        rows: list[TierCapacity] = []
        for tier in [demand, *tiers_below(demand)][:SHOWN_TIERS]:
            best = min(names, key=lambda name: (admission.loads[name], name))
            rows.append(
                TierCapacity(
                    tier=tier_of(tier),
                    more=admission.capacity(asked.tenant, tier, names, now),
                    latency_ms=round(admission.latency_ms(best, tier), 1),
                    load=round(admission.books[best].load(tier) - admission.loads[best], 4),
                )
            )
        return CapacityTold(
            model=asked.model,
            streams=sum(admission.books[name].streams for name in names),
            pipelines=len(names),
            load=round(sum(admission.loads[name] for name in names), 4),
            target=round(admission.rules.target * len(names), 4),
            known=all(admission.books[name].known() for name in names),
            tiers=tuple(rows),
        )

    def _shape(self, pipeline: Pipeline) -> Shape:
        """Which worker does what, with which cores."""
        beats = [self._fleet.members[worker].beat for worker in pipeline.workers]
        encode = next((stage for stage, beat in enumerate(beats) if "encode" in beat.roles), 0)
        decode = next((stage for stage, beat in enumerate(beats) if "decode" in beat.roles), pipeline.stages - 1)
        wide_from: dict[str, int] = {}
        for stage, beat in enumerate(beats):
            wide_from |= {key_of(role, stage): units for role, units in beat.wide_from.items()}
        return Shape(
            pipeline.stages,
            encode,
            decode,
            self._settings.max_batch,
            self.meter.hosts(pipeline.workers),
            tuple(beat.threads for beat in beats),
            wide_from,
        )

    def _now(self) -> float:
        return self._clock.monotonic()


def demand_of(record: StreamRecord, model: ModelSpec) -> Demand:
    """What a stream asks for. A source whose rate nobody knows yet is taken for one of the model's."""
    spec = record.spec
    fps = spec.fps or record.fps_seen or float(model.default_fps)
    return Demand(
        width=record.width,
        height=record.height,
        tokens=model.tokens(record.width, record.height),
        fps=fps,
        steps=spec.steps,
        frames_per_block=spec.frames_per_block,
        deadline_ms=float(spec.deadline_ms),
        live=spec.mode is Mode.LIVE,
        min_steps=min(spec.min_steps, spec.steps),
        min_fps=min(fps, spec.min_fps or max(LEAST_MIN_FPS, fps / 2)),
    )


def tier_of(demand: Demand) -> Tier:
    """A demand in the words of the contract."""
    return Tier(
        steps=demand.steps,
        fps=round(demand.fps, 3),
        width=demand.width,
        height=demand.height,
        frames_per_block=demand.frames_per_block,
    )


def _demand_asked(asked: CapacityAsked, model: ModelSpec) -> Demand:
    width, height = asked.width or model.default_width, asked.height or model.default_height
    fps = asked.fps or float(model.default_fps)
    return Demand(
        width=width,
        height=height,
        tokens=model.tokens(width, height),
        fps=fps,
        steps=asked.steps or min(2, model.max_steps),
        frames_per_block=asked.frames_per_block or 1,
        deadline_ms=float(asked.deadline_ms),
        min_fps=min(fps, max(LEAST_MIN_FPS, fps / 2)),
    )
