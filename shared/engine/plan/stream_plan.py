"""One stream's plan: which item comes next, into which slot, after which slot operations. Pure and synchronous.

The plan is told what enters (:meth:`StreamPlan.enter`), what is scheduled next (:meth:`StreamPlan.next`) and what came
back (:meth:`StreamPlan.done`). It answers with items and refuses what the rules forbid:

* a block's step k is scheduled after its step k−1 is done;
* what touches a slot is scheduled in ascending order of blocks. "Scheduled" is enough, because stages execute batches
  in sequence. So ask :meth:`can_enter` and :meth:`can_next` for *all* candidates of a batch before binding any of them:
  what one call binds may free a slot for a later batch, never for the same one;
* the first block is alone: nothing enters before its last step is scheduled. Each of its steps resets slot 0, and step 0
  of the next block forks slot 0 into the slots 1…K−1;
* a slot k that the block before did not use is stale. It is forked from slot k−1 immediately before (b, k−1) is
  written, so that it holds the blocks up to b−1 and then takes b. This is K up, and also K up again after K down.

Everything about a block, its slot operations included, is bound when it enters and depends only on the blocks before
it, never on when their steps run.

Re-cache (after a prompt change): a block may take its window along. Each of its steps empties its slot, once what has to be
forked from it has been, and runs the newest ring − T frames again before its own. They follow one another, sinks
included: the oldest of them are the new sinks.

RoPE. Start frames count the latent frames that entered since the slots were empty. A start that would reach
``rope_refresh_at`` becomes ring − 1. With ``rerotate`` the cached keys move along: the shift rides with the first block
after the refresh at *every* of its steps, since each slot still serves older blocks at old positions until then.

A lost pipeline (:meth:`StreamPlan.reset`): the next block is a first block again, of whatever length comes, and starts
at RoPE frame 0, because nothing is cached that it could be relative to. Block numbers and ``first_latent`` go on: a
late answer can never be taken for a new block's, and noise does not repeat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from shared.engine.plan.items import Item, SlotOp, SlotOpKind

Script = tuple[tuple[int, tuple[SlotOp, ...]], ...]
"""Per step: the slot and the operations before it."""


class RingShape(Protocol):
    """What a plan must know of the model; :class:`shared.engine.plan.spec.ModelSpec` has it."""

    @property
    def ring(self) -> int: ...
    @property
    def sinks(self) -> int: ...
    @property
    def rope_refresh_at(self) -> int: ...
    @property
    def rerotate(self) -> bool: ...


class PlanPhase(StrEnum):
    """Where a stream is: nothing cached, its first block alone, or rolling."""

    EMPTY = "empty"
    FIRST = "first"
    ROLLING = "rolling"


class IllegalPlanMoveError(RuntimeError):
    """A move that the plan's state forbids; the message names the move."""


_PHASE_MOVES: Mapping[PlanPhase, frozenset[PlanPhase]] = {
    PlanPhase.EMPTY: frozenset({PlanPhase.FIRST, PlanPhase.EMPTY}),
    PlanPhase.FIRST: frozenset({PlanPhase.ROLLING, PlanPhase.EMPTY}),
    PlanPhase.ROLLING: frozenset({PlanPhase.EMPTY}),
}


@dataclass(slots=True)
class _Block:
    """A block under way: its newest scheduled item, whether that came back, and what each step does."""

    item: Item
    script: Script
    running: bool = True

    def holds(self, item: Item) -> bool:
        """Whether ``item`` is its newest."""
        return item is self.item or item == self.item

    def touches_later(self) -> set[int]:
        """Slots that its steps not yet scheduled will change."""
        return {slot for step in range(self.item.step + 1, len(self.script)) for slot in _touched(self.script[step])}


@dataclass(slots=True)
class _Slot:
    """A slot as it stands after every block entered so far: the newest block in it, and how far its keys were moved."""

    block: int
    moved: int


