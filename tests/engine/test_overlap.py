"""What a step leaves to tell is told while the device computes the next one, in order, and nobody waits for news."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest

from peft_serve.core import AdapterId, Event, FinishEvent, FinishReason, RequestId, Step, StepResult, TokenEvent
from peft_serve.engine.client import EngineClient
from peft_serve.engine.outbox import Outbox
from peft_serve.engine.snapshot import EngineState
from peft_serve.errors import Unavailable
from tests.engine.test_engine import House, collect, request


@dataclass
class Device:
    """Runs steps apart from the host: whatever is told is noted, with whether a step was under way."""

    model: Callable[[Step], StepResult]
    meanwhile: Callable[[], None] = lambda: None
    computing: bool = False
    steps: list[int] = field(default_factory=list)
    told: list[tuple[bool, Event]] = field(default_factory=list)
    gate: Callable[[int], object] = lambda _: None

    def overlap(self, meanwhile: Callable[[], None]) -> bool:
        self.meanwhile = meanwhile
        return True

    def run(self, step: Step) -> StepResult:
        self.steps.append(step.id)
        self.computing = True
        self.gate(len(self.steps))
        self.meanwhile()
        self.computing = False
        return self.model(step)

    def note(self, events: Sequence[Event]) -> None:
        self.told += [(self.computing, event) for event in events]


class ApartHouse(House):
    """A house whose engine's runner is a `Device`."""

    def __init__(self) -> None:
        self.device = Device(lambda step: self.run(step))
        super().__init__(make_runner=lambda _: self.device)


@pytest.fixture
def house() -> Iterator[ApartHouse]:
    made = ApartHouse()
    yield made
    made.engine.stop()


def run_out(house: ApartHouse, *numbers: int) -> None:
    house.engine.start()
    for number in numbers:
        house.engine.submit(request(number, max_new_tokens=4))
    assert house.engine.drain(10)


def test_tokens_are_told_while_the_next_step_is_computed_and_the_last_at_once(house: ApartHouse) -> None:
    house.engine.connect(house.device.note)
    run_out(house, 1)
    kinds = [(apart, type(event)) for apart, event in house.device.told]
    assert kinds == [*[(True, TokenEvent)] * 3, (False, TokenEvent), (False, FinishEvent)]
    assert house.engine.snapshot().num_running == 0


async def test_answers_are_those_of_a_device_that_is_waited_for(house: ApartHouse) -> None:
    client = EngineClient(house.engine, asyncio.get_running_loop())
    house.engine.start()
    asked = [request(i, seed=i, max_new_tokens=3 + i % 5) for i in range(20)]
    answers = await asyncio.gather(*(collect(client, one) for one in asked))
    plain = House()
    try:
        waited_for = EngineClient(plain.engine, asyncio.get_running_loop())
        plain.engine.start()
        want = await asyncio.gather(*(collect(waited_for, one) for one in asked))
    finally:
        plain.engine.stop()
    assert [[_without_times(event) for event in events] for events in answers] == [
        [_without_times(event) for event in events] for events in want
    ]


def _without_times(event: Event) -> Event:
    return replace(event, queue_s=0.0) if isinstance(event, FinishEvent) else event


def test_a_cancel_is_told_behind_the_tokens_that_came_before_it(house: ApartHouse) -> None:
    second, may_go = threading.Event(), threading.Event()

    def gate(number: int) -> None:
        if number == 2:
            second.set()
            assert may_go.wait(10)

    house.device.gate = gate
    house.engine.connect(house.device.note)
    house.engine.start()
    house.engine.submit(request(1, max_new_tokens=50))
    assert second.wait(10)
    house.engine.cancel(RequestId("r1"), FinishReason.CANCELLED)  # read behind step 2, whose token is held then
    may_go.set()
    assert house.engine.drain(10)
    events = [event for _, event in house.device.told]
    assert [type(event) for event in events] == [TokenEvent, TokenEvent, FinishEvent]
    assert len(house.device.steps) == 2


def test_nothing_stays_untold_where_nothing_can_run_next(house: ApartHouse) -> None:
    """A request that waits for its adapter is work without a step."""
    house.engine.connect(house.device.note)
    house.scheduler.take_loads = lambda: ()  # type: ignore[method-assign]  # its adapter never comes
    house.engine.start()
    house.engine.submit(request(2, AdapterId("sha256:1")))
    house.engine.submit(request(1, max_new_tokens=1))
    deadline = threading.Event()
    for _ in range(200):
        if len(house.device.told) == 2:
            break
        deadline.wait(0.05)
    assert [event.request for _, event in house.device.told] == ["r1", "r1"]


def test_a_fault_in_telling_is_not_a_fault_of_the_step(house: ApartHouse) -> None:
    failed: list[Event] = []

    def deliver(events: Sequence[Event]) -> None:
        if not failed:
            failed.extend(events)
            raise RuntimeError("the loop is closed")
        house.device.note(events)

    house.engine.connect(deliver)
    run_out(house, 1)
    assert house.engine.snapshot().state is EngineState.DEAD
    (last,) = (event for _, event in house.device.told if isinstance(event, FinishEvent))
    assert isinstance(last.error, Unavailable), "the engine has died, the forward pass has not failed"


def test_an_outbox_keeps_order_and_holds_one_step_at_a_time() -> None:
    box, told = Outbox(), list[RequestId]()
    box.connect(lambda events: told.extend(event.request for event in events))

    def event(name: str) -> list[Event]:
        return [FinishEvent(request=RequestId(name), reason=FinishReason.LENGTH)]

    box.hold(event("a"))
    assert told == []
    box.hold(event("b"))
    assert told == ["a"]
    box.tell(event("c"))
    assert told == ["a", "b", "c"]
    box.tell()
    assert told == ["a", "b", "c"]
