"""``rheocast demo``: the main job on a clip that is drawn on the spot."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from services.cli import demo_clip
from services.cli.progress import Progress
from services.cli.run import run
from services.cli.validate import run_request
from shared.contracts.commands import Fit

SECONDS = 5.0


def demo(out: Path, prompt: str) -> None:
    """Draw ``source.mp4``, restyle it into ``demo.mp4``, put both side by side, and say what to try next."""
    out.mkdir(parents=True, exist_ok=True)
    source, restyled, pair = out / "source.mp4", out / "demo.mp4", out / "side-by-side.mp4"
    demo_clip.write(source, SECONDS)
    request = run_request(
        source,
        restyled,
        prompt=prompt,
        steps=2,
        size=f"{demo_clip.WIDTH}x{demo_clip.HEIGHT}",
        fps=None,
        seed=0,
        noise=None,
        stages=1,
        realtime=False,
        model="rheo-tiny",
        fit=Fit.CROP,
    )
    with Progress(request.frames) as progress:
        result, _ = asyncio.run(run(request, progress))
    demo_clip.beside(source, restyled, pair)
    click.echo(
        f"""
{result["frames_out"]} frames became "{prompt}" at {result["fps"]} fps:
  {restyled}
  {pair}   (source left, result right)

Try next (after: . .venv/bin/activate):
  rheocast run {source} {out / "thermal.mp4"} --prompt "a thermal camera"
  rheocast run YOUR.mp4 {out / "yours.mp4"} --prompt "a blueprint drawing" --realtime
  rheocast up          the page on http://127.0.0.1:7860, its API on /docs
  rheocast doctor      what this machine has and what is missing"""
    )
