"""``rheocast up``: the API and everything behind it, until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from urllib.parse import urlsplit

import click

from services.cli.errors import CommandError, ExitCode
from services.cli.supervisor import Death, refuse_if_given_up
from services.cli.system import System
from services.cli.topology import Topology
from services.cli.validate import check_parts, check_port, model_of


async def up(
    host: str,
    port: int,
    stages: int,
    model: str,
    media: Path,
    run_dir: Path | None,
    models_dir: Path | None = None,
    pipelines: int = 1,
    tokens: Path | None = None,
) -> None:
    """Start, watch, restart, stop. Raises CommandError when something cannot be kept running."""
    spec = model_of(model, models_dir)
    if not 1 <= stages <= spec.layers:
        raise CommandError(f"--stages {stages}: {model} can be split into 1 to {spec.layers} stages")
    if host not in ("127.0.0.1", "::1", "localhost") and tokens is None and not os.environ.get("RHEOCAST_TOKENS_FILE"):
        raise CommandError(
            f"--host {host}: without tokens anyone could come in; make one with `rheocast token`, and give --tokens"
        )
    check_port(host, port)
    check_parts(spec, models_dir)
    topology = Topology(
        model=model,
        stages=stages,
        read_roots=(media,),
        write_roots=(media,),
        gateway_port=port,
        models_dir=models_dir,
        pipelines=pipelines,
        extra_env={
            "RHEOCAST_GATEWAY_HOST": host,
            "RHEOCAST_MEDIA_DIR": str(media),
            **({} if tokens is None else {"RHEOCAST_TOKENS_FILE": str(tokens)}),
        },
    )
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)

    def on_death(death: Death) -> None:
        click.echo(f"{death.what} ({death.line}); {death.next}", err=True)

    system = System(topology, run_dir, on_death)
    try:
        async with system:
            ready = asyncio.ensure_future(system.wait_ready(lambda text: click.echo(text, err=True)))
            stop = asyncio.ensure_future(stopping.wait())
            await asyncio.wait({ready, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not stopping.is_set():
                await ready
                click.echo(f"Rheocast is up: http://{host}:{port}/   (files: {media}; Ctrl-C stops it)")
                nats = urlsplit(system.nats_url)
                click.echo(f"For programs that push and take frames: {nats.scheme}://{nats.netloc.rpartition('@')[2]}")
            ready.cancel()
            while not stopping.is_set():
                refuse_if_given_up(system.supervisor)
                if not system.servers_alive():
                    raise CommandError(
                        "the embedded NATS or Redis server ended; start rheocast up again", ExitCode.FAILED
                    )
                await asyncio.wait({stop}, timeout=0.5)
            click.echo("stopping", err=True)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
