"""``rheocast plan``: before a machine is bought."""

from __future__ import annotations

import click


@click.command()
@click.option("--model", default="wan2.1-1.3b", show_default=True, help="Which model; see: rheocast models list.")
@click.option("--size", help="WIDTHxHEIGHT, multiples of 16; default: the model's.")
@click.option("--fps", type=click.FloatRange(0, 240, min_open=True), help="Of each stream; default: the model's.")
@click.option("--steps", type=click.IntRange(1, 4), default=2, show_default=True, help="Denoising steps, 1 to 4.")
@click.option("--device", required=True, help="Which device, e.g. h100; a wrong name lists the known ones.")
@click.option("--streams", type=click.IntRange(1), help="How many streams are to be served at once.")
@click.option("--gpus-per-group", type=click.IntRange(1, 64), help="Devices that share one pipeline.")
@click.option("--price", type=click.FloatRange(0), help="Of one device for one hour, in any currency.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def plan(
    model: str,
    size: str | None,
    fps: float | None,
    steps: int,
    device: str,
    streams: int | None,
    gpus_per_group: int | None,
    price: float | None,
    as_json: bool,
) -> None:
    """Streams per group of devices, devices needed, cost per stream-hour, and everything that was assumed."""
    from services.cli.plan import make_plan, show_plan

    show_plan(make_plan(model, size, fps, steps, device, streams, gpus_per_group, price), as_json)
