"""One running system for all of it, one Chromium, and a page that must not complain."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.e2e.conftest import Rheocast, processes_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
]


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``rheocast up`` on a free port: its address. Afterwards nothing of it may be left."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    folder = tmp_path_factory.mktemp("browser")
    (folder / "media").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rheocast = Rheocast(folder)
    log = (folder / "log").open("w")
    jaeger = {"RHEOCAST_JAEGER_URL": "http://127.0.0.1:16686"}
    process = rheocast.start("up", "--port", str(port), "--media", folder / "media", env=jaeger)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "Rheocast is up" in line, line
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        log.write(err)
        log.close()
    assert process.returncode == 0, err
    assert processes_of(rheocast.run_id) == []


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium with a camera that shows a moving test picture, and grants it."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


class Complaints:
    """What the browser's console said against the page. ``allow`` names what a test provokes."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.allow: tuple[str, ...] = ()

    def listen(self, page: Page) -> None:
        page.on(
            "console", lambda message: self._console(message.type, f"{message.text} {message.location.get('url', '')}")
        )
        page.on("pageerror", lambda error: self.said.append(str(error)))

    def _console(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.said.append(text)

    @property
    def left(self) -> list[str]:
        """Those that nobody allowed."""
        return [text for text in self.said if not any(word in text for word in self.allow)]


Open = Callable[..., Page]


@pytest.fixture
def complaints() -> Iterator[Complaints]:
    """No console error, in every test."""
    heard = Complaints()
    yield heard
    assert heard.left == []


@pytest.fixture
def open_page(browser: Browser, system: str, complaints: Complaints) -> Iterator[Open]:
    """Opens the page in a context of its own; small, slow streams, so that two of them fit on two busy cores."""
    contexts: list[BrowserContext] = []

    def opened(path: str = "/", *, before: str = "", small: bool = True, **options: object) -> Page:
        options = {"viewport": {"width": 1440, "height": 900}, "accept_downloads": True, **options}
        context = browser.new_context(**options)  # type: ignore[arg-type]
        contexts.append(context)
        if small:
            context.add_init_script(
                "localStorage.setItem('rheocast.size', '160×96'); localStorage.setItem('rheocast.fps', '8')"
            )
        if before:
            context.add_init_script(before)
        page = context.new_page()
        page.set_default_timeout(30_000)
        complaints.listen(page)
        page.goto(system + path)
        return page

    yield opened
    for context in contexts:
        context.close()
    _stop_all(system)


def _stop_all(system: str) -> None:
    for stream in httpx.get(f"{system}/v1/streams").json()["streams"]:
        if stream["state"] not in ("stopped", "failed"):
            httpx.delete(f"{system}/v1/streams/{stream['id']}", timeout=40)
