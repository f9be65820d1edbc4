"""What the engine looked like a moment ago, for health, metrics and people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from peft_serve.core import AdapterId, Row
from peft_serve.scheduling.slots import Resident


class EngineState(StrEnum):
    """The life of an engine. Only RUNNING admits requests."""

    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    STOPPED = "stopped"
    DEAD = "dead"  # its thread ended by an error it could not survive


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSnapshot:
    """Counts and names at the end of the last step. Written by the engine's thread, read by anyone."""

    state: EngineState
    num_running: int = 0
    num_waiting: int = 0
    num_loading: int = 0  # of those that wait: their adapter is on the way
    running_adapters: tuple[AdapterId, ...] = ()
    waiting_adapters: tuple[AdapterId, ...] = ()
    num_waiters: tuple[int, ...] = ()  # requests that wait for each of `waiting_adapters`
    resident: tuple[Resident, ...] = ()
    pinned: frozenset[AdapterId] = frozenset()  # on the device, or to be kept there once they are
    host_adapters: tuple[AdapterId, ...] = ()
    device_bytes: int = 0
    host_bytes: int = 0
    num_slots: int = 0
    least_slots: int | None = None  # of one of its replicas, where these are many: a pin takes one on each
    kv_usage: float = 0.0  # share of KV blocks in use, 0 to 1
    wait_s: float = 0.0  # expected of a request that comes now, until its first token
    step_time: Mapping[str, float] = field(default_factory=dict)  # fitted seconds of a step, token, rank, position
    num_blocks: int = 0
    block_size: int = 0
    num_steps: int = 0
    last_rows: tuple[Row, ...] = ()  # of the last step, however long ago that was
    num_prompt_tokens: int = 0  # computed since the start
    num_drawn_tokens: int = 0  # drawn since the start
    stalled_s: float = 0.0  # how long the step in progress has been running

    @property
    def num_pinnable(self) -> int:
        """So many adapters can be pinned: one slot stays free for everybody else."""
        return max(0, (self.num_slots if self.least_slots is None else self.least_slots) - 1)
