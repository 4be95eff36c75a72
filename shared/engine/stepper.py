"""The engine without a broker: source chunks in, restyled chunks out, in one visible loop.

Every tick each stream's new block runs step 0 while its older blocks run later steps, all in one batch: the lock step. Used
by benchmarks, quality checks and anyone who wants the engine alone; serving makes the same calls from its services.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from shared.engine.plan.items import Item
from shared.engine.plan.noise_controller import NoiseController, step_timesteps
from shared.engine.plan.spec import ModelSpec
from shared.engine.plan.stream_plan import PlanPhase, StreamPlan
from shared.engine.stage import Stage


class Autoencoding(Protocol):
    """Pixels as they travel to latents and back; see :class:`shared.engine.model.autoencoder.Autoencoder`."""

    def encoder_state(self) -> Any: ...
    def decoder_state(self) -> Any: ...
    def encode(self, state: Any, pixels: Tensor) -> Tensor: ...
    def decode(self, state: Any, latents: Tensor) -> Tensor: ...


@dataclass(slots=True)
class _Session:
    plan: StreamPlan
    steps: int
    seed: int
    noise: NoiseController
    encoder: Any
    decoder: Any
    prompt: int = 1
    fade: list[tuple[int, float]] = field(default_factory=list)  # (version, share) of the old prompt, next chunk first
    waiting: list[tuple[Item, Tensor]] = field(default_factory=list)


class Stepper:
    """Drives the stages of one pipeline and its autoencoder for any number of streams of one size."""

    def __init__(self, spec: ModelSpec, stages: Sequence[Stage], autoencoder: Autoencoding) -> None:
        if not stages or not stages[0].is_first or not stages[-1].is_last:
            raise ValueError("the stages do not cover the model from its first block to its last")
        self.spec, self.stages, self.autoencoder = spec, list(stages), autoencoder
        self._sessions: dict[str, _Session] = {}

    def open(
        self, stream: str, width: int, height: int, embedding: Tensor, *, steps: int | None = None, seed: int = 0
    ) -> None:
        """Start a stream of this size in pixels under the prompt's embedding [text_len, text_dim]."""
        rows, columns = self.spec.latent_size(width, height)
        for stage in self.stages:
            stage.open(stream, rows, columns)
        self._sessions[stream] = _Session(
            plan=StreamPlan.for_model(stream, 0, self.spec),
            steps=steps or self.spec.max_steps,
            seed=seed,
            noise=NoiseController(self.spec.noise),
            encoder=self.autoencoder.encoder_state(),
            decoder=self.autoencoder.decoder_state(),
            prompt=0,
        )
        self.set_prompt(stream, embedding)

    def set_prompt(self, stream: str, embedding: Tensor, blend_chunks: int = 0) -> None:
        """Blocks that enter from now on run under this prompt; over ``blend_chunks`` of them the old one fades out."""
        session = self._sessions[stream]
        old, session.prompt = session.prompt, session.prompt + 1
        session.fade = [(old, 1 - i / (blend_chunks + 1)) for i in range(1, blend_chunks + 1)]
        bound = {*session.plan.prompt_versions, session.prompt, *(version for version, _ in session.fade)}
        for stage in self.stages:
            stage.set_prompt(stream, session.prompt, embedding)
            stage.drop_prompts(stream, bound)

    def set_steps(self, stream: str, steps: int) -> None:
        """Blocks that enter from now on run this many steps."""
        self._sessions[stream].steps = steps

    def close(self, stream: str) -> None:
        """Forget the stream."""
        for stage in self.stages:
            stage.close(stream)
        self._sessions.pop(stream, None)

    def tick(
        self, chunks: Mapping[str, Tensor], motion: Mapping[str, Sequence[float]] | None = None
    ) -> dict[str, Tensor]:
        """One chunk of each named stream: uint8 [n, H, W, 3], n = 5 first and 4 later → finished frames by stream.

        A stream that is not named gets no new block, but its older ones go on: tick with {} to flush. ``motion`` gives the
        frame-to-frame RMSE of a chunk to the noise controller. The result holds up to K−1 ticks old chunks.
        """
        moving = [self._advance(session) for session in self._sessions.values()]
        entries = [entry for entry_list in moving for entry in entry_list]
        for stream, pixels in chunks.items():
            entries.append(self._enter(stream, pixels, (motion or {}).get(stream, ())))
        shown: dict[str, list[Tensor]] = {}
        while entries:
            later: list[tuple[Item, Tensor]] = []
            for frames in sorted({item.frames for item, _ in entries}):
                batch = [entry for entry in entries if entry[0].frames == frames]
                later += self._run([item for item, _ in batch], torch.stack([x for _, x in batch]), shown)
            entries = later
        return {stream: torch.cat(parts) for stream, parts in shown.items()}

    def denoise(self, items: Sequence[Item], x: Tensor) -> Tensor:
        """One forward through all stages: step inputs [B, T, C, h, w] → x0."""
        for stage in self.stages:
            x = stage.run(items, x)
        return x

    def _enter(self, stream: str, pixels: Tensor, motion: Sequence[float]) -> tuple[Item, Tensor]:
        session = self._sessions[stream]
        latents = self.autoencoder.encode(session.encoder, pixels)
        estimate = session.noise.update(motion)
        steps = step_timesteps(estimate.first_timestep, self.spec.steps[: session.steps])
        version, share = session.fade.pop(0) if session.fade else (0, 0.0)
        item = session.plan.enter(
            len(latents),
            estimate.noise_scale,
            steps,
            session.seed,
            session.prompt,
            blend_version=version,
            blend=share,
            still=self.spec.noise.still(estimate.motion),
        )
        return item, latents.float()

    def _advance(self, session: _Session) -> list[tuple[Item, Tensor]]:
        ready, session.waiting = session.waiting, []
        return [(session.plan.next(item), x) for item, x in ready]

    def _run(self, items: list[Item], x: Tensor, shown: dict[str, list[Tensor]]) -> list[tuple[Item, Tensor]]:
        """One batch; decodes what is finished, parks what has steps left, returns what must go on at once."""
        x0 = self.denoise(items, x)
        left = [i for i, item in enumerate(items) if not item.is_last_step]
        again = iter(self.stages[-1].renoise([items[i] for i in left], x0[left]) if left else ())
        at_once: list[tuple[Item, Tensor]] = []
        for item, clean in zip(items, x0, strict=True):
            session = self._sessions[item.stream]
            alone = session.plan.phase is PlanPhase.FIRST
            if session.plan.done(item):
                frames = self.autoencoder.decode(session.decoder, clean)
                shown.setdefault(item.stream, []).append(frames)
            elif alone:
                at_once.append((session.plan.next(item), next(again)))
            else:
                session.waiting.append((item, next(again)))
        return at_once
