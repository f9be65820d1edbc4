"""The front of an update waits for replicas of its own settings, and begins with others where none come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from peft_serve.cluster.fitting import TOLD_APART_BY, WAITED_S, fitting_facts, mark_of
from peft_serve.cluster.plan import Layout, engine_settings, front_settings
from peft_serve.cluster.replicas import ReplicaLost
from peft_serve.cluster.wire import BaseFacts
from peft_serve.config import Settings
from peft_serve.engine.assembly import gate_limits
from tests.cluster.cluster_fakes import ScriptedReplicas

OLD, NEW = mark_of(Settings()), mark_of(Settings(max_rank=8))


def facts(mark: str) -> BaseFacts:
    return BaseFacts(card=None, checked_for=mark, mark=mark)  # type: ignore[arg-type]


@dataclass(eq=False)
class Rolling(ScriptedReplicas):
    """Each look finds the next of these; the last stays."""

    marks: list[Sequence[str] | None] = field(default_factory=list)
    now_s: float = 0.0

    async def facts(self) -> BaseFacts:
        return facts(OLD)

    async def all_facts(self) -> Sequence[BaseFacts]:
        seen = self.marks.pop(0) if len(self.marks) > 1 else self.marks[0]
        if seen is None:
            raise ReplicaLost("they do not answer")
        return [facts(mark) for mark in seen]

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds


async def test_a_front_waits_for_the_replicas_that_are_to_come() -> None:
    replicas = Rolling(marks=[[OLD, OLD], None, [OLD], [OLD, NEW]])
    found = await fitting_facts(replicas, NEW, clock=replicas.clock, sleep=replicas.sleep)
    assert found.mark == NEW
    assert replicas.now_s == pytest.approx(2.0)


async def test_it_does_not_wait_where_they_are_its_own() -> None:
    replicas = Rolling()
    assert (await fitting_facts(replicas, OLD, clock=replicas.clock, sleep=replicas.sleep)).mark == OLD
    assert replicas.now_s == 0


async def test_it_begins_with_the_old_ones_where_no_new_ones_come() -> None:
    replicas = Rolling(marks=[[OLD, OLD]])
    assert (await fitting_facts(replicas, NEW, clock=replicas.clock, sleep=replicas.sleep)).mark == OLD
    assert replicas.now_s == pytest.approx(WAITED_S)


def test_settings_that_change_who_is_let_in_tell_replicas_apart() -> None:
    asked: set[str] = set()

    class Noting:
        def __getattr__(self, name: str) -> Any:
            asked.add(name)
            return getattr(Settings(), name)

    gate_limits(Noting(), 128)  # type: ignore[arg-type]
    assert asked
    assert asked <= set(TOLD_APART_BY)


def test_a_front_and_a_replica_of_one_deployment_have_one_mark() -> None:
    settings, layout = Settings(max_rank=8, quantisation="int8", api_key="k"), Layout()
    front, engine = (Settings(**make(settings, layout)) for make in (front_settings, engine_settings))
    assert mark_of(front) == mark_of(engine) != OLD
    assert mark_of(Settings(max_rows=3, max_queue=9)) == OLD, "they are replaced one by one under one front"
