"""How the replicas are, as they last told, put together to what one engine would tell of itself.

Sums where requests and bytes are counted; of times the best one, as a request goes where it is served. Knows no call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from peft_serve.cluster.wire import Report
from peft_serve.core import AdapterId
from peft_serve.engine.snapshot import EngineSnapshot, EngineState

_LIVELIEST = (
    EngineState.RUNNING,
    EngineState.DRAINING,
    EngineState.STARTING,
    EngineState.DEAD,
    EngineState.STOPPED,
)


class Board:
    """Owner of the last reports. `checked_for` is the front's own: replicas of another base do not count."""

    def __init__(self, checked_for: str) -> None:
        self._checked_for = checked_for
        self._reports: tuple[Report, ...] = ()
        self._merged = EngineSnapshot(state=EngineState.STARTING)
        self.num_strangers = 0  # replicas of another base, version or limits
        self.running: tuple[str, ...] = ()  # the names of those that take requests

    @property
    def num_running(self) -> int:
        return len(self.running)

    def take(self, reports: Sequence[Report]) -> frozenset[str]:
        """These are all that answer; gives the names of those that were not there before."""
        before = {report.replica for report in self._reports}
        self._reports = tuple(each for each in reports if each.checked_for == self._checked_for)
        self.num_strangers = len(reports) - len(self._reports)
        self.running = tuple(each.replica for each in self._reports if each.snapshot.state is EngineState.RUNNING)
        self._merged = merged([report.snapshot for report in self._reports])
        return frozenset(report.replica for report in self._reports) - before

    def snapshot(self, *, num_unplaced: int, pinned: frozenset[AdapterId]) -> EngineSnapshot:
        """The whole: `num_unplaced` requests wait for a replica, `pinned` are to be kept on the device."""
        return replace(self._merged, num_waiting=self._merged.num_waiting + num_unplaced, pinned=pinned)


def merged(all_of: Sequence[EngineSnapshot]) -> EngineSnapshot:
    """One snapshot of many; of none, one that is starting."""
    if not all_of:
        return EngineSnapshot(state=EngineState.STARTING)
    serving = [each for each in all_of if each.state is EngineState.RUNNING] or all_of
    waiting: dict[AdapterId, int] = {}
    for each in all_of:
        for adapter, number in zip(each.waiting_adapters, each.num_waiters, strict=True):
            waiting[adapter] = waiting.get(adapter, 0) + number
    return EngineSnapshot(
        state=min((each.state for each in all_of), key=_LIVELIEST.index),
        num_running=sum(each.num_running for each in all_of),
        num_waiting=sum(each.num_waiting for each in all_of),
        num_loading=sum(each.num_loading for each in all_of),
        running_adapters=tuple(dict.fromkeys(one for each in all_of for one in each.running_adapters)),
        waiting_adapters=tuple(waiting),
        num_waiters=tuple(waiting.values()),
        resident=tuple(resident for each in all_of for resident in each.resident),
        host_adapters=tuple(dict.fromkeys(one for each in all_of for one in each.host_adapters)),
        device_bytes=sum(each.device_bytes for each in all_of),
        host_bytes=sum(each.host_bytes for each in all_of),
        num_slots=sum(each.num_slots for each in all_of),
        least_slots=min(each.num_slots for each in all_of),
        kv_usage=sum(each.kv_usage for each in all_of) / len(all_of),
        wait_s=min(each.wait_s for each in serving),
        step_time=serving[0].step_time,
        num_blocks=sum(each.num_blocks for each in all_of),
        block_size=all_of[0].block_size,
        num_steps=sum(each.num_steps for each in all_of),
        num_prompt_tokens=sum(each.num_prompt_tokens for each in all_of),
        num_drawn_tokens=sum(each.num_drawn_tokens for each in all_of),
        stalled_s=min(each.stalled_s for each in serving),
    )
