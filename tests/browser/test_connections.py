"""What the page holds open, and lets go of: connections, the camera, credentials. Against a gateway that counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import Complaints
from tests.browser.fake_gateway import FakeGateway
from tests.browser.looking import look, moves

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

NO_WEBRTC = "delete window.RTCPeerConnection"
KEEP_TRACKS = """window.tracks = [];
const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
navigator.mediaDevices.getUserMedia = async (wanted) => {
  const media = await ask(wanted);
  window.tracks.push(...media.getTracks());
  return media;
};"""
KEEP_SERVERS = """window.given = [];
window.RTCPeerConnection = class extends RTCPeerConnection {
  constructor(config) {
    super(config);
    window.given.push(config.iceServers.map((each) => each.username));
  }
};
window.ahead = 0;
const now = Date.now.bind(Date);
Date.now = () => now() + window.ahead;"""
WATCH = """async () => {
  const { watch } = await import("/rtc.js");
  const refused = new Promise((done) => {
    window.kept = watch("none", document.createElement("video"), (state) => state === "refused" && done());
  });
  await refused;
  window.kept.stop(false);
  return window.given.at(-1);
}"""

Visit = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser, complaints: Complaints) -> Iterator[Visit]:
    """Opens the page of a fake gateway in a context of its own."""
    contexts = []

    def visited(gateway: FakeGateway, before: str = "") -> Page:
        context = browser.new_context(viewport={"width": 1440, "height": 900})
        contexts.append(context)
        context.add_init_script(before)
        page = context.new_page()
        page.set_default_timeout(15_000)
        complaints.listen(page)
        page.goto(gateway.address)
        return page

    yield visited
    for context in contexts:
        context.close()


def until(page: Page, true: Callable[[], bool], within_s: float = 10.0) -> bool:
    """Whether it becomes true."""
    end = time.monotonic() + within_s
    while not true():
        if time.monotonic() > end:
            return False
        page.wait_for_timeout(50)
    return True


def shown(page: Page, place: str = "#picture") -> bool:
    """Whether a picture comes there, and moves."""
    page.locator(f"{place} .player").wait_for(state="attached")
    return moves(page, place)


def held_for(stream: str) -> set[tuple[str, str]]:
    return {(stream, "events"), (stream, "mjpeg"), (stream, "source/mjpeg")}


def test_connections_are_held_for_the_focused_stream_only(visit: Visit) -> None:
    with FakeGateway(streams=8).running() as gateway:
        page = visit(gateway, NO_WEBRTC)
        expect(page.locator("#tiles .tile")).to_have_count(8)
        assert until(page, lambda: gateway.holds() == held_for("s8")), gateway.holds()
        assert shown(page)
        assert shown(page, "#source-frame")

        others = [f"GET /v1/streams/s{n}/snapshot.jpg" for n in range(1, 8)]
        assert until(page, lambda: all(gateway.times(each) > 0 for each in others)), "every other one has a picture"
        begin = [gateway.times(each) for each in others]
        page.wait_for_timeout(4000)
        took = [gateway.times(each) - before for each, before in zip(others, begin, strict=True)]
        assert all(2 <= each <= 5 for each in took), f"about one a second each: {took}"
        assert gateway.glances_at_once == 1
        assert gateway.times("GET /v1/streams/s8/snapshot.jpg") <= 1, "the focused one has better"

        # A change is not kept waiting behind what is held.
        with page.expect_response(lambda answer: answer.request.method in ("PATCH", "POST"), timeout=5000):
            page.keyboard.press("2")


def test_what_was_told_meanwhile_is_shown_when_the_focus_comes_back(visit: Visit) -> None:
    with FakeGateway(streams=5).running() as gateway:
        page = visit(gateway, NO_WEBRTC)
        heard = gateway.tell("s5", "warning", "the first warning")
        expect(page.locator("#toasts")).to_contain_text("the first warning")
        page.locator("#tiles .go", has_text="prompt of s2").click()
        assert until(page, lambda: gateway.holds() == held_for("s2")), gateway.holds()
        assert shown(page)
        gateway.tell("s5", "source_lost", "It was unplugged.")
        gateway.tell("s1", "source_lost", "It never came.")
        page.wait_for_timeout(1000)
        expect(page.locator("#note")).to_be_hidden()
        page.locator("#tiles .go", has_text="prompt of s5").click()
        expect(page.locator("#note")).to_contain_text("It was unplugged.")
        assert until(page, lambda: gateway.holds() == held_for("s5")), gateway.holds()
        assert gateway.resumed["s5"] == ["0", heard]
        page.locator("#tiles .go", has_text="prompt of s1").click()
        expect(page.locator("#note")).to_contain_text("It never came.")


def test_an_ended_stream_is_asked_for_nothing_more(visit: Visit) -> None:
    with FakeGateway(streams=2).running() as gateway:
        page = visit(gateway, NO_WEBRTC)
        assert shown(page)
        assert shown(page, "#source-frame")
        gateway.tell("s2", "failed", "the machine broke")
        gateway.end("s2", "failed", "the machine broke")
        expect(page.locator("#note")).to_contain_text("the machine broke")
        assert until(page, lambda: not gateway.holds() & {("s2", "mjpeg"), ("s2", "source/mjpeg")}), gateway.holds()
        assert look(page).bright > 0.05, "the last result stands"
        assert look(page, "#source-frame").bright > 0.05, "and the last of the source"
        parts = ("mjpeg", "source/mjpeg", "snapshot.jpg")
        asked = [gateway.times(f"GET /v1/streams/s2/{part}") for part in parts]
        page.locator("#tiles .go", has_text="prompt of s1").click()
        assert until(page, lambda: ("s1", "source/mjpeg") in gateway.holds()), gateway.holds()
        page.locator("#tiles .go", has_text="prompt of s2").click()
        page.wait_for_timeout(2000)
        assert [gateway.times(f"GET /v1/streams/s2/{part}") for part in parts] == asked


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_the_camera_is_let_go_when_its_stream_ends(visit: Visit, complaints: Complaints, state: str) -> None:
    complaints.allow = ("404",)  # this gateway takes no WebRTC
    with FakeGateway().running() as gateway:
        page = visit(gateway, KEEP_TRACKS)
        page.click("#use-camera")
        assert until(page, lambda: len(gateway.views) == 1)
        assert shown(page, "#source-frame")
        states = "() => window.tracks.map((track) => track.readyState)"
        assert page.evaluate(states) == ["live"]
        gateway.end("made0", state, "that is all")
        expect(page.locator("#note")).to_contain_text("that is all")
        assert page.evaluate(states) == ["ended"]
        assert look(page, "#source-frame").bright > 0.05, "its last picture stands"
        page.wait_for_timeout(500)
        assert look(page, "#source-frame").bright > 0.05


def test_turn_credentials_are_asked_for_again(visit: Visit, complaints: Complaints) -> None:
    complaints.allow = ("404", "500")
    first, second = ([{"urls": ["turn:127.0.0.1:9"], "username": who, "credential": "x"}] for who in ("one", "two"))
    with FakeGateway().running() as gateway:
        gateway.ice = [None, first, None, second]
        page = visit(gateway, KEEP_SERVERS)
        times = "GET /v1/ice-servers"
        assert page.evaluate(WATCH) == [], "it failed"
        assert page.evaluate(WATCH) == ["one"], "which is not kept"
        page.evaluate("window.ahead = 4 * 60_000")
        assert (page.evaluate(WATCH), gateway.times(times)) == (["one"], 2)
        page.evaluate("window.ahead = 6 * 60_000")
        assert (page.evaluate(WATCH), gateway.times(times)) == (["one"], 3), "the last answer while none comes"
        assert (page.evaluate(WATCH), gateway.times(times)) == (["two"], 4)
