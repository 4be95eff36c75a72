"""``rheocast plan`` and ``rheocast simulate``: before a machine is bought, or a policy is trusted."""

from __future__ import annotations

import click

POLICIES = ("slack", "edf", "fifo", "maxbatch")


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


@click.command()
@click.option("--scenario", default="steady_095", show_default=True, help="A shipped scenario, or a TOML or JSON file.")
@click.option("--policy", type=click.Choice(POLICIES), default="slack", show_default=True, help="How batches are made.")
@click.option("--seed", type=click.IntRange(0), help="Another trace; default: the scenario's.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="Of simulated time; default: the scenario's.")
@click.option("--list", "listed", is_flag=True, help="Name the shipped scenarios.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line on stdout; no progress.")
def simulate(scenario: str, policy: str, seed: int | None, seconds: float | None, listed: bool, as_json: bool) -> None:
    """Run the scheduler's own decisions under a virtual clock: many streams, minutes of them in seconds."""
    from services.cli.simulate import launch

    arguments = ["--list"] if listed else ["--scenario", scenario, "--policy", policy]
    arguments += [] if seed is None else ["--seed", str(seed)]
    arguments += [] if seconds is None else ["--seconds", str(seconds)]
    code = launch(arguments + (["--json"] if as_json else []))
    if code:
        raise click.exceptions.Exit(code)
