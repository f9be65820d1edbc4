"""Clients that leave, at every stage of a request, and a server told to stop under streams: nothing is left behind."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from urllib.parse import urlsplit

import httpx
import pytest

from tests.api.api_fakes import World
from tests.api.test_api_connections import HEAD, connected, until

TIMES = int(os.environ.get("PEFT_SERVE_TEST_LEAVES", "10"))


def asked(body: dict[str, object], path: bytes = b"/generate?adapter=plain") -> bytes:
    content = json.dumps(body).encode()
    return HEAD.replace(b"/generate", path) + b"content-length: %d\r\n\r\n" % len(content) + content


LONG = {"max_new_tokens": 250, "ignore_eos": True}
SHORT = {"max_new_tokens": 4, "ignore_eos": True}


def read_until(connection: socket.socket, num_events: int) -> bytes:
    came = b""
    while came.count(b"data:") < num_events:
        more = connection.recv(1 << 16)
        assert more, came
        came += more
    return came


def half_a_request(connection: socket.socket, world: World) -> None:
    connection.sendall(asked({"inputs": "x" * 100})[:-50])


def unread_by_the_server(connection: socket.socket, world: World) -> None:
    connection.sendall(asked({"inputs": "x", "parameters": LONG}))


def running(connection: socket.socket, world: World) -> None:
    connection.sendall(asked({"inputs": "x", "parameters": LONG}))
    until(lambda: world.engine.num_live == 1, "it runs")


def streaming(connection: socket.socket, world: World) -> None:
    connection.sendall(asked({"inputs": "x", "stream": True, "parameters": LONG}))
    read_until(connection, 3)


def at_the_last_event(connection: socket.socket, world: World) -> None:
    connection.sendall(asked({"inputs": "x", "stream": True, "parameters": SHORT}))
    read_until(connection, 4)


def behind_the_answer(connection: socket.socket, world: World) -> None:
    connection.sendall(asked({"inputs": "x", "parameters": SHORT}))
    assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def with_another_waiting(connection: socket.socket, world: World) -> None:
    connection.sendall(asked({"inputs": "x", "parameters": LONG}) * 2)
    until(lambda: world.engine.num_live == 1, "the first of them runs")


STAGES = (
    half_a_request, unread_by_the_server, running, streaming, at_the_last_event, behind_the_answer,
    with_another_waiting,
)  # fmt: skip


def num_sockets() -> int:
    found = 0
    for each in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{each}").startswith("socket:")
        except OSError:
            continue  # the one that lists them
    return found


@pytest.mark.parametrize("leave", STAGES)
@pytest.mark.parametrize("is_abrupt", [False, True])
def test_whoever_leaves_takes_nothing_along(
    url: str, world: World, leave: Callable[[socket.socket, World], None], is_abrupt: bool
) -> None:
    world.engine.step_s = 0.002
    httpx.get(f"{url}/livez")
    before = num_sockets()
    for _ in range(TIMES):
        with connected(url) as connection:
            if is_abrupt:  # a reset in place of an end
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            leave(connection, world)
    until(lambda: world.engine.num_live == 0, "no row is left")
    until(lambda: world.num_held == 0, "no adapter is held")
    until(lambda: num_sockets() <= before, "no connection is open")
    assert httpx.get(f"{url}/livez").status_code == 200


def test_a_full_queue_is_said_before_anything_is_read(url: str, world: World) -> None:
    """Reading and planning a request takes longer than refusing it, and many come when the queue is full."""
    snapshot = world.engine.snapshot
    world.engine.snapshot = lambda: replace(snapshot(), num_waiting=1024)  # type: ignore[method-assign]
    for path, body in (("/generate", {"inputs": "x"}), ("/v1/completions", {"prompt": "x"})):
        answer = httpx.post(url + path, json=body)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
    assert world.engine.seen == []


def test_probes_are_answered_while_many_wait(url: str, world: World) -> None:
    world.engine.step_s = 0.005
    parts = urlsplit(url)
    streams = [socket.create_connection((parts.hostname, parts.port), timeout=10) for _ in range(64)]
    for each in streams:
        each.sendall(asked({"inputs": "x", "stream": True, "parameters": LONG}))
    times_s = []
    for _ in range(20):
        began_s = time.monotonic()
        assert httpx.get(f"{url}/livez").status_code == 200
        times_s.append(time.monotonic() - began_s)
    for each in streams:
        each.close()
    assert sorted(times_s)[10] < 1.0, "half of them; a shared machine makes some late"
