"""The cost models of all pipelines: begun with what is remembered and what workers measured, fed, and remembered again.

A worker that joins is known by its device's name. What was learnt of a device, model and size before is taken from the
session store; then its own calibration says how fast it is today. So a restart knows costs at once, and so does a new system.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from services.scheduler.cost_model import CostModel
from shared.contracts.beats import Beat
from shared.engine.plan.registry import model_spec
from shared.engine.plan.spec import SpecError
from shared.session.port import SessionStore, StoreError

log = logging.getLogger(__name__)


def key_of(role: str, stage: int) -> str:
    """The cost model's key of a worker's role."""
    return f"stage.{stage}" if role == "stage" else role


class CostBook:
    """One cost model per pipeline, kept by (device, model, size). ``models_dir`` is where model files are."""

    def __init__(self, store: SessionStore, models_dir: Path | None = None) -> None:
        self._store = store
        self._models_dir = models_dir
        self._models: dict[str, CostModel] = {}
        self._workers: dict[str, Beat] = {}  # by instance: the first beat of its present life, ready
        self._kept: dict[str, int] = {}  # by pipeline: the version of its model that is remembered

    def of(self, pipeline: str) -> CostModel:
        """The pipeline's cost model; empty until its first worker has joined."""
        return self._models.setdefault(pipeline, CostModel())

    async def beat(self, beat: Beat) -> None:
        """Take what a worker measured. The first beat of a life brings the calibration."""
        if beat.service != "worker" or not beat.pipeline or not beat.ready:
            return
        model = self.of(beat.pipeline)
        known = self._workers.get(beat.instance)
        if known is None or known.incarnation != beat.incarnation:
            self._workers[beat.instance] = beat
            await self._join(beat, model)
        for cost in beat.measured:
            model.observe(key_of(cost.role, beat.stage), cost.units, cost.ms, cost.items)

    async def save(self) -> None:
        """Remember what changed. A store that does not answer is tried again the next time."""
        for instance, beat in self._workers.items():
            model = self.of(beat.pipeline)
            if not beat.device or self._kept.get(instance) == model.version:
                continue
            place = self._place(beat)
            version, keys = model.version, self._keys(beat)
            learnt = {keys[key]: curve for key, curve in model.snapshot().items() if key in keys}
            try:
                # A place may have several workers, each with stages of its own.
                await self._store.put_costs(place, {**(await self._store.get_costs(place) or {}), **learnt})
            except StoreError as error:
                log.warning("what work costs on %s is not remembered: %s", instance, error)
                return
            self._kept[instance] = version

    async def _join(self, beat: Beat, model: CostModel) -> None:
        if beat.device:
            try:
                kept = await self._store.get_costs(self._place(beat)) or {}
                names = {name: key for key, name in self._keys(beat).items()}
                model.restore({names[name]: curve for name, curve in kept.items() if name in names})
            except (StoreError, ValueError) as error:
                log.warning("what work costs on %s is not known from before: %s", beat.instance, error)
        points: dict[str, list[tuple[int, float, float]]] = {}
        for cost in beat.calibration:
            points.setdefault(key_of(cost.role, beat.stage), []).append((cost.items, cost.units, cost.ms))
        for key, measured in points.items():
            model.seed(key, measured)

    def _place(self, beat: Beat) -> str:
        try:
            spec = model_spec(beat.model, self._models_dir)
            size = f"{spec.default_width}x{spec.default_height}"
        except SpecError:
            size = "?"
        return f"{beat.device}:{beat.model}:{size}"

    def _keys(self, beat: Beat) -> dict[str, str]:
        """The cost model's keys of this worker, and what they are called in the store: a stage by its part of the model."""
        part: Any = f"{beat.first_block}-{beat.last_block}" if beat.first_block >= 0 else f"{beat.stage}/{beat.stages}"
        names = {"encode": "encode", "decode": "decode", "stage": f"stage {part}"}
        return {key_of(role, beat.stage): names[role] for role in beat.roles if role in names}
