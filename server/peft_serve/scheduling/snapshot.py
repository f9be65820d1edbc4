"""A snapshot of the scheduler, for metrics and operators."""

from __future__ import annotations

from dataclasses import dataclass

from peft_serve.core import AdapterId
from peft_serve.scheduling.slots import Resident


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """How things stand between two steps."""

    num_waiting: int  # WAITING and LOADING together
    num_loading: int
    num_running: int
    waiting_adapters: tuple[AdapterId, ...]  # someone waits for it
    num_waiters: tuple[int, ...]  # how many do, for each of them
    running_adapters: tuple[AdapterId, ...]  # someone runs on it, the base included
    resident: tuple[Resident, ...]  # adapters with a slot, least recently used first
    pinned: frozenset[AdapterId]  # to be kept on the device whenever they are there
    device_bytes: int  # that these take
    num_slots: int
    num_blocks: int  # KV blocks that can be held
    num_free_blocks: int
    kv_usage: float  # share of the KV blocks that is held, 0 to 1
    wait_s: float  # expected of a request that comes now, until its first token
    step_time: dict[str, float]  # the fitted seconds of a step, and of each token, rank and KV position in it
    cross_kv_usage: float  # the same for cross-attention blocks; 0 on a decoder-only base
