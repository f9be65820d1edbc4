"""Requests that come together begin a few in each turn of the loop, in their order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from peft_serve.api.turnstile import Turnstile

MOST = 4


class House:
    """An application behind a turnstile that notes who begins, and in which turn of the loop."""

    def __init__(self, clock: Callable[[], float] = lambda: 0.0) -> None:
        self.begun: list[tuple[int, str]] = []
        self.turn = 0
        self.door = Turnstile(self._app, clock=clock, most=MOST)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun.append((self.turn, scope["path"]))

    def ask(self, path: str, kind: str = "http") -> asyncio.Task[None]:
        return asyncio.ensure_future(self.door({"type": kind, "path": path}, None, None))  # type: ignore[arg-type]

    async def count(self) -> None:
        while True:
            self.turn += 1
            await asyncio.sleep(0)


async def test_a_crowd_comes_in_bit_by_bit_and_nobody_is_passed() -> None:
    house = House()
    counting = asyncio.ensure_future(house.count())
    names = [str(i) for i in range(10 * MOST)]
    await asyncio.gather(*map(house.ask, names))
    assert [path for _, path in house.begun] == names
    turns = [turn for turn, _ in house.begun]
    assert max(turns.count(turn) for turn in turns) <= MOST
    assert all(after - before <= 1 for before, after in pairwise(turns[MOST:])), "no turn is lost while somebody waits"
    begun = house.turn
    await asyncio.sleep(0)
    await house.ask("late")
    turn, path = house.begun[-1]
    assert path == "late"
    assert turn - begun <= 2, "who comes alone waits for nobody"
    counting.cancel()


async def test_who_leaves_the_line_takes_nobodys_turn_and_others_pass_by_at_once() -> None:
    house = House()
    tasks = [house.ask(str(i)) for i in range(4 * MOST)]
    await asyncio.sleep(0)
    for left in tasks[MOST : 2 * MOST]:
        left.cancel()
    await house.ask("startup", kind="lifespan")
    assert house.begun[MOST][1] == "startup"
    await asyncio.gather(*tasks, return_exceptions=True)
    stayed = [*range(MOST), *range(2 * MOST, 4 * MOST)]
    assert [path for _, path in house.begun if path != "startup"] == [str(i) for i in stayed]


async def test_where_beginning_takes_long_fewer_begin_in_a_turn() -> None:
    time_s = [0.0]

    def clock() -> float:
        time_s[0] += 1.0  # a second between any two turns
        return time_s[0]

    house = House(clock)
    counting = asyncio.ensure_future(house.count())
    await asyncio.gather(*(house.ask(str(i)) for i in range(20)))
    turns = [turn for turn, _ in house.begun]
    assert [turns.count(turn) for turn in dict.fromkeys(turns)][-5:] == [1] * 5
    counting.cancel()
