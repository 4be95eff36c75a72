"""The page's files are served, and nothing else at the paths the API does not have."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from services.gateway.api.pages import PAGE_DIR, install_page


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    install_page(app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as client:
        yield client


async def test_every_file_that_the_page_names_is_there(client: httpx.AsyncClient) -> None:
    home = await client.get("/")
    assert home.status_code == 200
    assert home.headers["cache-control"] == "no-cache"
    named = set(re.findall(r'(?:src|href)="([\w.-]+\.\w+)"', home.text))
    for path in PAGE_DIR.glob("*.js"):
        named |= set(re.findall(r'from "\./([\w.-]+)"', path.read_text("utf-8")))
    assert {"main.js", "style.css", "theme.js", "icon.svg"} <= named
    for name in sorted(named):
        answer = await client.get(f"/{name}")
        assert answer.status_code == 200, name
        kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}[name.rpartition(".")[2]]
        assert answer.headers["content-type"].startswith(kind), name
    again = await client.get("/main.js", headers={"If-None-Match": (await client.get("/main.js")).headers["etag"]})
    assert again.status_code == 304


async def test_what_is_not_there_is_not_found(client: httpx.AsyncClient) -> None:
    for path in ("/index.htm", "/v1/nothing", "/..%2fapp.py", "/main.js/", "/services/gateway/app.py"):
        assert (await client.get(path)).status_code in (307, 404), path
    assert (await client.delete("/v1/uploads/..%2f..%2fsecret")).status_code == 404
    assert (await client.post("/main.js")).status_code == 405


def test_the_page_takes_nothing_from_elsewhere() -> None:
    """No CDN, no inline script or style: the content security policy would refuse them, and offline it could not work."""
    for path in PAGE_DIR.iterdir():
        text = path.read_text("utf-8")
        addresses = set(re.findall(r'https?://[^\s"\'`)]+', text)) - {
            "http://www.w3.org/2000/svg",
            "https://example.com/live.m3u8",
        }
        assert addresses == set(), path.name
    page = (PAGE_DIR / "index.html").read_text("utf-8")
    assert not re.search(r"<script(?![^>]*src=)|\sstyle=|\son\w+=", page)


def test_modules_are_short() -> None:
    long = {path.name: n for path in PAGE_DIR.glob("*.js") if (n := len(path.read_text("utf-8").splitlines())) > 300}
    assert long == {}


def test_a_build_without_a_page_shows_the_api(tmp_path: Path) -> None:
    app = FastAPI()
    install_page(app, tmp_path)
    assert [route.path for route in app.routes if getattr(route, "name", "") == "home"] == ["/"]
