"""What is sent below HTTP, or beside it: slow, endless and malformed heads, clients that do not read, and too many."""

from __future__ import annotations

import json
import logging
import re
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from urllib.parse import urlsplit

import pytest

from peft_serve.commands.connections import ConnectionLimits, room_for
from tests.api.api_fakes import World
from tests.api.conftest import served

HEAD = b"POST /generate HTTP/1.1\r\nhost: localhost\r\n"
PROBE = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"
BODY = json.dumps({"inputs": "x", "parameters": {"max_new_tokens": 2}}).encode()
LENGTH = b"content-length: %d\r\n" % len(BODY)
LAST_PROBE = b"GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


@contextmanager
def connected(url: str, *, receive_bytes: int | None = None) -> Iterator[socket.socket]:
    parts = urlsplit(url)
    with socket.socket() as made:
        if receive_bytes is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        made.settimeout(10)
        made.connect((parts.hostname, parts.port))
        yield made


def all_of(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    came = b""
    try:
        while more := connection.recv(1 << 16):
            came += more
    except ConnectionResetError:
        pass
    return came


def answer_to(url: str, sent: bytes) -> bytes:
    """The whole answer, of a server that closes behind it."""
    with connected(url) as connection:
        connection.sendall(sent)
        return all_of(connection)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def first_status(url: str, sent: bytes) -> int:
    with connected(url) as connection:
        connection.sendall(sent)
        return status_of(connection.recv(1 << 16))


def until(fact: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while not fact():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


# slow


@pytest.fixture
def hasty(world: World) -> Iterator[str]:
    """A server that waits a quarter of a second for anything."""
    with served(world, ConnectionLimits(max_connections=8, head_s=0.25, stalled_s=0.25)) as url:
        yield url


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"\r\n\r\n\r\n"])
def test_who_says_nothing_is_let_go(hasty: str, sent: bytes) -> None:
    began_s = time.monotonic()
    assert answer_to(hasty, sent) == b""
    assert 0.2 < time.monotonic() - began_s < 3


def test_a_head_that_trickles_is_ended(hasty: str) -> None:
    with connected(hasty) as connection:
        for byte in b"POST /gen":
            connection.sendall(bytes([byte]))
            time.sleep(0.01)
        answer = all_of(connection)
    assert status_of(answer) == 408
    said = json.loads(answer.split(b"\r\n\r\n", 1)[1])
    assert (said["code"], "did not come whole in 0.25 s" in said["detail"]) == ("request_timeout", True)


def test_a_further_head_has_as_long(hasty: str) -> None:
    with connected(hasty) as connection:
        connection.sendall(PROBE)
        assert status_of(connection.recv(1 << 16)) == 200
        time.sleep(0.5)  # between requests a connection may be quiet
        connection.sendall(PROBE + PROBE[:20])
        answer = all_of(connection)
    assert status_of(answer) == 200
    assert b"HTTP/1.1 408 " in answer


def test_a_long_answer_is_not_the_clients_fault(hasty: str, world: World) -> None:
    world.engine.step_s = 0.02
    body = json.dumps({"inputs": "x", "parameters": {"max_new_tokens": 40, "ignore_eos": True}}).encode()
    answer = answer_to(hasty, HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    assert status_of(answer) == 200


@pytest.fixture
def waits_briefly(world: World) -> Iterator[str]:
    """A server that waits a fifth of a second for a body that does not come."""
    settings = world.parts.settings.model_copy(update={"body_timeout_s": 0.2})
    with served(replace(world, parts=replace(world.parts, settings=settings))) as url:
        yield url


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_trickles_is_ended(waits_briefly: str, is_chunked: bool) -> None:
    url = waits_briefly
    how = b"transfer-encoding: chunked\r\n" if is_chunked else b"content-length: 1000\r\n"
    with connected(url) as connection:
        connection.sendall(HEAD + how + b"\r\n")
        began_s = time.monotonic()
        for _ in range(10):
            time.sleep(0.05)
            try:
                connection.sendall(b"1\r\n \r\n" if is_chunked else b" ")
            except OSError:
                break
        answer = all_of(connection)
    assert status_of(answer) == 408
    assert b"connection: close" in answer
    said = json.loads(answer.split(b"\r\n\r\n", 1)[1])
    assert said["error_type"] == "validation"
    number = re.match(
        r"body: (\d+) bytes of it came in 0\.2 s; it has 0\.2 s \(--body-timeout-s\) and a", said["error"]
    )
    assert number, said
    assert 0 < int(number[1]) < 10
    assert time.monotonic() - began_s < 3


def test_a_body_that_keeps_coming_is_waited_for(waits_briefly: str) -> None:
    url = waits_briefly
    body = BODY + b" " * 2000  # two seconds more, at the slowest that is taken
    with connected(url) as connection:
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body))
        connection.sendall(body[:1500])
        time.sleep(0.6)
        connection.sendall(body[1500:])
        assert status_of(connection.recv(1 << 16)) == 200


