"""The cost model: how long a role's forward will take, learnt online from what forwards took. Never a constant.

Each key (``stage.0``, ``encode``, ``decode``) has a *curve* over shapes (items B, units = latent tokens in the forward; T and
the size are in the units). A shape that was measured a few times has a *cell*: the middle of its newest times. Other
shapes follow the line ``fixed + per_item·B + per_unit·units`` through the cells, each part at least 0, relative errors
weighed. All of it is multiplied by the curve's *speed*, which follows the device:

* a measurement waits in a window of the newest five before it enters its cell. One stall is one of five and moves no
  median; four of five off by a fifth in one direction are a change of the device: the speed takes the jump at once, and
  with it every shape, those not seen since included;
* smaller drifts move the speed by at most half a percent a measurement. Promises use the median of the newest speeds
  (``settled.py``);
* cells follow what they measure, so a change may end up in levels as well as in the speed, and not come back the same way.
  Each cell keeps the *reference* level of its calibration, or first measurements, and at every measurement hands a part of
  what it leans to one side of it over to the speed. So a shape that nobody runs any more costs what it did, times what the
  others do.

The window of keys that an item attends to is full but for a stream's first chunks, which cost less than predicted.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from typing import Any

from services.scheduler.cost_line import Line, Point, fit
from services.scheduler.running_median import RunningMedian

MIN_OBSERVATIONS = 3  # of a key before it predicts, of a shape before it has its own level: no single stall makes it
WINDOW = 5
AGREE = 4  # of the window: a change; two stalls in a row are none
JUMP = math.log(1.2)
DRIFT, MAX_DRIFT = 0.05, 0.1
SETTLING = 16  # measurements whose median speed promises are made by
LEVELS = 9  # measurements that a cell's level is the middle of
LEVEL = 0.98  # a cell that leans less is let be
LEAN = 0.03  # of what a cell leans to one side of its reference, handed over to the speed at every measurement
MAX_CELLS = 64
MATERIAL = 0.01  # a change of a prediction below 1 % is not worth planning anew for
ERRORS = 64
FIRST_ERRORS = 8
ASSUMED_ERROR = 0.2  # of a key with few measurements
MIN_MS = 1e-3
ENCODE = "encode"


@dataclass(slots=True)
class _Cell:
    """One shape: its newest times at speed 1, and the level that predictions use."""

    times: deque[float] = field(default_factory=lambda: deque[float]())
    ordered: list[float] = field(default_factory=list[float])  # the same, the shortest first
    level: float = 0.0
    reference: float = 0.0  # the level of its first measurements
    given: bool = False  # the reference is a calibration's, or remembered: no measurement changes it

    def fill(self, ms: float, times: int) -> None:
        """The same time, so many times over."""
        for _ in range(times):
            self.add(ms)

    def add(self, ms: float) -> bool:
        """Whether the level moved materially."""
        times, ordered = self.times, self.ordered
        times.append(ms)
        insort(ordered, ms)
        if len(times) > LEVELS:
            del ordered[bisect_left(ordered, times.popleft())]
        level = _middle(ordered)
        if abs(level - self.level) <= MATERIAL * self.level:
            return False
        self.level = level
        return True

    def scale(self, factor: float) -> None:
        """The same times, told at another speed."""
        self.times = deque(ms * factor for ms in self.times)
        self.ordered = [ms * factor for ms in self.ordered]
        self.level *= factor


def middle(values: Iterable[float]) -> float:
    """The mean without the largest and the smallest quarter (at least one each of three): neither stalls nor parity rule it."""
    return _middle(sorted(values))


def _middle(ordered: list[float]) -> float:
    count = len(ordered)
    cut = max(1, count // 4) if count > 2 else 0
    kept = ordered[cut : count - cut]
    return sum(kept) / len(kept)


class Curve:
    """One key's times by shape (items, units)."""

    def __init__(self) -> None:
        self.count = 0
        self.version = 0  # changes whenever a prediction did by more than 1 %
        self._speed = 1.0
        self._told_speed = 1.0
        self._cells: dict[Point, _Cell] = {}
        self._line: Line | None = None
        self._window: deque[tuple[Point, float, float]] = deque()
        self._errors: deque[float] = deque(maxlen=ERRORS)
        self._speeds = RunningMedian(SETTLING)
        self._bases: dict[Point, float] = {}

    @property
    def known(self) -> bool:
        """Whether there is enough to predict from."""
        return self.count >= MIN_OBSERVATIONS

    @property
    def knows_batches(self) -> bool:
        """Whether forwards of different numbers of items were measured, so that their gain can be told."""
        return len({items for (items, _), cell in self._cells.items() if len(cell.times) >= MIN_OBSERVATIONS}) > 1

    def predict(self, items: int, units: float) -> float:
        """Expected milliseconds."""
        shape = (items, units)
        base = self._bases.get(shape)
        if base is None:
            cell = self._cells.get(shape)
            if cell is not None and len(cell.times) >= MIN_OBSERVATIONS:
                base = cell.level
            else:
                if self._line is None:
                    self._line = fit([(at, cell.level, len(cell.times)) for at, cell in self._cells.items()])
                base = self._line.at(items, units)
            self._bases[shape] = base
        return base * self._told_speed

    def observe(self, items: int, units: float, ms: float) -> None:
        """One measurement."""
        ms = max(ms, MIN_MS)
        shape = (items, units)
        self.count += 1
        expected = self.predict(items, units) if self.count > MIN_OBSERVATIONS else 0.0
        if expected <= 0.0:
            self._enter(shape, ms)
            return
        ratio = ms / expected
        residual = math.log(ratio)
        self._errors.append(abs(ratio - 1.0))
        self._window.append((shape, ms, residual))
        if -JUMP <= residual <= JUMP or not (shift := self._change()):
            drift = MAX_DRIFT if residual > MAX_DRIFT else -MAX_DRIFT if residual < -MAX_DRIFT else residual
            speed = self._speed = self._speed * math.exp(DRIFT * drift)
            told = self._told_speed
            if not -MATERIAL * told <= speed - told <= MATERIAL * told:
                self._tell()
        else:
            self.scale(math.exp(shift))
        self._speeds.add(self._speed)
        cell = self._cells.get(shape)
        if cell is None or len(cell.times) < MIN_OBSERVATIONS:  # a new shape: its line is all there is to compare with
            self._window.pop() if self._window else None
            self._enter(shape, ms)
        if len(self._window) > WINDOW:
            oldest, took, _ = self._window.popleft()
            self._enter(oldest, took)

    def seed(self, points: Iterable[tuple[int, float, float]]) -> None:
        """Measurements (items, units, ms) that are medians already, of this device as it is now: a calibration."""
        points = [(items, units, max(ms, MIN_MS)) for items, units, ms in points if units > 0 and ms > 0]
        if self.known and points:
            self.rescale(math.exp(median(math.log(ms / self.predict(items, units)) for items, units, ms in points)))
        for items, units, ms in points:
            cell = self._cell((items, units))
            cell.fill(ms / self._speed, MIN_OBSERVATIONS)
            cell.level = cell.reference = _middle(cell.ordered)
            cell.given = True
            self.count += MIN_OBSERVATIONS
        self._changed()

    def scale(self, factor: float) -> None:
        """From now on everything takes ``factor`` times as long."""
        self._speed *= factor
        self._window = deque((shape, ms, 0.0) for shape, ms, _ in self._window)
        self._tell()

    def rescale(self, factor: float) -> None:
        """The same, known for certain: it has settled at once."""
        self.scale(factor)
        self._speeds.clear()

    def settled(self) -> float:
        """The median speed of the newest measurements over the present one."""
        return self._speeds.value(self._told_speed) / self._told_speed

    def error(self) -> float:
        """The relative error of nine predictions in ten is at most this."""
        errors = sorted([*self._errors, *[ASSUMED_ERROR] * (FIRST_ERRORS - len(self._errors))])
        return errors[math.ceil(0.9 * len(errors)) - 1]

    def snapshot(self) -> dict[str, Any]:
        """Plain values."""
        cells = [[items, units, cell.level, len(cell.times)] for (items, units), cell in self._cells.items()]
        return {"speed": self._speed, "cells": cells, "errors": list(islice(self._errors, FIRST_ERRORS))}

    @classmethod
    def from_snapshot(cls, plain: Mapping[str, Any]) -> Curve:
        """The inverse of :meth:`snapshot`. Raises ValueError for what is none."""
        curve = cls()
        try:
            curve._speed = curve._told_speed = float(plain["speed"])
            for items, units, level, count in plain["cells"]:
                cell = curve._cell((int(items), float(units)))
                cell.fill(float(level), min(int(count), MIN_OBSERVATIONS))
                cell.level = cell.reference = float(level)
                cell.given = True
                curve.count += len(cell.times)
            curve._errors.extend(float(error) for error in plain["errors"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the snapshot of a cost curve: {error!r}") from error
        numbers = [curve._speed, *(cell.level for cell in curve._cells.values())]
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ValueError("not the snapshot of a cost curve: a speed or a level is no positive number")
        return curve

    def _change(self) -> float:
        """The logarithm of the device's new speed against the old one when the window agrees on it, else 0."""
        newest = [residual for _, _, residual in islice(reversed(self._window), WINDOW)]
        for sign in (1.0, -1.0):
            agreeing = [residual for residual in newest if sign * residual > JUMP]
            if len(agreeing) >= AGREE:
                return median(agreeing)
        return 0.0

    def _cell(self, shape: Point) -> _Cell:
        cell = self._cells.get(shape)
        if cell is None:
            if len(self._cells) >= MAX_CELLS:
                del self._cells[min(self._cells, key=lambda at: len(self._cells[at].times))]
            cell = self._cells[shape] = _Cell()
        return cell

    def _enter(self, shape: Point, ms: float) -> None:
        cell = self._cell(shape)
        if cell.add(ms / self._speed) or len(cell.times) == MIN_OBSERVATIONS:
            self._changed()
        if len(cell.times) < LEVELS:
            if not cell.given:  # of a few measurements no reference is made
                cell.reference = cell.level
        elif not LEVEL <= (ratio := cell.level / cell.reference) <= 1.0 / LEVEL:
            share = ratio**LEAN
            cell.scale(1.0 / share)
            self._speed *= share
            self._speeds.scale(share)  # told as if it had been so all the time: this cell costs what it did
            self._bases.pop(shape, None)
            before = self._told_speed
            self._tell()
            if self._told_speed != before:
                self._bases.clear()
                self._line = None

    def _tell(self) -> None:
        if abs(self._speed - self._told_speed) > MATERIAL * self._told_speed:
            self._told_speed = self._speed
            self.version += 1

    def _changed(self) -> None:
        self._bases.clear()
        self._line = None
        self.version += 1


class CostModel:
    """Predicted milliseconds by key. A key nobody has measured enough costs 0: optimism admits, measurement corrects."""

    def __init__(self) -> None:
        self.version = 0  # changes whenever a prediction did by more than 1 %
        self.order_version = 0  # the same of what the order of works depends on: all but encoding, which is behind them
        self._curves: dict[str, Curve] = {}

    def observe(self, key: str, units: float, ms: float, items: int = 1) -> None:
        """One measurement: a forward of ``items`` items with ``units`` latent tokens in all took ``ms`` milliseconds."""
        if units > 0 and items > 0 and 0 <= ms < math.inf:
            curve = self._curves.get(key)
            if curve is None:
                curve = self._curves[key] = Curve()
            before = curve.version
            curve.observe(items, units, ms)
            if curve.version != before:
                self._changed(key)

    def predict(self, key: str, units: float, items: int = 1) -> float:
        """Expected milliseconds of a forward of ``items`` items with ``units`` latent tokens in all."""
        curve = self._curves.get(key)
        return curve.predict(items, units) if curve is not None and curve.count >= MIN_OBSERVATIONS else 0.0

    def settled(self, key: str) -> float:
        """What predictions are multiplied by to have them at the speed of the newest measurements together."""
        curve = self._curves.get(key)
        return curve.settled() if curve is not None else 1.0

    def known(self, key: str) -> bool:
        """Whether enough has been measured to predict."""
        curve = self._curves.get(key)
        return curve is not None and curve.known

    def knows_batches(self, key: str) -> bool:
        """Whether forwards of different numbers of items were measured, so that what sharing one gains is known."""
        curve = self._curves.get(key)
        return curve is not None and curve.knows_batches

    def error(self, key: str) -> float:
        """The model's own error: nine predictions in ten were off by at most this share. Few measurements: a fifth."""
        curve = self._curves.get(key)
        return curve.error() if curve is not None else ASSUMED_ERROR

    def errors(self) -> dict[str, float]:
        """The error of every kind of work that was measured, by its key."""
        return {key: curve.error() for key, curve in self._curves.items()}

    def seed(self, key: str, points: Iterable[tuple[int, float, float]]) -> None:
        """A calibration: (items, units, ms), each a median. Shapes known from before follow the speed it shows."""
        self._curves.setdefault(key, Curve()).seed(points)
        self._changed(key)

    def scale(self, key: str, factor: float) -> None:
        """What the key stands for became ``factor`` times as much: DiT blocks moved, for instance."""
        if factor <= 0 or not math.isfinite(factor):
            raise ValueError(f"costs cannot be scaled by {factor}: a positive number is needed")
        if (curve := self._curves.get(key)) is not None:
            curve.rescale(factor)
            self._changed(key)

    def snapshot(self) -> dict[str, Any]:
        """Everything that was learnt, as plain values."""
        return {key: curve.snapshot() for key, curve in self._curves.items() if curve.known}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Take what a former model knew, for keys that this one has not measured enough. Raises ValueError on nonsense."""
        curves = {key: Curve.from_snapshot(plain) for key, plain in snapshot.items() if not self.known(key)}
        self._curves.update(curves)
        for key in curves:
            self._changed(key)

    def _changed(self, key: str) -> None:
        self.version += 1
        self.order_version += key != ENCODE
