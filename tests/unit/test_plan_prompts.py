"""Prompt versions: none is used before every stage is ready, and none after it was retired."""

from __future__ import annotations

import json

import pytest

from shared.engine.plan.prompts import IllegalPromptMoveError, PromptLedger, PromptNotReadyError, PromptState, digest


def test_the_digest_tells_models_and_prompts_apart():
    assert len(digest("rheo-tiny", "a pencil drawing")) == 64
    assert digest("a", "bc") != digest("ab", "c")
    assert digest("m", "héron") == digest("m", "héron") != digest("m", "heron")


def test_a_version_is_used_only_after_every_stage_has_said_ready():
    ledger = PromptLedger()
    version = ledger.prepare("d1", stages=3)
    assert ledger.state_of(version) is PromptState.PREPARING
    assert not ledger.stage_ready(version, 2)
    assert not ledger.stage_ready(version, 2)  # a repeated answer counts once
    assert not ledger.stage_ready(version, 0)
    with pytest.raises(PromptNotReadyError, match=r"preparing, stages \(1,\) are missing"):
        ledger.require(version)
    assert ledger.stage_ready(version, 1)
    assert ledger.require(version) == "d1"
    assert not ledger.stage_ready(version, 1)


def test_the_old_prompt_serves_until_the_new_one_is_ready():
    ledger = PromptLedger()
    old = ledger.prepare("d1", 1)
    ledger.stage_ready(old, 0)
    new = ledger.prepare("d2", 1)
    assert ledger.newest_ready == old
    ledger.stage_ready(new, 0)
    assert ledger.newest_ready == new
    assert ledger.retire_before(new) == (old,)
    assert ledger.kept == {new}
    assert ledger.state_of(old) is PromptState.RETIRED
    with pytest.raises(PromptNotReadyError, match="retired"):
        ledger.require(old)


def test_a_retired_version_cannot_come_back():
    ledger = PromptLedger()
    version = ledger.prepare("d1", 1)
    ledger.retire(version)
    assert not ledger.stage_ready(version, 0)  # the answer was under way
    with pytest.raises(IllegalPromptMoveError, match="retired → retired"):
        ledger.retire(version)


def test_a_stage_that_came_back_empty_must_prepare_again():
    ledger = PromptLedger()
    version = ledger.prepare("d1", 2)
    for stage in (0, 1):
        ledger.stage_ready(version, stage)
    assert ledger.stage_lost(1) == (version,)
    assert ledger.newest_ready is None
    assert ledger.stage_ready(version, 1)


def test_foreign_versions_and_stages_are_errors():
    ledger = PromptLedger()
    with pytest.raises(PromptNotReadyError, match="never prepared"):
        ledger.require(1)
    with pytest.raises(PromptNotReadyError, match="never prepared"):
        ledger.stage_ready(5, 0)
    version = ledger.prepare("d1", 2)
    with pytest.raises(ValueError, match="none of the 2"):
        ledger.stage_ready(version, 2)


def test_another_scheduler_takes_the_ledger_over():
    ledger = PromptLedger()
    ledger.stage_ready(ledger.prepare("d1", 1), 0)
    ledger.stage_ready(ledger.prepare("d2", 2), 1)
    twin = PromptLedger.from_state(json.loads(json.dumps(ledger.state())))
    assert twin.newest_ready == 1
    assert twin.stage_ready(2, 0)
    assert twin.prepare("d3", 1) == 3
