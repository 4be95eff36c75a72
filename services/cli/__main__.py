"""``rheocast``: demo, up, run, doctor."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated

import click
import typer

from services.cli.errors import CommandError, ExitCode
from shared.contracts.commands import Fit

app = typer.Typer(
    help="Live video in, generated video out.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)


@app.command("run")
def run_command(
    source: Annotated[Path, typer.Argument(metavar="IN", help="the video to restyle")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="the MP4 to write")],
    prompt: Annotated[str, typer.Option(help='what the picture becomes, e.g. "a pencil drawing"')],
    steps: Annotated[int, typer.Option(help="denoising steps, 1 (faster) to 4 (finer)")] = 2,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT, multiples of 16; default: the model's")] = None,
    fps: Annotated[float | None, typer.Option(help="constant frame rate; default: the source's timestamps")] = None,
    seed: Annotated[int, typer.Option(help="same seed, same pixels")] = 0,
    noise: Annotated[float | None, typer.Option(help="0 (faithful) to 1 (free); default: the model's")] = None,
    stages: Annotated[int, typer.Option(help="worker processes that share the model's blocks")] = 1,
    realtime: Annotated[bool, typer.Option("--realtime", help="the source plays at its own pace")] = False,
    model: Annotated[str, typer.Option(help="which model")] = "rheo-tiny",
    fit: Annotated[Fit, typer.Option(help="crop what sticks out, or pad with black; never stretched")] = Fit.CROP,
    batch_log: Annotated[Path | None, typer.Option(help="write every batch as a JSON line to this file")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON line, last, on stdout")] = False,
) -> None:
    """Send a clip through every service: lossless and as fast as the machine goes, or --realtime."""
    from services.cli import run as runner
    from services.cli.progress import Progress
    from services.cli.validate import run_request

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
        fit=fit,
    )
    expected = request.info.frames if fps is None else round(request.info.duration_s * fps)
    try:
        with Progress(expected, quiet=as_json) as progress:
            result, warnings = asyncio.run(runner.run(request, progress, batch_log))
    except runner.RunEnded as ended:
        if as_json:
            print(json.dumps(ended.result), flush=True)
        raise
    for line in warnings:
        typer.echo(f"rheocast: warning: {line}", err=True)
    if as_json:
        print(json.dumps(result), flush=True)
    else:
        typer.echo(
            f"{result['output']}: {result['frames_out']} of {result['frames_in']} frames, {result['fps']} fps, "
            f"latency p50 {result['latency_p50_ms']:.0f} ms, p95 {result['latency_p95_ms']:.0f} ms"
        )


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("out"),
    prompt: Annotated[str, typer.Option(help="what the picture becomes")] = "a pencil drawing",
) -> None:
    """Draw a short clip, restyle it, and say what to try next."""
    from services.cli.demo import demo

    demo(out, prompt)


@app.command("up")
def up_command(
    port: Annotated[int, typer.Option(help="the API's port on --host")] = 7860,
    host: Annotated[str, typer.Option(help="the address to listen on")] = "127.0.0.1",
    stages: Annotated[int, typer.Option(help="worker processes that share the model's blocks")] = 1,
    model: Annotated[str, typer.Option(help="which model")] = "rheo-tiny",
    media: Annotated[Path, typer.Option(help="the folder that streams may read files from and record to")] = Path(
        "media"
    ),
    run_dir: Annotated[
        Path | None, typer.Option(help="where servers keep data and logs; default: a temporary folder")
    ] = None,
) -> None:
    """Serve the API: start the servers and every service, restart what dies, stop all on Ctrl-C."""
    from services.cli.up import up

    media = media.expanduser().absolute()
    media.mkdir(parents=True, exist_ok=True)
    asyncio.run(up(host, port, stages, model, media, run_dir.absolute() if run_dir else None))


@app.command("doctor")
def doctor_command(as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False) -> None:
    """What is installed, which device, which ports, what is missing and how to get it."""
    from services.cli.doctor import report

    raise typer.Exit(report(as_json))


def main() -> None:
    """Entry point: every refusal is one line on stderr."""
    try:
        code = app(standalone_mode=False)
    except CommandError as error:
        _say(error.line)
        code = int(error.code)
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.exceptions.Abort:
        code = ExitCode.INTERRUPTED
    except click.ClickException as error:
        _say(f"{error.format_message()} (see: rheocast --help)")
        code = int(ExitCode.REFUSED)
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    sys.exit(int(code or 0))


def _say(line: str) -> None:
    print(f"rheocast: error: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
