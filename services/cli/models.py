"""``rheocast models list | check | fetch``: which models there are, whether their files will do, and how to get them."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from services.cli.errors import CommandError, ExitCode
from services.cli.validate import DEFAULT_MODELS, model_of, models_dir_of
from shared.engine.plan.model_parts import base_of, find_parts, needed_parts
from shared.engine.plan.registry import known_models
from shared.engine.plan.spec import SpecError, VaeKind

CHECK_TIMEOUT_S = 600
TAEHV_URL = "https://github.com/madebyollin/taehv/raw/main/taew2_1.pth"


@dataclass(frozen=True, slots=True)
class Download:
    """Files of one published repository, and the folder of the models folder that they go into."""

    repository: str
    files: tuple[str, ...]
    into: str


_BASE_FILES = ("config.json", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/*")
DOWNLOADS = {
    "wan2.1-1.3b": (
        Download("jerryfeng/StreamDiffusionV2", ("wan_causal_dmd_v2v/model.pt",), "ckpts"),
        Download("Wan-AI/Wan2.1-T2V-1.3B", _BASE_FILES, "Wan2.1-T2V-1.3B"),
    ),
    "wan2.1-14b": (
        Download("jerryfeng/StreamDiffusionV2", ("wan_causal_dmd_v2v_14b/model.pt",), "ckpts"),
        Download("Wan-AI/Wan2.1-T2V-14B", _BASE_FILES, "Wan2.1-T2V-14B"),
    ),
}


def listed(models_dir: Path | None) -> list[dict[str, Any]]:
    """Every known model: ``{"model", "vae", "complete", "parts": {part: path or None}, "error"}``."""
    found: list[dict[str, Any]] = []
    for name in known_models(models_dir):
        line: dict[str, Any] = {"model": name, "vae": None, "complete": False, "parts": {}, "error": None}
        try:
            spec = model_of(name, models_dir)
            parts = find_parts(name, models_dir)
            where = {part.value: parts.found.get(part) for part in needed_parts(spec)}
            line |= {
                "vae": spec.vae,
                "complete": all(where.values()),
                "parts": {part: str(path) if path else None for part, path in where.items()},
            }
        except (CommandError, SpecError, OSError) as error:
            line["error"] = str(error)
        found.append(line)
    return found


def list_models(models_dir: Path | None, as_json: bool) -> None:
    """Print what is there and what is missing."""
    lines = listed(models_dir_of(models_dir))
    if as_json:
        click.echo(json.dumps(lines))
        return
    for line in lines:
        missing = [part for part, path in line["parts"].items() if path is None]
        state = line["error"] or ("ready" if line["complete"] else f"missing: {', '.join(missing)}")
        click.echo(f"{line['model']:<18} {line['vae'] or '':<10} {state}")
    if any(not line["complete"] for line in lines):
        click.echo("Get what is missing with: rheocast models fetch NAME")


def check(target: str, models_dir: Path | None, vae: str, named: str | None, as_json: bool) -> int:
    """Open every part of a model, by its name or in a folder, and print what is wrong. Returns the exit code."""
    as_folder = "/" in target or (Path(target).is_dir() and target not in known_models(models_dir_of(models_dir)))
    if as_folder and not Path(target).is_dir():
        raise CommandError(f"{target}: there is no such folder", ExitCode.FAILED)
    request = {
        "model": named if as_folder else target,
        "folder": str(Path(target).absolute()) if as_folder else None,
        "models_dir": str(root) if (root := models_dir_of(models_dir)) else None,
        "vae": vae,
    }
    answer = _ask_checker(request)
    if "error" in answer:
        raise CommandError(str(answer["error"]), ExitCode.FAILED)
    problems = [problem for finding in answer["findings"] for problem in finding["problems"]]
    if as_json:
        click.echo(json.dumps({"ok": not problems, **answer}))
    else:
        for finding in answer["findings"]:
            tensors = f"{finding['tensors']} tensors in " if finding["tensors"] else ""
            where = f"{tensors}{finding['path']}" if finding["path"] else "missing"
            click.echo(f"{'BAD ' if finding['problems'] else 'ok  '}  {finding['part']:<10} {where}")
            for problem in finding["problems"]:
                click.echo(f"      {problem}")
        click.echo(
            f"{answer['model']} can be served." if not problems else f"{answer['model']} cannot be served like this."
        )
    return ExitCode.FAILED if problems else ExitCode.OK


def _ask_checker(request: dict[str, Any]) -> dict[str, Any]:
    """The checker needs torch, which the command line never imports: it is a process of its own."""
    command = [sys.executable, "-m", "shared.engine.model.checking"]
    try:
        answer = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=True
        )
        return json.loads(answer.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CommandError(
            f"the check failed: {last} (rheocast doctor says what is missing)", ExitCode.FAILED
        ) from None
    except (subprocess.TimeoutExpired, OSError, ValueError, IndexError) as error:
        raise CommandError(f"the check failed: {error}", ExitCode.FAILED) from None


def fetch(name: str, models_dir: Path | None, vae: str) -> None:
    """Download what a published model needs into the models folder; what is there already is kept, a rest resumed."""
    base = base_of(name)
    if base not in DOWNLOADS:
        raise CommandError(
            f"{name} is not published anywhere we know of; models to fetch: {', '.join(DOWNLOADS)}, or -fast"
        )
    root = (models_dir or DEFAULT_MODELS).expanduser().absolute()
    root.mkdir(parents=True, exist_ok=True)
    spec = model_of(name, root).with_vae(vae)
    for number, download in enumerate(DOWNLOADS[base]):
        _from_hub(DOWNLOADS[base][number:], download, root)
    if spec.vae != VaeKind.WAN:
        _from_url(TAEHV_URL, root / "ckpts" / "taew2_1.pth")
    click.echo(f"{name} is in {root}; look it over with: rheocast models check {name} --models-dir {root}")


def _from_hub(wanted: tuple[Download, ...], download: Download, root: Path) -> None:
    """One repository's files; ``wanted`` is what is still to come, for the message when nothing comes."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CommandError(
            'huggingface_hub is not installed: in the checkout pip install -e ".[cli]"', ExitCode.FAILED
        ) from None
    click.echo(f"{download.repository}: {', '.join(download.files)}", err=True)
    try:
        snapshot_download(download.repository, allow_patterns=list(download.files), local_dir=root / download.into)
    except Exception as error:
        # Offline, gated, renamed, full disk: the library raises many kinds; each is told with the way round it.
        reason = (" ".join(str(error).split()) or type(error).__name__)[:160]
        raise CommandError(
            f"{download.repository} cannot be fetched ({reason}); fetch elsewhere and put: "
            + "; ".join(f"{', '.join(d.files)} of {d.repository} into {root / d.into}" for d in wanted),
            ExitCode.FAILED,
        ) from None


def _from_url(url: str, target: Path) -> None:
    """One file, resumed where an earlier try ended."""
    if target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310
    click.echo(url, err=True)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            resumed = answer.status == 206
            with part.open("ab" if resumed else "wb") as out:
                while data := answer.read(1 << 20):
                    out.write(data)
        part.replace(target)
    except (urllib.error.URLError, OSError) as error:
        raise CommandError(f"{url} cannot be fetched ({error}); put the file at {target}", ExitCode.FAILED) from None
