"""The commands of ``rheocast``: demo, up, run, generate, models, plan, simulate, trace, doctor."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from services.cli.errors import CommandError, ExitCode
from services.cli.interrupts import HeldInterrupt
from services.cli.planning import plan, simulate
from services.cli.trace import trace

if TYPE_CHECKING:
    from services.cli.validate import RunRequest
from shared.bus.port import BusError
from shared.contracts.commands import Fit
from shared.engine.plan.spec import VaeKind
from shared.session.port import StoreError

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path)
STAGES = click.option("--stages", default=1, show_default=True, help="Worker processes that share the model's blocks.")
MODEL = click.option("--model", default="rheo-tiny", show_default=True, help="Which model; see: rheocast models list.")
MODELS_DIR = click.option(
    "--models-dir",
    type=FOLDER,
    envvar="RHEOCAST_MODELS_DIR",
    help="Where models are, beside those that ship; default: ./models, if there is one.",
)

VAE = click.option(
    "--vae",
    type=click.Choice(["auto", *(kind.value for kind in VaeKind)]),
    envvar="RHEOCAST_VAE",
    default="auto",
    show_default=True,
    help="The full autoencoder, the tiny one, or the full encoder with the tiny decoder; auto: the model's own.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rheocast")
def cli() -> None:
    """Live video in, generated video out."""


@cli.command()
@click.argument("source", metavar="IN", type=FILE)
@click.argument("output", metavar="OUT", type=FILE)
@click.option("--prompt", required=True, help='What the picture becomes, e.g. "a pencil drawing", or "no style".')
@click.option(
    "--steps", type=click.IntRange(1, 4), default=2, show_default=True, help="Denoising steps, 1 (faster) to 4 (finer)."
)
@click.option("--size", help="WIDTHxHEIGHT, multiples of 16; default: the model's, turned like the source.")
@click.option(
    "--fps",
    type=click.FloatRange(0, 240, min_open=True),
    help="A constant frame rate; default: the source's own timestamps.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Same seed, same pixels.")
@click.option("--noise", type=click.FloatRange(0, 1), help="0 (faithful) to 1 (free); default: the model's.")
@STAGES
@click.option("--realtime", is_flag=True, help="The source plays at its own pace; late is worse than lost.")
@MODEL
@MODELS_DIR
@click.option(
    "--fit",
    type=click.Choice([fit.value for fit in Fit]),
    default=Fit.CROP.value,
    show_default=True,
    help="Crop what sticks out, or pad with black; never stretched.",
)
@click.option("--batch-log", type=FILE, help="Write every batch as a JSON line to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line, last, on stdout; no progress.")
def run(
    source: Path,
    output: Path,
    prompt: str,
    steps: int,
    size: str | None,
    fps: float | None,
    seed: int,
    noise: float | None,
    stages: int,
    realtime: bool,
    model: str,
    models_dir: Path | None,
    fit: str,
    batch_log: Path | None,
    as_json: bool,
) -> None:
    """Send a clip through every service: lossless and as fast as the machine goes, or --realtime."""
    with HeldInterrupt() as held:
        from services.cli.validate import models_dir_of, run_request

        request = run_request(
            source,
            output,
            prompt=prompt,
            steps=steps,
            size=size,
            fps=fps,
            seed=seed,
            noise=noise,
            stages=stages,
            realtime=realtime,
            model=model,
            fit=Fit(fit),
            models_dir=models_dir_of(models_dir),
        )
        _carry_out(request, as_json, held, batch_log.absolute() if batch_log is not None else None)


@cli.command()
@click.argument("output", metavar="OUT", type=FILE)
@click.option("--prompt", required=True, help="What the video shows.")
@click.option("--seconds", type=click.FloatRange(0, 3600, min_open=True), default=5.0, show_default=True)
@click.option("--steps", type=click.IntRange(1, 4), default=4, show_default=True, help="Denoising steps, 1 to 4.")
@click.option("--size", help="WIDTHxHEIGHT, multiples of 16; default: the model's.")
@click.option("--fps", type=click.FloatRange(0, 240, min_open=True), help="Frame rate; default: the model's.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Same seed, same pixels.")
@STAGES
@MODEL
@MODELS_DIR
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line, last, on stdout; no progress.")
def generate(
    output: Path,
    prompt: str,
    seconds: float,
    steps: int,
    size: str | None,
    fps: float | None,
    seed: int,
    stages: int,
    model: str,
    models_dir: Path | None,
    as_json: bool,
) -> None:
    """Text to video: no source, pure noise enters step 0. The embedded rheo-tiny has not learnt to; a Wan model has."""
    with HeldInterrupt() as held:
        from services.cli.validate import generate_request, models_dir_of

        request = generate_request(
            output,
            prompt=prompt,
            seconds=seconds,
            steps=steps,
            size=size,
            fps=fps,
            seed=seed,
            stages=stages,
            model=model,
            models_dir=models_dir_of(models_dir),
        )
        _carry_out(request, as_json, held)


def _carry_out(request: RunRequest, as_json: bool, held: HeldInterrupt, log: Path | None = None) -> None:
    """Run the request through every service and say what came of it. ``held``: Ctrl-C that came before that."""
    from services.cli import run as runner
    from services.cli.progress import Progress

    try:
        with Progress(request.frames, quiet=as_json) as progress:
            result, warnings = asyncio.run(runner.run(request, progress, log, held=held))
    except runner.RunEnded as ended:
        if as_json:
            click.echo(json.dumps(ended.result))
        raise
    for line in warnings:
        click.echo(f"rheocast: warning: {line}", err=True)
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo(
            f"{result['output']}: {result['frames_out']} of {result['frames_in']} frames, {result['fps']} fps, "
            f"latency p50 {result['latency_p50_ms']:.0f} ms, p95 {result['latency_p95_ms']:.0f} ms"
        )


@cli.command()
@click.option("--out", type=FOLDER, default=Path("out"), show_default=True, help="Folder for the pictures.")
@click.option("--prompt", default="a pencil drawing", show_default=True, help="What the picture becomes.")
def demo(out: Path, prompt: str) -> None:
    """Draw a short clip, restyle it, and say what to try next."""
    from services.cli.demo import demo as show

    show(out, prompt)


@cli.command()
@click.option("--port", default=7860, show_default=True, help="The API's port on --host.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@STAGES
@click.option(
    "--pipelines",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Copies of the model, each with its own workers.",
)
@MODEL
@MODELS_DIR
@click.option(
    "--media", type=FOLDER, default=Path("media"), show_default=True, help="Streams read and record files here."
)
@click.option("--run-dir", type=FOLDER, help="Where servers keep data and logs; default: a temporary folder.")
@click.option(
    "--tokens",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Who may use the API, see `rheocast token`.",
)
def up(
    host: str,
    port: int,
    stages: int,
    pipelines: int,
    model: str,
    models_dir: Path | None,
    media: Path,
    run_dir: Path | None,
    tokens: Path | None,
) -> None:
    """Serve the API: start the servers and every service, restart what dies, stop all on Ctrl-C."""
    from services.cli.up import up as serve
    from services.cli.validate import models_dir_of

    media = media.expanduser().absolute()
    models = models_dir_of(models_dir)
    media.mkdir(parents=True, exist_ok=True)
    asyncio.run(
        serve(
            host,
            port,
            stages,
            model,
            media,
            run_dir.absolute() if run_dir else None,
            models,
            pipelines,
            tokens.absolute() if tokens else None,
        )
    )


@cli.command()
@click.argument("name")
@click.option("--role", type=click.Choice(["viewer", "operator", "admin"]), default="operator", show_default=True)
@click.option("--tenant", default="default", show_default=True, help="Whose streams it sees and starts.")
@click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("tokens.json"),
    show_default=True,
    help="What `rheocast up --tokens` or RHEOCAST_TOKENS_FILE names.",
)
def token(name: str, role: str, tenant: str, path: Path) -> None:
    """Make a bearer token for the API and print it, once; only its hash is kept. The same NAME again replaces it."""
    from pydantic import ValidationError

    from shared.access import Role, TokensFileError, add_token, new_token

    try:
        secret, entry = new_token(name, Role(role), tenant)
        add_token(path, entry)
    except ValidationError as error:
        first = error.errors()[0]
        raise CommandError(f"{first['loc'][0]}: {first['msg']}") from None
    except TokensFileError as error:
        raise CommandError(str(error)) from None
    click.echo(f"{name} ({role} of tenant {tenant}) is in {path}; its token is shown only now:", err=True)
    click.echo(secret)


@cli.command()
@click.argument("worker")
@click.option("--force", is_flag=True, help="End the streams that find no other place.")
@click.option("--undo", is_flag=True, help="The worker may be used again.")
@click.option("--no-wait", is_flag=True, help="Say so and go; see GET /v1/workers for how it stands.")
@click.option("--api", default="http://127.0.0.1:7860", show_default=True, help="Where rheocast up listens.")
@click.option("--token", default="", envvar="RHEOCAST_TOKEN", help="An admin's, where the API needs one.")
@click.option("--json", "as_json", is_flag=True, help="Print the worker as one JSON line, last, on stdout.")
def drain(worker: str, force: bool, undo: bool, no_wait: bool, api: str, token: str, as_json: bool) -> None:
    """Empty a worker, so that it can be stopped: its pipeline takes no stream, those on it are moved to others."""
    from services.cli.drain import drain as empty

    view = empty(
        api,
        worker,
        force=force,
        undo=undo,
        wait=not no_wait,
        token=token,
        say=lambda line: click.echo(line, err=True),
    )
    said = {"drained": f"{worker} is empty: it may be stopped", "ready": f"{worker} takes streams"}
    click.echo(json.dumps(view) if as_json else said.get(view["state"], f"{worker} is {view['state']}"))


@cli.group()
def models() -> None:
    """Which models there are, whether their files will do, and how to get them."""


@models.command(name="list")
@MODELS_DIR
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def list_models(models_dir: Path | None, as_json: bool) -> None:
    """Every known model, and which of its parts are missing."""
    from services.cli.models import list_models as show

    show(models_dir, as_json)


@models.command()
@click.argument("target", metavar="NAME|FOLDER")
@MODELS_DIR
@VAE
@click.option("--as", "named", help="Which model a folder holds, if it does not say so itself.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def check(target: str, models_dir: Path | None, vae: str, named: str | None, as_json: bool) -> None:
    """Open every part of a model, compare names and shapes, say what is wrong. Exits 1 if anything is."""
    from services.cli.models import check as look

    raise click.exceptions.Exit(look(target, models_dir, vae, named, as_json))


@models.command()
@click.argument("name")
@MODELS_DIR
@VAE
def fetch(name: str, models_dir: Path | None, vae: str) -> None:
    """Download the files a published model needs, and no others, into the models folder (default: ./models)."""
    from services.cli.models import fetch as get

    get(name, models_dir, vae)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def doctor(as_json: bool) -> None:
    """What is installed, which device, which ports, what is missing and how to get it."""
    from services.cli.doctor import report

    raise click.exceptions.Exit(report(as_json))


cli.add_command(plan)
cli.add_command(simulate)
cli.add_command(trace)


def run_command_line() -> None:
    """Carry out the command; every refusal is one line on stderr. Ends the process."""
    try:
        code = cli(standalone_mode=False)
    except CommandError as error:
        _say(error.line)
        code = error.code
    except click.exceptions.Exit as error:
        code = error.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt):
        code = ExitCode.INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = ExitCode.OK
    except (BusError, StoreError, OSError) as error:
        _say(f"{' '.join(str(error).split())} (rheocast doctor says what this machine has)")
        code = ExitCode.FAILED
    except click.ClickException as error:
        command = _command(error.ctx) if isinstance(error, click.UsageError) else ""
        _say(f"{' '.join(error.format_message().split())} (see: {' '.join(f'rheocast {command} --help'.split())})")
        code = ExitCode.REFUSED
    sys.exit(int(code or 0))


def _command(context: click.Context | None) -> str:
    """The names after ``rheocast`` that led here."""
    if context is None or context.parent is None:
        return ""
    return f"{_command(context.parent)} {context.info_name}"


def _say(line: str) -> None:
    click.echo(f"rheocast: error: {line}", err=True)
