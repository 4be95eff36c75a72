"""What ``rheocast plan`` computes and prints. The arithmetic is in :mod:`shared.engine.plan.capacity`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

import click

from services.cli.errors import CommandError
from services.cli.validate import parse_size
from shared.engine.plan.capacity import Capacity, group_capacity
from shared.engine.plan.devices import DeviceError, DeviceProfile, device_profile
from shared.engine.plan.registry import model_spec
from shared.engine.plan.spec import ModelSpec, SpecError

GROUPS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked, and what it takes. ``devices`` and costs are None where they were not asked for, or nothing fits."""

    model: str
    width: int
    height: int
    fps: float
    steps: int
    device: str
    devices_per_group: int
    total_fps_per_group: float
    single_stream_fps: float
    streams_per_group: int
    limited_by: str
    streams: int | None
    groups: int | None
    devices: int | None
    price_per_device_hour: float | None
    cost_per_stream_hour: float | None
    better_group: int | None
    assumptions: tuple[str, ...]


def make_plan(
    model: str,
    size: str | None,
    fps: float | None,
    steps: int,
    device: str,
    streams: int | None,
    per_group: int | None,
    price: float | None,
) -> Plan:
    """Raises CommandError, one line, for a model, size or device that is not known."""
    try:
        spec = model_spec(model)
        profile = device_profile(device)
        width, height = parse_size(size) or (spec.default_width, spec.default_height)
        group = per_group or profile.group
        rate = fps or float(spec.default_fps)
        if steps > spec.max_steps:
            raise CommandError(f"--steps {steps}: {model} has {spec.max_steps} denoising steps")
        capacity = group_capacity(spec, width, height, rate, steps, profile, group)
        others = {n: group_capacity(spec, width, height, rate, steps, profile, n).streams / n for n in {*GROUPS, group}}
    except (SpecError, DeviceError) as error:
        raise CommandError(str(error)) from None
    fit = capacity.streams
    groups = math.ceil(streams / fit) if streams and fit else None
    hourly = None
    if price is not None and fit:
        hourly = price * group * groups / streams if streams and groups else price * group / fit
    best = max(others, key=lambda n: (others[n], -n))
    return Plan(
        model=spec.name,
        width=width,
        height=height,
        fps=rate,
        steps=steps,
        device=profile.name,
        devices_per_group=group,
        total_fps_per_group=round(capacity.total_fps, 2),
        single_stream_fps=round(capacity.single_stream_fps, 2),
        streams_per_group=fit,
        limited_by=_limit(capacity),
        streams=streams,
        groups=groups,
        devices=groups * group if groups else None,
        price_per_device_hour=price,
        cost_per_stream_hour=round(hourly, 4) if hourly is not None else None,
        better_group=best if others[best] > others[group] else None,
        assumptions=_assumptions(spec, profile, capacity, group),
    )


def show_plan(plan: Plan, as_json: bool) -> None:
    """Print it: one JSON line, or lines for people."""
    if as_json:
        click.echo(json.dumps(asdict(plan)))
        return
    many = f"{plan.devices_per_group} x {plan.device}"
    what = f"{plan.model}, {plan.width}x{plan.height}, {plan.fps:g} fps, {plan.steps} steps"
    click.echo(f"{what} on a group of {many}: {plan.total_fps_per_group:.1f} fps in total")
    if not plan.streams_per_group:
        click.echo(
            f"not one stream fits, limited by {plan.limited_by}: take more devices per group, fewer steps, "
            "a smaller size or a lower frame rate"
        )
    else:
        click.echo(f"{plan.streams_per_group} streams per group, limited by {plan.limited_by}")
    if plan.devices:
        click.echo(f"{plan.streams} streams need {plan.groups} groups, {plan.devices} devices")
    if plan.cost_per_stream_hour is not None:
        click.echo(f"{plan.cost_per_stream_hour:.4g} per stream-hour at {plan.price_per_device_hour:g} per device-hour")
    if plan.better_group:
        click.echo(f"groups of {plan.better_group} would serve more streams per device, each with a longer way")
    click.echo("assumed:")
    for line in plan.assumptions:
        click.echo(f"  - {line}")


def _limit(capacity: Capacity) -> str:
    return capacity.slowest if capacity.streams_by_speed <= capacity.streams_by_memory else "memory"


def _assumptions(spec: ModelSpec, profile: DeviceProfile, capacity: Capacity, group: int) -> tuple[str, ...]:
    parts = ", ".join(f"{ms:.1f}" for ms in capacity.part_ms)
    cut = f"cut so that the slowest of {group} is fastest: {parts} ms per latent frame (4 frames)"
    return (
        f"device {profile.name}: {profile.title}",
        f"encode, {spec.layers} DiT blocks and decode ({spec.vae}) {cut}",
        "every step of a latent frame shares a forward with others; nothing is skipped; no room is left for bursts",
        f"memory: {capacity.weights_gib:.1f} GiB of weights and {capacity.stream_gib:.2f} GiB per stream in a group "
        f"of {group * profile.memory_gib:g} GiB",
        *(f"fitted to {line}" for line in profile.fitted_to),
        *(f"it predicts {line}" for line in profile.predicts),
        *(f"source: {line}" for line in profile.sources),
    )