def _touched(step: tuple[int, tuple[SlotOp, ...]]) -> set[int]:
    return {step[0], *(op.slot for op in step[1])}


class StreamPlan:
    """The items of one stream in one placement (epoch)."""

    def __init__(
        self, stream: str, epoch: int, *, ring: int, sinks: int, rope_refresh_at: int = 0, rerotate: bool = True
    ) -> None:
        """Ring sizes and ``rope_refresh_at`` (0: never) in latent frames."""
        if not 0 <= sinks < ring:
            raise ValueError(f"{sinks} sinks in a ring of {ring}: at least one place must roll")
        if rope_refresh_at and rope_refresh_at < 2 * ring - sinks:
            raise ValueError(
                f"rope_refresh_at {rope_refresh_at} would come again at once: {2 * ring - sinks} is the least"
            )
        self.stream = stream
        self.epoch = epoch
        self.ring = ring
        self.sinks = sinks
        self.rope_refresh_at = rope_refresh_at
        self.rerotate = rerotate
        self._phase = PlanPhase.EMPTY
        self._blocks: dict[int, _Block] = {}
        self._slots: dict[int, _Slot] = {}
        self._first_block = -1  # the newest block that found every slot empty
        self._next_block = 0
        self._next_latent = 0
        self._next_start = 0
        self._moved = 0  # sum of all refresh shifts since the slots were empty
        self._cached = 0  # latent frames that entered since the slots were empty
        self._steps_before = 0  # K of the newest block

    @classmethod
    def for_model(cls, stream: str, epoch: int, model: RingShape) -> StreamPlan:
        """A plan for this model's ring."""
        return cls(
            stream,
            epoch,
            ring=model.ring,
            sinks=model.sinks,
            rope_refresh_at=model.rope_refresh_at,
            rerotate=model.rerotate,
        )

    # --- what is -----------------------------------------------------------------------------------------------------

    @property
    def phase(self) -> PlanPhase:
        """Where the stream is."""
        return self._phase

    @property
    def under_way(self) -> tuple[int, ...]:
        """Blocks that entered and are not done with their last step, oldest first."""
        return tuple(self._blocks)

    @property
    def prompt_versions(self) -> frozenset[int]:
        """Prompt versions that blocks under way are bound to: they must not be retired yet."""
        return frozenset(version for block in self._blocks.values() for version in block.item.prompts)

    @property
    def next_start_frame(self) -> int:
        """The RoPE position that the next block would start at."""
        return self._start()[0]

    def context_of(self, frames: int) -> int:
        """How many latent frames a block of ``frames`` would take along, if it entered now with ``recache``."""
        return min(self._cached, self.ring - frames)

    def most_frames(self) -> int:
        """The longest block that may enter now, in latent frames."""
        return self.ring if self._phase is PlanPhase.EMPTY else self.ring - self.sinks

    def can_enter(self, steps: int | None = None) -> bool:
        """Whether a block of ``steps`` steps may enter step 0 in the next batch; None asks for any number of steps.

        False while the first block runs, and for the moment that K goes from 1 up again while an older block of more
        steps has yet to write slot 1.
        """
        if self._phase is PlanPhase.FIRST:
            return False
        if not self._blocks:
            return True
        up_from_one = self._steps_before == 1 and steps != 1
        return not self._slot_busy({0, 1} if up_from_one else {0}, self._next_block)

    def can_next(self, item: Item) -> bool:
        """Whether the step after ``item`` may be scheduled in the next batch: item is done and no older block is before it."""
        block = self._blocks.get(item.block)
        if block is None or not block.holds(item) or block.running or item.is_last_step:
            return False
        return not self._slot_busy(_touched(block.script[item.step + 1]), item.block)

    # --- what happens ------------------------------------------------------------------------------------------------

    def enter(
        self,
        frames: int,
        noise_scale: float,
        timesteps: Sequence[int],
        seed: int,
        prompt_version: int,
        *,
        blend_version: int = 0,
        blend: float = 0.0,
        recache: bool = False,
        still: bool = False,
    ) -> Item:
        """A block of ``frames`` latent frames is scheduled for step 0; everything that alters its result is bound here.

        K is ``len(timesteps)``; ``blend`` is the share of ``blend_version``; ``recache`` takes the window along, if anything
        is cached; ``still`` holds the noise. Raises IllegalPlanMoveError when :meth:`can_enter` is False, ValueError for
        values that no stage could run.
        """
        if not self.can_enter(len(timesteps)):
            raise self._illegal("enter", f"block {self._next_block}")
        if not 1 <= frames <= self.most_frames():
            raise ValueError(f"a block of {frames} latent frames does not fit: 1…{self.most_frames()} do")
        if not timesteps or min(timesteps) <= 0 or max(timesteps) > 1000:
            raise ValueError(f"timesteps {tuple(timesteps)} will not do: at least one, each in 1…1000")
        if not 0.0 <= blend <= 1.0:
            raise ValueError(f"blend {blend} will not do: a share from 0 to 1 is needed")
        start, shift = self._start()
        number, first = self._next_block, self._phase is PlanPhase.EMPTY
        context = self.context_of(frames) if recache else 0
        self._moved += shift
        script = (
            self._first_script(number, len(timesteps)) if first else self._script(number, len(timesteps), context > 0)
        )
        slot, ops = script[0]
        item = Item(
            stream=self.stream,
            epoch=self.epoch,
            block=number,
            step=0,
            slot=slot,
            frames=frames,
            first_latent=self._next_latent,
            start_frame=start,
            noise_scale=noise_scale,
            timesteps=tuple(timesteps),
            seed=seed,
            prompt_version=prompt_version,
            ops=ops,
            blend_version=blend_version,
            blend=blend,
            context=context,
            still=still,
        )
        self._blocks[number] = _Block(item, script)
        self._next_block += 1
        self._next_latent += frames
        self._next_start = start + frames
        self._cached += frames
        self._steps_before = len(timesteps)
        if first:
            self._move(PlanPhase.FIRST)
            self._leave_first(item)
        return item

    def next(self, item: Item) -> Item:
        """The block of ``item``, which is done, is scheduled for its next step. Raises IllegalPlanMoveError otherwise."""
        if not self.can_next(item):
            raise self._illegal("next", f"block {item.block} step {item.step}")
        block = self._blocks[item.block]
        slot, ops = block.script[item.step + 1]
        block.item = item.next_step(slot, ops)
        block.running = True
        self._leave_first(block.item)
        return block.item

    def done(self, item: Item) -> bool:
        """The item's forward came back. Returns whether the block is finished.

        Raises IllegalPlanMoveError for an item that is not running, a repeated answer for instance.
        """
        block = self._blocks.get(item.block)
        if block is None or not block.holds(item) or not block.running:
            raise self._illegal("done", f"block {item.block} step {item.step}")
        block.running = False
        if item.is_last_step:
            del self._blocks[item.block]
        return item.is_last_step

    def reset(self) -> tuple[int, ...]:
        """Every slot is lost. Returns the blocks that were under way, which are lost too. Legal in every phase."""
        lost = self.under_way
        self._blocks.clear()
        self._slots.clear()
        self._next_start = self._moved = self._cached = self._steps_before = 0
        self._move(PlanPhase.EMPTY)
        return lost

    # --- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything another scheduler needs to go on exactly here: plain numbers, strings, lists and dicts."""
        return {
            "stream": self.stream,
            "epoch": self.epoch,
            "ring": self.ring,
            "sinks": self.sinks,
            "rope_refresh_at": self.rope_refresh_at,
            "rerotate": self.rerotate,
            "phase": self._phase.value,
            "next": [self._next_block, self._next_latent, self._next_start],
            "moved": self._moved,
            "cached": self._cached,
            "first_block": self._first_block,
            "steps_before": self._steps_before,
            "slots": [[number, slot.block, slot.moved] for number, slot in self._slots.items()],
            "blocks": [
                [
                    block.item.to_plain(),
                    block.running,
                    [[slot, [op.to_plain() for op in ops]] for slot, ops in block.script],
                ]
                for block in self._blocks.values()
            ],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> StreamPlan:
        """The plan whose :meth:`state` this is. Raises ValueError when it is not one."""
        try:
            plan = cls(
                state["stream"],
                state["epoch"],
                ring=state["ring"],
                sinks=state["sinks"],
                rope_refresh_at=state["rope_refresh_at"],
                rerotate=state["rerotate"],
            )
            plan._phase = PlanPhase(state["phase"])
            plan._next_block, plan._next_latent, plan._next_start = state["next"]
            plan._moved, plan._first_block = state["moved"], state["first_block"]
            plan._steps_before, plan._cached = state["steps_before"], state["cached"]
            plan._slots = {number: _Slot(block, moved) for number, block, moved in state["slots"]}
            for plain, running, script in state["blocks"]:
                item = Item.from_plain(plain)
                steps = tuple((slot, tuple(SlotOp.from_plain(op) for op in ops)) for slot, ops in script)
                plan._blocks[item.block] = _Block(item, steps, running)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the state of a stream's plan: {error!r}") from error
        return plan

    # --- inside ------------------------------------------------------------------------------------------------------

    def _start(self) -> tuple[int, int]:
        """(start frame of the next block, shift of the cached keys that goes with it)."""
        if self.rope_refresh_at and self._next_start >= self.rope_refresh_at:
            start = self.ring - 1
            return start, (start - self._next_start) if self.rerotate else 0
        return self._next_start, 0

    def _first_script(self, number: int, steps: int) -> Script:
        self._first_block = number
        self._slots = {0: _Slot(number, self._moved)}
        return tuple((0, (SlotOp(SlotOpKind.RESET, 0),)) for _ in range(steps))

    def _script(self, number: int, steps: int, recache: bool) -> Script:
        """What each step of the next block does, given how its predecessors leave the slots."""
        after_first = number == self._first_block + 1
        script: list[tuple[int, tuple[SlotOp, ...]]] = []
        for step in range(steps):
            ops: list[SlotOp] = []
            slot = self._slots[step]
            if slot.moved != self._moved:
                ops.append(SlotOp(SlotOpKind.REROTATE, step, frames=self._moved - slot.moved))
                slot.moved = self._moved
            targets = range(step + 1, steps if after_first and step == 0 else min(step + 2, steps))
            for target in targets:
                held = self._slots.get(target)
                if held is None or held.block != number - 1:
                    ops.append(SlotOp(SlotOpKind.FORK, target, source=step))
                    self._slots[target] = _Slot(number - 1, self._moved)
            if recache:
                ops.append(SlotOp(SlotOpKind.RESET, step))
            slot.block = number
            script.append((step, tuple(ops)))
        return tuple(script)

    def _slot_busy(self, slots: set[int], block: int) -> bool:
        """Whether an older block has yet to be scheduled for a step that changes one of ``slots``."""
        return any(number < block and older.touches_later() & slots for number, older in self._blocks.items())

    def _leave_first(self, item: Item) -> None:
        if self._phase is PlanPhase.FIRST and item.is_last_step:
            self._move(PlanPhase.ROLLING)

    def _move(self, to: PlanPhase) -> None:
        if to not in _PHASE_MOVES[self._phase]:
            raise self._illegal("move", f"{self._phase} → {to}")
        self._phase = to

    def _illegal(self, move: str, what: str) -> IllegalPlanMoveError:
        return IllegalPlanMoveError(f"stream {self.stream}: illegal {move} of {what} while {self._phase}")
