"""Whether there is room for the replicas, and what a start says that waits."""

from __future__ import annotations

import threading
import time

import pytest

from peft_serve.cluster.plan import Layout
from peft_serve.cluster.room import Node, Progress, Telling, require_room, room_on, waited_for

SCALED = {"min_replicas": 1, "max_replicas": 4}


@pytest.mark.parametrize(
    ("layout", "node", "room"),
    [
        ({"replica_gpus": 1}, Node(cpus=9, gpus=0), 0),
        ({"replica_gpus": 1}, Node(cpus=9, gpus=2), 2),
        ({"replica_gpus": 0.5}, Node(cpus=9, gpus=2), 4),
        ({"replica_gpus": 0.6}, Node(cpus=9, gpus=2), 2),  # a replica is on one GPU
        ({"replica_gpus": 1 / 3}, Node(cpus=9, gpus=1), 3),
        ({"replica_gpus": 2}, Node(cpus=9, gpus=5), 2),
        ({"replica_gpus": 1, "replica_cpus": 4}, Node(cpus=9, gpus=8), 2),
        ({"replica_cpus": 0.1}, Node(cpus=0.3, gpus=0), 3),
    ],
)
def test_a_machine_has_room_for_so_many(layout: dict[str, float], node: Node, room: int) -> None:
    assert room_on(node, Layout(**layout)) == room  # type: ignore[arg-type]


def test_what_a_machine_cannot_hold_is_refused_with_the_way_out() -> None:
    node = Node(cpus=3, gpus=0)
    require_room(node, Layout(replicas=2))
    with pytest.raises(ValueError, match=r"--replica-gpus 1: 2 replicas .* no GPU; leave --replica-gpus out"):
        require_room(node, Layout(replicas=2, replica_gpus=1))
    with pytest.raises(ValueError, match=r"has 1 GPU; start --replicas 1, or"):
        require_room(Node(cpus=3, gpus=1), Layout(replicas=2, replica_gpus=1))
    require_room(Node(cpus=9, gpus=1), Layout(replica_gpus=1, **SCALED))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r": 1 replica with 1 CPU and 2 GPUs each .* has 1 GPU; leave"):
        require_room(Node(cpus=9, gpus=1), Layout(replica_gpus=2, **SCALED))  # type: ignore[arg-type]


def test_a_start_says_what_it_waits_for_and_why() -> None:
    layout, none = Layout(replicas=3, replica_gpus=1), Progress(num_replicas=1, num_fronts=0)
    said = waited_for(layout, none, [Node(cpus=8, gpus=1), Node(cpus=4, gpus=0)], 60.4)
    assert said.startswith("not ready after 60 s: replicas 1 of 3, fronts 0 of 1; the cluster has 12 CPUs and 1")
    assert "1 GPU on 2 nodes, and a replica asks for 1 CPU and 1 GPU: there is room for 1 replica until nodes" in said
    assert "--replica-gpus" in said
    assert "load the base" in waited_for(layout, none, [Node(cpus=8, gpus=4)], 30)


def test_it_is_said_again_and_again_until_the_start_is_over() -> None:
    told: list[float] = []
    thrice = threading.Event()

    def tell(past_s: float) -> None:
        told.append(past_s)
        if len(told) == 3:
            thrice.set()
        raise RuntimeError("the cluster does not answer")

    with Telling(tell, time.monotonic, every_s=0.01):
        assert thrice.wait(5)
    num_told = len(told)
    time.sleep(0.1)
    assert len(told) <= num_told + 1
    assert told == sorted(told)
