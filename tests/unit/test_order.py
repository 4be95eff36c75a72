"""A hop on a transport that loses, repeats and delays must know which chunk is new."""

from __future__ import annotations

from shared.contracts.order import MAX_GAPS, Arrival, OrderGate


def test_ascending_numbers_are_new_even_across_a_gap() -> None:
    gate = OrderGate()
    assert [gate.arrive(n) for n in (0, 1, 4, 5)] == [Arrival.NEW] * 4


def test_a_repeated_number_is_a_duplicate() -> None:
    gate = OrderGate()
    gate.arrive(0)
    assert gate.arrive(0) is Arrival.DUPLICATE


def test_a_late_number_is_overtaken_once_and_then_a_duplicate() -> None:
    gate = OrderGate()
    gate.arrive(0)
    gate.arrive(2)
    assert gate.arrive(1) is Arrival.OVERTAKEN
    assert gate.arrive(1) is Arrival.DUPLICATE


def test_memory_of_gaps_is_bounded() -> None:
    gate = OrderGate()
    gate.arrive(10 * MAX_GAPS)
    assert gate.arrive(0) is Arrival.DUPLICATE, "forgotten gaps are not dropped a second time"
    assert gate.arrive(10 * MAX_GAPS - 1) is Arrival.OVERTAKEN
