"""A stranger opens the page: camera, style, recording, a second stream, and what goes wrong on the way."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import av
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, Route, expect

from tests.browser.conftest import Complaints, Open
from tests.browser.looking import first_picture_ms, look, moves, until_look

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

SERIOUS = ("serious", "critical")


def serious_findings(page: Page) -> list[str]:
    """What axe finds wrong and grave on the page as it is now."""
    found = Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {node['html'][:120]}" for each in found if each["impact"] in SERIOUS for node in each["nodes"]
    ]


def test_camera_style_record_second_stream_close(
    open_page: Open, tmp_path: Path, complaints: Complaints, record_property: Callable[[str, object], None]
) -> None:
    page = open_page()
    page.click("#use-camera")
    took_ms = first_picture_ms(page, 40)
    record_property("first_picture_ms", took_ms)
    print(f"first restyled picture after {took_ms:.0f} ms")
    assert moves(page), "the restyled picture moves"
    assert moves(page, "#source-frame"), "the camera's picture moves"
    pencil = until_look(page, lambda now: now.colourful < 0.06)
    source = look(page, "#source-frame")
    assert pencil.differs(source) > 0.1, "it is not the source"
    assert pencil.colourful < source.colourful / 2, "a pencil drawing has little colour"

    page.locator(".chip", has_text="thermal").click()
    expect(page.locator("#due")).to_contain_text("live")
    expect(page.locator("#due")).to_contain_text("live after", timeout=30_000)
    assert until_look(page, lambda now: now.colourful > pencil.colourful + 0.1).colourful > pencil.colourful + 0.1
    expect(page.locator('.chip[aria-pressed="true"]')).to_contain_text("thermal")

    page.keyboard.press("r")
    expect(page.locator("#t-record")).to_have_attribute("aria-pressed", "true")
    page.wait_for_timeout(2500)
    page.click("#t-record")
    with page.expect_download() as downloading:
        page.get_by_role("button", name="download").click()
    downloading.value.save_as(tmp_path / "recorded.mp4")
    with av.open(str(tmp_path / "recorded.mp4")) as recorded:
        assert sum(1 for _ in recorded.decode(video=0)) > 4

    complaints.allow = ("503",)  # a busy machine may be full for a moment, and says so
    for _ in range(8):
        page.click("#new-stream")
        page.wait_for_timeout(5000)
        if page.locator("#tiles .tile").count() == 2:
            break
    expect(page.locator("#tiles .tile")).to_have_count(2)
    page.keyboard.press("g")
    expect(page.locator("#wall .tile")).to_have_count(2)
    page.locator("#wall .tile .go").first.click()
    expect(page.locator("#wall")).to_be_hidden()
    assert moves(page)
    page.get_by_role("button", name="Close this stream").first.click()
    expect(page.locator("#tiles")).to_be_hidden()
    assert moves(page, within_s=40), page.inner_text("#vitals") + page.inner_text("#note")


def test_nothing_serious_is_found_in_any_view(open_page: Open) -> None:
    page = open_page()
    assert serious_findings(page) == []
    page.click("#try-sample")
    expect(page.locator("#tools")).to_be_visible(timeout=30_000)
    page.click("#toggle-mix")
    page.click("#timeline-fold summary")
    page.click("#waterfall-fold summary")
    expect(page.locator("#waterfall svg.falls rect").first).to_be_visible(timeout=20_000)
    hint = page.locator("#waterfall svg.falls rect title").first.text_content() or ""
    assert re.fullmatch(r"\w+: [\d.]+ ms waiting, [\d.]+ ms working", hint), hint
    jaeger = page.get_by_role("link", name="Open in Jaeger")
    expect(jaeger).to_have_attribute("href", re.compile(r"^http://127\.0\.0\.1:16686/search\?.*stream\.id"))
    page.wait_for_timeout(1500)
    assert serious_findings(page) == []
    page.click("#toggle-theme")
    page.wait_for_timeout(600)  # colours fade over: what counts is where they arrive
    assert serious_findings(page) == []
    for opener in ("#open-settings", "#open-help"):
        page.click(opener)
        assert serious_findings(page) == []
        page.keyboard.press("Escape")
    page.set_viewport_size({"width": 390, "height": 844})
    page.click("#drawer-pull")
    assert serious_findings(page) == []
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390, "nothing sticks out sideways on a phone"


def test_without_webrtc_the_picture_comes_as_jpegs(open_page: Open) -> None:
    page = open_page(before="delete window.RTCPeerConnection")
    page.click("#use-camera")
    expect(page.get_by_role("alertdialog")).to_contain_text("no WebRTC")
    page.get_by_role("button", name="Try a sample").click()
    print(f"first JPEG after {first_picture_ms(page, 40):.0f} ms")
    assert moves(page)
    page.keyboard.press("c")
    expect(page.locator("#cut")).to_be_visible()
    page.focus("#cut")
    page.keyboard.press("ArrowRight")
    assert float(page.input_value("#cut")) == 50.5


def test_a_refused_camera_says_what_to_do(open_page: Open) -> None:
    refuse = "navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('no', '{}'))"
    for name, words in (
        ("NotAllowedError", "was refused"),
        ("NotFoundError", "No camera"),
        ("NotReadableError", "in use"),
    ):
        page = open_page(before=refuse.replace("{}", name))
        page.click("#use-camera")
        card = page.get_by_role("alertdialog")
        expect(card).to_contain_text(words)
        expect(card.get_by_role("button", name="Try a sample")).to_be_visible()


def test_a_cut_network_is_said_and_healed(open_page: Open, complaints: Complaints) -> None:
    complaints.allow = ("ERR_INTERNET_DISCONNECTED", "ERR_NETWORK")
    page = open_page()
    page.click("#try-sample")
    first_picture_ms(page, 40)
    page.context.set_offline(True)
    expect(page.locator("#note")).to_contain_text("connection is gone", timeout=15_000)
    assert page.locator("#picture").get_attribute("data-held") == "true", "the last picture stands, dimmed"
    assert look(page).bright > 0.05, "and is not black"
    page.context.set_offline(False)
    expect(page.locator("#note")).to_be_hidden(timeout=30_000)
    assert moves(page)


def test_keys_and_refusals(open_page: Open) -> None:
    page = open_page()
    page.click("#try-sample")
    expect(page.locator("#tools")).to_be_visible(timeout=30_000)
    page.keyboard.press("Shift+?")
    expect(page.locator("#help-dialog")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Space")
    expect(page.locator("#note")).to_contain_text("Paused", timeout=15_000)
    page.keyboard.press("Space")
    expect(page.locator("#note")).to_be_hidden(timeout=15_000)
    page.keyboard.press("2")
    expect(page.locator("#prompt")).to_have_value(re.compile("ink drawing"))
    expect(page.locator("#due")).to_contain_text("live", timeout=30_000)
    page.fill("#prompt", "  ")
    page.keyboard.press("Enter")
    expect(page.locator("#due")).to_contain_text("Say what the picture should become")
    page.fill("#prompt", "r f c 1")
    assert page.input_value("#prompt") == "r f c 1", "keys are letters where somebody types"


def test_a_share_link_shows_and_changes_nothing(open_page: Open) -> None:
    page = open_page()
    page.click("#try-sample")
    first_picture_ms(page, 40)
    page.click("#t-share")
    expect(page.locator("#share-dialog")).to_be_visible()
    link = page.input_value("#share-link")
    guest = open_page(link[link.index("/?") :])
    expect(guest.locator("#tools")).to_be_visible(timeout=30_000)
    expect(guest.locator("#desk")).to_be_hidden()
    expect(guest.locator("#t-pause")).to_be_hidden()
    assert "token" not in guest.url, "the token leaves the address at once"
    expect(guest.locator("#picture .player")).to_have_attribute("data-state", "live", timeout=30_000)
    assert moves(guest)


def test_a_token_is_asked_for_and_kept_in_the_tab(open_page: Open, complaints: Complaints) -> None:
    complaints.allow = ("401",)
    page = open_page(small=False)
    seen: list[str | None] = []

    def guarded(route: Route) -> None:
        token = route.request.headers.get("authorization")
        seen.append(token)
        if token == "Bearer rheo_secret":
            route.continue_()
        else:
            route.fulfill(
                status=401, content_type="application/problem+json", body='{"title": "Token needed", "status": 401}'
            )

    page.route("**/v1/**", guarded)
    page.reload()
    expect(page.locator("#token-dialog")).to_be_visible()
    page.fill("#token", "rheo_secret")
    page.keyboard.press("Enter")
    page.click("#try-sample")
    expect(page.locator("#tools")).to_be_visible(timeout=30_000)
    assert seen[-1] == "Bearer rheo_secret"
    assert page.evaluate("localStorage.length ? Object.values({...localStorage}).join() : ''").find("rheo_secret") < 0
