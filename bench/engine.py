"""The engine alone: milliseconds per latent frame of encode, every step and decode, frames a second, and their floor.

``python -m bench.engine --model rheo-tiny --steps 1,2 --streams 1,2,4 --stages 1,2 --threads 1,2 --json``
``python -m bench.engine --peer PATH --record`` puts the public code beside it, at the settings of record.

Weights may be random: the time of a forward does not depend on them. Every figure is the median of the ticks after the
ring is full and the first ticks are gone; ``least`` is the fastest, which shows what a busy machine hides. ``share`` is
the floor (the arithmetic of :mod:`shared.engine.plan.flops` at the measured matmul ceiling) over the median.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.ceilings import Ceilings, measure_ceilings
from bench.measure import measure
from bench.peer import PeerError, Record, compare, records
from bench.setting import Figures, Setting, spec_for
from bench.weights import Models
from shared.engine.plan.spec import SpecError, spec_of

COLUMNS = (
    *("model", "size", "K", "streams", "stages", "VAE", "dtype", "threads", "encode", "forward", "per step", "share"),
    *("decode", "fps", "pipelined", "KV, VAE a stream, MiB"),
)


def settings_of(args: argparse.Namespace) -> Iterator[Setting]:
    """Every combination asked for. Raises SpecError, ValueError."""
    for model in args.model:
        spec = spec_of(model)
        sizes = args.size or [f"{spec.default_width}x{spec.default_height}"]
        for size in sizes:
            width, height = (int(side) for side in size.split("x"))
            spec.latent_size(width, height)
            for steps, streams, stages in product(args.steps, args.streams, args.stages):
                for vae, dtype, compiled, threads in product(args.vae, args.dtype, args.compile, args.threads):
                    on = compiled == "on"
                    yield Setting(model, width, height, steps, streams, stages, vae, dtype, threads, args.device, on)


def machine() -> str:
    """What the figures were taken on."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


def row(setting: Setting, f: Figures) -> str:
    """One line of the table."""
    dtype = setting.dtype + (", compiled" if setting.compiled else "")
    return (
        f"| {setting.model} | {setting.width}×{setting.height} | {setting.steps} | {setting.streams} | {setting.stages} "
        f"| {setting.vae} | {dtype} | {setting.threads} | {f.encode:.1f} ({f.least_encode:.1f}) "
        f"| {f.forward:.1f} ({f.least_forward:.1f}) | {f.step:.1f} | {f.share:.0%} | {f.decode:.1f} ({f.least_decode:.1f}) "
        f"| {f.fps:.1f} | {f.pipelined_fps:.1f} | {f.kv_mib:.0f}, {f.vae_mib:.0f} |"
    )


def run_settings(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Measure and print every setting."""
    ceilings: dict[tuple[Any, ...], Ceilings] = {}
    models = Models(args.random)
    if not args.json:
        print("Milliseconds per latent frame, median (least); share: the forward's floor over its median.")
        print(f"| {' | '.join(COLUMNS)} |")
        print("|" + "---|" * len(COLUMNS))
    for setting in settings_of(args):
        torch.set_num_threads(setting.threads)
        key = (setting.model, setting.width, setting.height, setting.items, setting.dtype, setting.threads)
        if key not in ceilings:
            device, dtype = torch.device(setting.device), getattr(torch, setting.dtype)
            size = (setting.width, setting.height)
            ceilings[key] = measure_ceilings(spec_for(setting), size, setting.items, device, dtype)
        figures = measure(setting, args.ticks, models, ceilings[key])
        results.append({**asdict(setting), **asdict(figures), "ceilings": asdict(ceilings[key])})
        if not args.json:
            print(row(setting, figures), flush=True)
    if not args.json:
        for (model, width, height, items, dtype, threads), c in ceilings.items():
            print(
                f"Ceilings, {model} {width}×{height}, {items} items, {dtype}, {threads} threads: matmul {c.matmul:.3f} "
                f"TFLOP/s, attention {c.attention:.3f} TFLOP/s, memory {c.memory:.1f} GB/s"
            )


def run_peer(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """The public code beside the engine."""
    chosen = (
        records()
        if args.record
        else [
            Record(
                *(s.model, s.width, s.height, s.steps, args.text_len, s.dtype, s.threads, s.compiled),
                words=args.text_len,
            )
            for s in settings_of(args)
        ]
    )
    if not args.json:
        print("Milliseconds per tick of K latent frame-steps, median (least); ratio: peer over engine, of medians.")
        print(
            "| size | K | text | dtype | threads | peer | engine | ratio | of leasts | of CPU time | largest difference of x0 |"
        )
        print("|" + "---|" * 11)
    for record in chosen:
        b = compare(args.peer, record, args.ticks)
        results.append({**asdict(record), **asdict(b)})
        if not args.json:
            dtype = record.dtype + (", ours compiled" if record.compiled else "")
            text = f"{record.words} of {record.text_len} × {record.text_dim}"
            print(
                f"| {record.width}×{record.height} | {record.steps} | {text} | {dtype} | {record.threads} "
                f"| {b.peer:.1f} ({b.least_peer:.1f}) | {b.engine:.1f} ({b.least_engine:.1f}) | {b.ratio:.2f} "
                f"| {b.least_ratio:.2f} | {b.cpu_ratio:.2f} | {b.same:.1e}{'' if b.equal else ': NOT THE SAME NUMBERS'} |",
                flush=True,
            )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _words(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    """Print tables, or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=_words, default=["rheo-tiny"])
    parser.add_argument("--size", type=_words, help="320x192,… ; default: the model's own")
    parser.add_argument("--steps", type=_numbers, default=[1, 2])
    parser.add_argument("--streams", type=_numbers, default=[1])
    parser.add_argument("--stages", type=_numbers, default=[1])
    parser.add_argument("--vae", type=_words, default=["own"], help="own, wan, taehv, tiny (rheo-tiny's widths)")
    parser.add_argument("--dtype", type=_words, default=["float32"])
    parser.add_argument("--threads", type=_numbers, default=[os.cpu_count() or 1])
    parser.add_argument(
        "--compile", type=_words, default=["off"], help="off, on: compiled pieces of blocks, graphs on a GPU"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ticks", type=int, default=20, help="timed ticks of every setting")
    parser.add_argument("--random", action="store_true", help="random weights even where trained ones are")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--peer",
        type=Path,
        metavar="PATH",
        help="a StreamDiffusionV2 checkout to time beside the engine; its code is run, so name only one that you trust",
    )
    parser.add_argument("--text-len", type=int, default=512, help="with --peer: tokens of text, of both")
    parser.add_argument(
        "--record", action="store_true", help="with --peer: the settings that docs/benchmarks.md records"
    )
    args = parser.parse_args()
    if args.record and args.peer is None:
        parser.error("--record needs --peer PATH")
    results: list[dict[str, Any]] = []
    if not args.json:
        print(machine())
    try:
        (run_settings if args.peer is None else run_peer)(args, results)
    except (SpecError, PeerError, ValueError) as error:
        parser.error(str(error))
    # On Linux in KiB; the highest of the whole run.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if args.json:
        print(json.dumps({"machine": machine(), "peak_rss_mib": peak, "results": results}, indent=1))
    else:
        print(f"Peak resident memory of the run: {peak:.0f} MiB")
    if any(not r.get("equal", True) for r in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