def test_a_client_that_leaves_before_its_body_is_no_fault(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "peft_serve")
    with connected(url) as connection:
        connection.sendall(HEAD + b"content-length: 1000\r\n\r\n{")
    until(lambda: any(record.name == "peft_serve.access" for record in caplog.records), "it is in the access log")
    assert [getattr(record, "fields", {}).get("error") for record in caplog.records] == ["client_closed"]


def test_who_does_not_read_is_cut_off(world: World) -> None:
    limits = ConnectionLimits(max_connections=8, stalled_s=0.3)
    with served(world, limits) as url, connected(url, receive_bytes=4096) as connection:
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * 100)
        time.sleep(1.5)
        came = all_of(connection)
        assert came.count(b"HTTP/1.1 200") < 100, "it was ended before all was written: more than sockets hold"


# large


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /" + b"a" * (64 << 10) + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /livez?" + b"a=1&" * (32 << 10) + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nhost: x\r\n" + b"".join(b"x-%d: y\r\n" % i for i in range(200)) + b"\r\n",
        b"GET /livez HTTP/1.1\r\nhost: x\r\nx-long: " + b"y" * (70 << 10) + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nhost: x\r\nx-endless: " + b"y" * (2 << 20),
        b"GET /livez HTTP/1.1\r\nhost: x\r\n" + b"y" * (2 << 20),
        HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx-endless: " + b"y" * (2 << 20),
    ],
    ids=["path", "query", "many", "long", "endless value", "endless name", "endless trailer"],
)
def test_a_head_has_a_size(url: str, sent: bytes) -> None:
    with connected(url) as connection:
        try:
            connection.sendall(sent)
        except OSError:
            return  # closed while it was still being sent
        answer = all_of(connection)
    assert not answer or status_of(answer) in (431, 422)


def test_a_head_of_ordinary_size_is_taken(url: str) -> None:
    fields = b"".join(b"x-%d: %s\r\n" % (i, b"y" * 500) for i in range(100))
    assert first_status(url, b"GET /livez?q=" + b"a" * 8000 + b" HTTP/1.1\r\nhost: x\r\n" + fields + b"\r\n") == 200


def test_a_trailer_is_no_header(url: str) -> None:
    chunk = b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)
    answer = answer_to(
        url,
        HEAD
        + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        + chunk
        + b"x-adapter: nobody\r\nx-request-id: mine\r\n\r\n",
    )
    assert status_of(answer) == 200
    assert b"mine" not in answer


