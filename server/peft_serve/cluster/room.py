"""Whether a cluster has room for the replicas, and what is waited for while they start. Knows no ray."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from peft_serve.cluster.counting import counted
from peft_serve.cluster.plan import Layout

TOLD_S: Final = 30.0
"""Between two times that a start tells what it waits for."""

_SLACK: Final = 1e-6  # a third of a GPU, three times, is one


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What ray counts a machine with."""

    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How many of both deployments run."""

    num_replicas: int
    num_fronts: int


def room_on(node: Node, layout: Layout) -> float:
    """The replicas that a machine has room for, if nothing else is there."""
    by_cpus = node.cpus / layout.replica_cpus + _SLACK
    each = layout.replica_gpus
    if each == 0:
        return math.floor(by_cpus)
    by_gpus = math.floor(node.gpus + _SLACK) * math.floor(1 / each + _SLACK) if each < 1 else node.gpus / each + _SLACK
    return math.floor(min(by_cpus, by_gpus))


def require_room(node: Node, layout: Layout) -> None:
    """Raise ValueError where a cluster of this one machine, to which no other comes, cannot hold the replicas that it
    starts with."""
    room, needed = int(room_on(node, layout)), layout.least_replicas
    if room >= needed:
        return
    option = "--replicas" if layout.min_replicas is None else "--min-replicas"
    fewer = f"start {option} {room}, or " if room else ""
    raise ValueError(
        f"--replica-gpus {layout.replica_gpus:g}: {counted(needed, 'replica')} with {_asked(layout)} each are asked "
        f"for, and this machine has {counted(node.gpus, 'GPU')}; {fewer}leave --replica-gpus out to serve on CPUs, or "
        "give --address of a cluster that has GPUs"
    )


def waited_for(layout: Layout, progress: Progress, nodes: Sequence[Node], past_s: float) -> str:
    """What a start waits for, and why, as a line of the log."""
    needed = layout.least_replicas
    room = int(sum(room_on(node, layout) for node in nodes))
    why = "replicas load the base, or wait for what others hold of the cluster"
    if room < needed:
        why = (
            f"the cluster has {counted(sum(each.cpus for each in nodes), 'CPU')} and "
            f"{counted(sum(each.gpus for each in nodes), 'GPU')} on {counted(len(nodes), 'node')}, and a replica asks "
            f"for {_asked(layout)}: there is room for {counted(room, 'replica')} until nodes are added; else ask for "
            "less (--replicas, --replica-cpus, --replica-gpus)"
        )
    return (
        f"not ready after {past_s:.0f} s: replicas {progress.num_replicas} of {needed}, fronts {progress.num_fronts} "
        f"of {layout.fronts}; {why}"
    )


class Telling:
    """Says again and again, beside a start that blocks, what it waits for."""

    def __init__(self, tell: Callable[[float], None], clock: Callable[[], float], every_s: float = TOLD_S) -> None:
        """`tell` is given the seconds since the beginning; an error of it is nobody's."""
        self._tell = tell
        self._clock = clock
        self._every_s = every_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="start", daemon=True)

    def __enter__(self) -> None:
        self._began_s = self._clock()
        self._thread.start()

    def __exit__(self, *raised: object) -> None:
        self._is_over.set()

    def _run(self) -> None:
        while not self._is_over.wait(self._every_s):
            try:
                self._tell(self._clock() - self._began_s)
            except Exception:  # noqa: BLE001  # the cluster ends, or does not answer: the start itself finds out
                continue


def _asked(layout: Layout) -> str:
    gpus = f" and {counted(layout.replica_gpus, 'GPU')}" if layout.replica_gpus else ""
    return f"{counted(layout.replica_cpus, 'CPU')}{gpus}"
