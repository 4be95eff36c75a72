"""``rheocast models``: what is listed, what a check finds and tells, what fetch fetches, and what it says offline."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from services.cli import models
from services.cli.errors import CommandError
from shared.engine.model.checking import check_model, spec_of_folder
from shared.engine.plan.model_parts import find_parts
from shared.engine.plan.registry import model_spec
from shared.engine.plan.spec import SpecError
from tests.support import wan_files
from tests.support.wan_files import tiny_wan


def rheocast(*arguments: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The command line as a process, with the environment changed."""
    command = [sys.executable, "-m", "services.cli", *map(str, arguments)]
    root = Path(__file__).resolve().parents[2]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RHEOCAST_", "HF_"))}
    clean |= {"PYTHONPATH": str(root), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", **env}
    return subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    wan_files.write_model(tiny_wan(), root / "tiny-wan")
    return root


def test_presets_and_folders_are_listed_with_what_is_missing(root: Path) -> None:
    lines = {line["model"]: line for line in models.listed(root)}
    assert {"rheo-tiny", "tiny-wan", "wan2.1-1.3b", "wan2.1-14b-fast"} <= set(lines)
    assert lines["tiny-wan"]["complete"]
    assert lines["rheo-tiny"]["complete"]
    assert not lines["wan2.1-1.3b"]["complete"]
    assert lines["wan2.1-1.3b-fast"]["parts"] == dict.fromkeys(["dit", "vae", "taehv", "text", "tokenizer"])


def test_a_broken_folder_does_not_hide_the_others(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "spec.json").write_text("[]")
    lines = {line["model"]: line for line in models.listed(tmp_path)}
    assert "no JSON object" in lines["odd"]["error"]
    assert lines["rheo-tiny"]["complete"]


def test_a_check_names_every_part_and_every_fault(root: Path, tmp_path: Path) -> None:
    findings = check_model(model_spec("tiny-wan", root), find_parts("tiny-wan", root))
    assert [f["part"] for f in findings] == ["dit", "vae", "text", "tokenizer"]
    assert not any(f["problems"] for f in findings)
    assert (findings[0]["tensors"], findings[2]["tensors"]) == (96, 22)

    spec = tiny_wan()
    wan_files.write_model(spec, tmp_path / "tiny-wan")
    file = tmp_path / "tiny-wan" / "model.pt"
    state = torch.load(file, weights_only=True)
    state["generator"]["model.head.head.bias"] = torch.zeros(7)
    del state["generator"]["model.blocks.2.ffn.0.bias"]
    torch.save(state, file)
    (tmp_path / "tiny-wan" / "google" / "umt5-xxl" / "tokenizer.json").write_text("nothing")
    dit, vae, text, tokenizer = check_model(spec, find_parts("tiny-wan", tmp_path))
    assert dit["problems"] == [
        f"blocks.2.ffn.0.bias: tensor missing in {file}",
        f"head.head.bias is [7], the model needs [64] ({file})",
    ]
    assert vae["problems"] == text["problems"] == []
    assert "no tokenizer that can be read" in tokenizer["problems"][0]


def test_a_folder_says_which_model_it_is_or_is_told(root: Path, tmp_path: Path) -> None:
    assert spec_of_folder(root / "tiny-wan").layers == 3
    (tmp_path / "config.json").write_text(json.dumps({"num_layers": 40}))
    assert spec_of_folder(tmp_path).name == "wan2.1-14b"
    assert spec_of_folder(tmp_path, "wan2.1-1.3b").name == "wan2.1-1.3b"
    (tmp_path / "config.json").unlink()
    with pytest.raises(SpecError, match="add --as NAME"):
        spec_of_folder(tmp_path)


def test_check_as_a_command_prints_faults_and_fails(root: Path, tmp_path: Path) -> None:
    good = rheocast("models", "check", "tiny-wan", "--models-dir", root, "--json", cwd=tmp_path)
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["ok"] is True
    wan_files.write_generator(tiny_wan(), tmp_path / "half")
    bad = rheocast("models", "check", "./half", "--as", "wan2.1-1.3b", cwd=tmp_path)
    assert bad.returncode == 1
    assert "has dim 64, ffn_dim 128, but wan2.1-1.3b has dim 1536, ffn_dim 8960" in bad.stdout
    assert "no vae weights in" in bad.stdout
    assert "cannot be served like this" in bad.stdout
    unknown = rheocast("models", "check", "nonesuch", cwd=tmp_path)
    assert unknown.returncode == 1
    assert "known: rheo-tiny, wan2.1-1.3b" in unknown.stderr


def test_offline_one_line_names_the_files_and_their_places(tmp_path: Path) -> None:
    result = rheocast(
        "models", "fetch", "wan2.1-1.3b-fast", cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf")
    )
    assert result.returncode == 1
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("rheocast: error: jerryfeng/StreamDiffusionV2 cannot be fetched")
    assert f"wan_causal_dmd_v2v/model.pt of jerryfeng/StreamDiffusionV2 into {tmp_path / 'models' / 'ckpts'}" in line
    assert "models_t5_umt5-xxl-enc-bf16.pth" in line
    assert "Traceback" not in result.stderr
    with pytest.raises(CommandError, match="not published anywhere"):
        models.fetch("rheo-tiny", tmp_path, "auto")


FILES = {
    "jerryfeng/StreamDiffusionV2": ("wan_causal_dmd_v2v/model.pt", "wan_causal_dmd_v2v_14b/model.pt", "README.md"),
    "Wan-AI/Wan2.1-T2V-1.3B": (
        *("config.json", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json"),
        *("diffusion_pytorch_model.safetensors", "assets/logo.png"),
    ),
}


class Hub(BaseHTTPRequestHandler):
    """As much of a model hub as a download asks of it; contents are the files' names, many times over."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        sha = "0" * 40
        data, headers = b"", {"X-Repo-Commit": sha}
        if path.startswith("api/models/"):
            repo = "/".join(path.split("/")[2:4])
            if "/tree/" in path:
                listing = [{"type": "file", "path": f, "size": 1, "oid": "0" * 40} for f in FILES[repo]]
                data = json.dumps(listing).encode()
            else:
                siblings = [{"rfilename": name} for name in FILES[repo]]
                data = json.dumps({"id": repo, "sha": sha, "siblings": siblings, "private": False}).encode()
            headers["Content-Type"] = "application/json"
        elif "/resolve/" in path:
            data = path.partition("/resolve/")[2].partition("/")[2].encode() * 50
            headers["ETag"] = f'"{hashlib.sha1(data, usedforsecurity=False).hexdigest()}"'
        else:
            data = b"0123456789"
        status = 200
        if wanted := self.headers.get("Range"):
            data, status = data[int(wanted.removeprefix("bytes=").partition("-")[0]) :], 206
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join(5)
    server.server_close()


def test_fetch_brings_the_files_that_are_needed_where_they_are_looked_for(hub: str, tmp_path: Path) -> None:
    result = rheocast(
        "models", "fetch", "wan2.1-1.3b", "--vae", "wan", cwd=tmp_path, HF_ENDPOINT=hub, HF_HOME=str(tmp_path / "hf")
    )
    assert result.returncode == 0, result.stderr
    got = {str(p.relative_to(tmp_path / "models")) for p in (tmp_path / "models").rglob("*") if p.is_file()}
    assert {name for name in got if ".cache" not in name} == {
        "ckpts/wan_causal_dmd_v2v/model.pt",
        *(f"Wan2.1-T2V-1.3B/{name}" for name in FILES["Wan-AI/Wan2.1-T2V-1.3B"][:4]),
    }
    assert (tmp_path / "models" / "Wan2.1-T2V-1.3B" / "config.json").read_text() == "config.json" * 50
    assert all(models.listed(tmp_path / "models")[i]["model"] for i in range(2))
    found = {line["model"]: line for line in models.listed(tmp_path / "models")}
    assert found["wan2.1-1.3b"]["complete"], "what was fetched is found"
    assert [part for part, path in found["wan2.1-1.3b-fast"]["parts"].items() if path is None] == ["taehv"]


def test_a_download_goes_on_where_it_ended(hub: str, tmp_path: Path) -> None:
    target = tmp_path / "ckpts" / "taew2_1.pth"
    target.parent.mkdir()
    (target.parent / "taew2_1.pth.part").write_bytes(b"0123")
    models._from_url(f"{hub}/taew2_1.pth", target)
    assert target.read_bytes() == b"0123456789"
    assert not (target.parent / "taew2_1.pth.part").exists()
    with pytest.raises(CommandError, match=r"cannot be fetched .* put the file at .*other"):
        models._from_url("http://127.0.0.1:9/none", tmp_path / "other")
