"""Pausing and going on: every command is carried out once and answered each time, with the right chunk."""

from __future__ import annotations

from services.ingest.pausing import MAX_REMEMBERED, Answer, Pauses


def test_a_pause_names_the_last_chunk_and_going_on_the_first_one_after_it() -> None:
    pauses = Pauses()
    pauses.numbered(6, 24, 27)
    assert pauses.ask("p", True, ended=False) == (True, [Answer("p", 6, 27, "paused")])
    assert pauses.ask("r", False, ended=False) == (True, [])
    assert pauses.numbered(7, 28, 31) == [Answer("r", 7, 28, "resumed")]
    assert pauses.numbered(8, 32, 35) == []


def test_a_chunk_that_was_on_its_way_out_before_the_pause_is_not_the_first_after_it() -> None:
    pauses = Pauses()
    pauses.numbered(3, 12, 15)
    pauses.ask("p", True, ended=False)
    pauses.ask("r", False, ended=False)
    assert pauses.numbered(3, 12, 15) == []
    assert [answer.chunk for answer in pauses.numbered(4, 16, 19)] == [4]


def test_known_commands_are_answered_again_and_change_nothing() -> None:
    pauses = Pauses()
    pauses.numbered(0, 0, 4)
    first = pauses.ask("p", True, ended=False)[1]
    pauses.ask("r", False, ended=False)
    assert pauses.ask("r", False, ended=False) == (False, [])
    assert pauses.ask("p", True, ended=False) == (False, first)
    resumed = pauses.numbered(1, 5, 8)
    assert pauses.ask("r", False, ended=False) == (False, resumed)


def test_every_command_to_go_on_is_answered_even_without_a_chunk() -> None:
    pauses = Pauses()
    pauses.numbered(2, 8, 11)
    pauses.ask("r1", False, ended=False)
    pauses.ask("r2", False, ended=False)
    told = pauses.ask("p", True, ended=False)[1]
    assert [(a.command, a.chunk) for a in told] == [("r1", -1), ("r2", -1), ("p", 2)]
    pauses.ask("r3", False, ended=False)
    assert [(a.command, a.chunk) for a in pauses.finish()] == [("r3", -1)]
    assert pauses.ask("r4", False, ended=True) == (False, [Answer("r4", -1, -1, "resumed, but the source has ended")])


def test_what_is_remembered_is_bounded() -> None:
    pauses = Pauses()
    for number in range(3 * MAX_REMEMBERED):
        pauses.ask(f"p{number}", True, ended=False)
    newest = f"p{3 * MAX_REMEMBERED - 1}"
    assert pauses.ask(newest, True, ended=False)[0] is False
    assert pauses.ask("p0", True, ended=False)[0] is True
