"""The desk's rarer controls: a mix of two prompts, a timeline, an upload, the wall of streams that run already."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Complaints, Open
from tests.browser.looking import first_picture_ms, look, moves, until_look
from tests.support import clips

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


def test_two_prompts_are_mixed_by_weight(open_page: Open) -> None:
    page = open_page()
    page.click("#try-sample")
    first_picture_ms(page, 40)
    page.click("#toggle-mix")
    page.fill("#prompt2", "a thermal camera")
    page.fill("#weight", "90")
    expect(page.locator("#w2")).to_have_text("90")
    with page.expect_request("**/prompt") as asked:
        page.press("#prompt2", "Enter")
    sent = json.loads(asked.value.post_data or "{}")
    assert [part["weight"] for part in sent["prompts"]] == [pytest.approx(0.1), 0.9]
    expect(page.locator("#due")).to_contain_text("live after", timeout=30_000)
    # Another size, while it runs: the same stream, and the viewer's picture follows.
    page.evaluate(
        "document.querySelector('select[aria-label=Size]').add(new Option('96×64'))"
    )  # there is room for that
    with page.expect_request(lambda request: request.method == "PATCH") as changed:
        page.select_option('select[aria-label="Size"]', "96×64")
    assert json.loads(changed.value.post_data or "{}") == {"width": 96, "height": 64}
    width = "document.querySelector('#picture video').videoWidth"
    until = time.monotonic() + 30
    while (seen := page.evaluate(width)) != 96 and time.monotonic() < until:
        page.wait_for_timeout(100)
    assert seen == 96
    assert moves(page)
    expect(page.get_by_label("Size", exact=True)).to_have_value("96×64")


def test_a_timeline_from_scope_plays_and_loops(open_page: Open, tmp_path: Path) -> None:
    scope = {
        "prompts": [
            {"startTime": 0, "endTime": 2, "prompts": [{"text": "a thermal camera", "weight": 100}]},
            {"startTime": 2, "endTime": 4, "prompts": [{"text": "a pencil drawing", "weight": 100}]},
        ],
        "version": "2.1",
    }
    (tmp_path / "timeline.json").write_text(json.dumps(scope))
    page = open_page()
    page.click("#try-sample")
    first_picture_ms(page, 40)
    pencil = look(page)
    page.click("#timeline-fold summary")
    page.locator("#timeline input[type=file]").set_input_files(tmp_path / "timeline.json")
    expect(page.locator("#timeline .cue")).to_have_count(2)
    page.get_by_role("button", name="play", exact=True).click()
    expect(page.locator("#timeline .cue").nth(1)).to_have_attribute("aria-current", "true", timeout=15_000)
    expect(page.locator("#timeline .cue").nth(0)).to_have_attribute("aria-current", "true", timeout=15_000)
    hot = until_look(page, lambda now: now.colourful > pencil.colourful + 0.1)
    assert hot.colourful > pencil.colourful + 0.1, "the timeline's style is on the picture"
    page.get_by_role("button", name="stop", exact=True).click()
    expect(page.get_by_role("button", name="play", exact=True)).to_be_visible()


def test_a_file_is_uploaded_and_restyled(open_page: Open, tmp_path: Path) -> None:
    clips.make_clip(tmp_path / "walk.mp4", frames=64, width=160, height=96, fps=8)
    page = open_page()
    with page.expect_file_chooser() as choosing:
        page.get_by_role("button", name="open a file").click()
    choosing.value.set_files(tmp_path / "walk.mp4")
    first_picture_ms(page, 40)
    assert moves(page)
    expect(page.locator('.kinds [data-kind="file"]')).to_have_attribute("aria-pressed", "true")


def test_what_cannot_start_says_why(open_page: Open, complaints: Complaints) -> None:
    complaints.allow = ("409", "422")
    page = open_page()
    page.get_by_role("button", name="paste an address").click()
    page.fill("#url", "http://127.0.0.1:9/private.mp4")
    page.keyboard.press("Enter")
    card = page.get_by_role("alertdialog")
    expect(card).to_contain_text("That did not start", timeout=30_000)
    expect(card.get_by_role("button", name="Try a sample")).to_be_visible()
