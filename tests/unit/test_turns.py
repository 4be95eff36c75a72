"""A tenant that floods waits for itself only."""

from __future__ import annotations

from services.scheduler.turns import Turns
from shared.contracts.commands import StartStream, StreamSpec


def start(tenant: str, number: int) -> StartStream:
    spec = StreamSpec.model_validate({"source": {"kind": "pattern"}, "prompt": "neon", "tenant": tenant})
    return StartStream(command=f"{tenant}{number}", stream=f"{tenant}-{number}", spec=spec)


def test_a_flood_takes_its_own_places_and_another_tenant_comes_at_once() -> None:
    turns = Turns()
    taken = [turns.offer(start("flood", number)) for number in range(100)]
    assert taken.count(True) == turns.waiting
    assert turns.refused == 100 - turns.waiting
    opening = [turns.next() for _ in range(5)]
    assert [command is not None for command in opening] == [True, True, False, False, False]
    turns.offer(start("calm", 0))
    first = turns.next()
    assert first is not None
    assert first.spec.tenant == "calm"


def test_tenants_take_turns_and_each_ones_starts_keep_their_order() -> None:
    turns = Turns(opening=1)
    for number in range(3):
        for tenant in "ab":
            turns.offer(start(tenant, number))
    order: list[str] = []
    while (command := turns.next()) is not None:
        assert turns.next() is None, "only one at once"
        order.append(command.command)
        turns.opened(command)
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert turns._tenants == {}, "who has nothing is forgotten"


def test_a_start_that_waits_can_be_withdrawn() -> None:
    turns = Turns(per_tenant=1)
    turns.offer(start("a", 0))
    turns.offer(start("a", 1))
    first = turns.next()
    assert first is not None
    assert turns.withdraw(first.stream) is None, "it is being opened: stopping is the desk's"
    waiting = turns.withdraw("a-1")
    assert waiting is not None
    turns.opened(first)
    assert turns.next() is None
