"""How much is done in one turn of the event loop: as much as the turns before had time for."""

from __future__ import annotations

from peft_serve.engine.lots import TURN_S, Lot


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def sizes(clock: Clock, lot: Lot, times: list[float]) -> list[int]:
    """The size after each of these turns."""
    found = []
    for seconds in times:
        clock.now += seconds
        lot.turn()
        found.append(lot.size)
    return found


def test_long_turns_halve_it_and_short_ones_let_it_grow_again() -> None:
    clock = Clock()
    lot = Lot(clock, most=32)
    lot.turn()
    assert sizes(clock, lot, [2 * TURN_S] * 7) == [16, 8, 4, 2, 1, 1, 1]
    assert sizes(clock, lot, [0.75 * TURN_S] * 2) == [1, 1]  # neither long nor short
    assert sizes(clock, lot, [0.1 * TURN_S] * 40)[-1] == 32


def test_the_time_in_which_nothing_was_due_counts_for_nothing() -> None:
    clock = Clock()
    lot = Lot(clock, most=32)
    for _ in range(3):
        lot.turn()
        lot.rest()
        clock.now += 100.0
    assert lot.size == 32
