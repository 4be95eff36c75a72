"""``rheocast trace``: where each millisecond of a stream's last chunks went, drawn in the terminal."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import click

from services.cli.calling import call
from services.cli.errors import CommandError

ASK_S = 0.5
NAMES = 11  # columns for a hop's name
FIGURES = 22  # … and for its waiting and working


@click.command()
@click.argument("stream")
@click.option("--chunks", type=click.IntRange(1, 50), default=3, show_default=True, help="How many, the newest last.")
@click.option(
    "--wait", "wait_s", type=click.FloatRange(0, 600), default=10.0, show_default=True, help="Seconds for them."
)
@click.option("--api", default="http://127.0.0.1:7860", show_default=True, help="Where rheocast up listens.")
@click.option("--token", default="", envvar="RHEOCAST_TOKEN", help="Where the API needs one.")
@click.option("--json", "as_json", is_flag=True, help="Print them as one JSON line on stdout.")
def trace(stream: str, chunks: int, wait_s: float, api: str, token: str, as_json: bool) -> None:
    """Draw the way of a stream's last chunks: what waited, what worked, for how long. Needs no Jaeger."""
    found = ask(api, stream, chunks, wait_s, token)
    if as_json:
        click.echo(json.dumps(found))
        return
    width = max(60, min(160, shutil.get_terminal_size().columns))
    for each in found["chunks"]:
        for line in drawing(each, width, _blocks()):
            click.echo(line)
        click.echo()
    if found.get("jaeger_url"):
        click.echo(f"in Jaeger: {found['jaeger_url']}")


def ask(
    api: str, stream: str, chunks: int, wait_s: float, token: str = "", sleep: Callable[[float], None] = time.sleep
) -> dict[str, Any]:
    """The newest chunks that have their verdict. Nothing is heard before the first question: it is asked until they came.

    Raises CommandError when the stream is not there, or no chunk of it came.
    """
    left = wait_s
    while True:
        found = call(api, "GET", f"/v1/streams/{quote(stream, safe='')}/trace", token)
        closed = [each for each in found["chunks"] if each["verdict"]][-chunks:]
        if len(closed) >= chunks or left <= 0:
            break
        sleep(min(ASK_S, left))
        left -= ASK_S
    if not closed:
        raise CommandError(f"no chunk of {stream} came in {wait_s:g} s: is it live? (GET /v1/streams/{stream} says)")
    return {**found, "chunks": closed}


def drawing(chunk: dict[str, Any], width: int, blocks: tuple[str, str]) -> list[str]:
    """One chunk: a line for itself, and one for each hop. ``blocks``: how waiting and working are drawn."""
    waiting, working = blocks
    begin, end = chunk["begin_ns"], chunk["end_ns"]
    for hop in chunk["hops"]:
        end = max(end, hop["begin_ns"] + round(hop["duration_ms"] * 1e6))
    columns = max(10, width - NAMES - FIGURES)
    scale = columns / max(1, end - begin)
    head = f"chunk {chunk['chunk']}  {chunk['verdict'] or 'under way'}  {(end - begin) / 1e6:.1f} ms"
    if chunk["reason"]:
        head += f"  {chunk['reason']}"
    lines = [head + (f"  trace {chunk['trace_id']}" if chunk["trace_id"] else "")]
    for hop in chunk["hops"]:
        wait = hop["begin_ns"] - round(hop["wait_ms"] * 1e6)
        done = hop["begin_ns"] + round(hop["duration_ms"] * 1e6)
        at = [min(columns, max(0, round((each - begin) * scale))) for each in (wait, hop["begin_ns"], done)]
        bar = " " * at[0] + waiting * (at[1] - at[0]) + working * (at[2] - at[1])
        if at[2] == at[0]:
            bar += working if hop["duration_ms"] else waiting
        name = hop["hop"] if hop["stage"] < 0 else f"{hop['hop']} {hop['stage']}"
        lines.append(f"{name:<{NAMES}}{bar[:columns]:<{columns}}{hop['wait_ms']:9.1f} + {hop['duration_ms']:.1f} ms")
    return lines


def _blocks() -> tuple[str, str]:
    encoding = (sys.stdout.encoding or "").lower()
    return ("░", "█") if encoding.startswith("utf") else (".", "#")