# odd


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", {400}),
        (HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}", {400}),
        (HEAD + b"content-length: 2, 2\r\n\r\n{}", {400}),
        (HEAD + b"content-length: -1\r\n\r\n{}", {400}),
        (HEAD + b"content-length: +2\r\n\r\n{}", {400}),
        (HEAD + b"content-length : 2\r\n\r\n{}", {400}),
        (HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", {400, 422}),
        (HEAD + b"transfer-encoding: xchunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", {400}),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n", {400}),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}\r\n0\r\n\r\n", {400}),
        (b"GET /livez\r\n\r\n", {400}),
        (b"GET /livez HTTP/9.9\r\nhost: x\r\n\r\n", {400}),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400}),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", {400}),
        (b"CONNECT evil:443 HTTP/1.1\r\nhost: evil\r\n\r\n", {400, 405}),
        (b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\n\r\n", {400, 404, 405}),
        (b"TRACE /livez HTTP/1.1\r\nhost: localhost\r\n\r\n", {405}),
        (b"OPTIONS /generate HTTP/1.1\r\nhost: localhost\r\n\r\n", {405}),
        (b"HEAD /livez HTTP/1.1\r\nhost: localhost\r\n\r\n", {200}),
        (b"GET http://localhost/livez HTTP/1.1\r\nhost: localhost\r\n\r\n", {200}),
        (b"GET http://localhost HTTP/1.1\r\nhost: localhost\r\n\r\n", {200, 400, 404, 405}),
        (b"GET //livez HTTP/1.1\r\nhost: localhost\r\n\r\n", {400, 404}),
        (b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nhost: localhost\r\n\r\n", {404}),
        (b"GET /../../etc/passwd HTTP/1.1\r\nhost: localhost\r\n\r\n", {404}),
        (b"GET /ui/%00 HTTP/1.1\r\nhost: localhost\r\n\r\n", {404}),
        (b"GET /adapters/%ED%A0%80 HTTP/1.1\r\nhost: localhost\r\n\r\n", {404, 422}),
        (b"GET /adapters/%zz HTTP/1.1\r\nhost: localhost\r\n\r\n", {404, 422}),
        (b"GET /livez HTTP/1.0\r\n\r\n", {200}),
        (b"GET /livez HTTP/1.1\r\nhost: localhost\r\nx: \xff\xfe\r\n\r\n", {200}),
        (b"GET /livez HTTP/1.1\r\nhost: localhost\r\nx: a\x00b\r\n\r\n", {400}),
        (HEAD + LENGTH + b"x-adapter: \xff\xfe\r\n\r\n" + BODY, {404, 422}),
        (HEAD + LENGTH + b"x-max-wait: 1e999\r\n\r\n" + BODY, {422}),
        (HEAD + LENGTH + b"x-max-wait: \xb2\r\n\r\n" + BODY, {422}),
        (HEAD + LENGTH + b"content-type: application/json; charset=utf-16\r\n\r\n" + BODY, {200, 415, 422}),
        (HEAD + LENGTH + b"content-encoding: gzip\r\n\r\n" + BODY, {415}),
        (HEAD + LENGTH + b"upgrade: h2c\r\nconnection: upgrade\r\n\r\n" + BODY, {200}),
        (b"GET /livez HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
         b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\nsec-websocket-version: 13\r\n\r\n", {200}),
    ],
    ids=lambda value: repr(value)[-60:] if isinstance(value, bytes) else "",
)  # fmt: skip
def test_odd_requests_are_answered_or_refused(url: str, sent: bytes, statuses: set[int]) -> None:
    assert first_status(url, sent) in statuses
    assert first_status(url, PROBE) == 200


def test_what_is_asked_after_an_upgrade_is_answered(url: str) -> None:
    upgrade = b"GET /livez HTTP/1.1\r\nhost: localhost\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n"
    with connected(url) as connection:
        for sent in (upgrade, PROBE, upgrade):
            connection.sendall(sent)
            assert status_of(connection.recv(1 << 16)) == 200


def test_a_body_is_no_request_of_its_own(url: str, world: World) -> None:
    inner = PROBE.replace(b"/livez", b"/smuggled")
    outer = HEAD + b"upgrade: h2c\r\nconnection: close, upgrade\r\ncontent-length: %d\r\n\r\n" % len(inner)
    with connected(url) as connection:
        connection.sendall(outer)
        time.sleep(0.1)
        connection.sendall(inner)
        answer = all_of(connection)
    assert status_of(answer) == 422, "it is a body, and no JSON"
    assert answer.count(b"HTTP/1.1 ") == 1


def test_requests_sent_at_once_are_answered_in_order(url: str) -> None:
    asked = b"".join(HEAD + b"x-request-id: id-%d\r\n" % i + LENGTH + b"\r\n" + BODY for i in range(20))
    answer = answer_to(url, asked + LAST_PROBE)
    ids = [answer.find(b"x-request-id: id-%d\r\n" % i) for i in range(20)]
    assert ids == sorted(ids)
    assert -1 not in ids
    assert answer.count(b"HTTP/1.1 200") == 21


def test_rubbish_behind_a_request_does_not_reach_into_its_answer(url: str, world: World) -> None:
    world.engine.step_s = 0.02
    body = json.dumps(
        {"inputs": "x", "stream": True, "parameters": {"max_new_tokens": 20, "ignore_eos": True}}
    ).encode()
    answer = answer_to(url, HEAD + b"content-length: %d\r\n\r\n" % len(body) + body + b"\x00rubbish\r\n\r\n")
    assert b"HTTP/1.1 400" not in answer[5:]
    until(lambda: world.engine.num_live == 0 and world.num_held == 0, "its row is free")


def test_every_request_of_a_client_that_leaves_is_ended(url: str, world: World) -> None:
    world.engine.held = True
    with connected(url) as connection:
        connection.sendall((HEAD + LENGTH + b"\r\n" + BODY) * 3)
        until(lambda: world.engine.num_live == 1, "the first of them runs")
    until(lambda: world.engine.num_live == 0, "its row is free")
    assert len(world.engine.seen) == 1, "the others did not begin"


# many


def test_idle_connections_make_room(world: World) -> None:
    with served(world, ConnectionLimits(max_connections=8)) as url, ExitStack() as stack:
        held = [stack.enter_context(connected(url)) for _ in range(8)]
        held[0].sendall(PROBE)
        assert status_of(held[0].recv(1 << 16)) == 200, "now it idles for a shorter time than the others"
        assert first_status(url, PROBE) == 200
        assert held[1].recv(10) == b"", "the one that idled longest is closed"
        held[0].sendall(PROBE)
        assert status_of(held[0].recv(1 << 16)) == 200


def test_connections_that_work_are_not_closed_for_others(world: World) -> None:
    world.engine.held = True
    with served(world, ConnectionLimits(max_connections=4)) as url, ExitStack() as stack:
        working = [stack.enter_context(connected(url)) for _ in range(4)]
        for each in working:
            each.sendall(HEAD + LENGTH + b"\r\n" + BODY)
        until(lambda: world.engine.num_live == 4, "all run")
        refused = answer_to(url, b"")
        assert status_of(refused) == 503
        assert b"retry-after" in refused
        world.engine.held = False
        for each in working:
            assert status_of(each.recv(1 << 16)) == 200
        assert first_status(url, PROBE) == 200, "there is room again"


def test_descriptors_bound_the_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert room_for(16) == 16
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
        assert room_for(1000) == 1000
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 1256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if hard != resource.RLIM_INFINITY:
        assert room_for(hard * 2) == hard - 256
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
