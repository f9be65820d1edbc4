"""Whom a request is for, over a raw socket: one Host, one target, and one length, or a 400 that can be told apart."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from peft_serve.commands.connections import ConnectionLimits
from peft_serve.commands.request_line import UnclearRequest, read_line
from tests.api.api_fakes import World
from tests.api.conftest import served
from tests.api.test_api_connections import (
    BODY,
    HEAD,
    LAST_PROBE,
    LENGTH,
    answer_to,
    connected,
    first_status,
    status_of,
    until,
)

GET = b"GET /livez HTTP/1.1\r\n"
HOST = b"host: localhost\r\n"
TWO = b"content-length: 2\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"
UPGRADE = b"upgrade: h2c\r\nconnection: upgrade\r\n"


def detail_of(url: str, sent: bytes) -> str:
    """Why a request is refused: with a 400 that has an id, behind which the connection ends."""
    answer = answer_to(url, sent)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert status_of(answer) == 400, (sent, answer[:200])
    assert b"HTTP/1.1 200" not in answer, f"nothing that followed was answered: {sent!r}"
    problem = json.loads(body)
    assert f"x-request-id: {problem['request_id']}\r\n".encode() in head
    assert problem["code"] == "bad_request"
    return str(problem["detail"])


def test_a_body_comes_chunked_or_as_it_is(url: str) -> None:
    post = b"POST /generate HTTP/1.1\r\n" + HOST
    for head in (
        post + b"transfer-encoding: gzip, chunked\r\n",
        post + b"transfer-encoding: identity, chunked\r\n",
        post + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
        b"POST /generate HTTP/1.0\r\n" + HOST + CHUNKED,
    ):
        answer = answer_to(url, head + b"\r\n0\r\n\r\n")
        assert status_of(answer) == 400, (head, answer[:200])


def test_a_request_says_once_whom_it_is_for(url: str) -> None:
    for head, why in (
        (GET, "no Host"),
        (GET + b"x-host: localhost\r\n", "no Host"),
        (GET + HOST + HOST, "more than one Host"),
        (GET + HOST + b"accept: */*\r\nHOST: other.example\r\n", "more than one Host"),
        (GET + HOST + HOST + UPGRADE, "more than one Host"),
        (b"GET /livez HTTP/1.0\r\n" + HOST + HOST, "more than one Host"),
        (GET + b"host: local host\r\n", "is none"),
        (GET + b"host: user@localhost\r\n", "is none"),
        (GET + b"host: localhost/path\r\n", "is none"),
        (GET + b"host: localhost:port\r\n", "is none"),
        (GET + b"host: http://localhost\r\n", "is none"),
        (GET + b"host: [::1\r\n", "is none"),
        (GET + b"host: l\xc3\xb6cal\r\n", "is none"),
        (b"GET ftp://localhost/livez HTTP/1.1\r\n" + HOST, "target"),
        (b"GET http:///livez HTTP/1.1\r\n" + HOST, "target"),
        (b"GET http://user@localhost/livez HTTP/1.1\r\n" + HOST, "target"),
        (b"GET http://localhost/livez HTTP/1.1\r\n", "no Host"),
        (b"GET * HTTP/1.1\r\n" + HOST, ""),
        (b"GET livez HTTP/1.1\r\n" + HOST, ""),
    ):
        assert why in detail_of(url, head + b"\r\n" + LAST_PROBE), head


def test_hosts_that_are_some_are_taken(url: str) -> None:
    for head in (
        GET + b"host: localhost:8000\r\n",
        GET + b"host: [::1]:8000\r\n",
        GET + b"host: \r\n",
        GET + b"HoSt:\t127.0.0.1 \r\n",
        GET + b"host: peft_serve-0\r\n",
        b"GET /livez HTTP/1.0\r\n",
        b"GET HTTP://localhost:1/livez?q=//x HTTP/1.1\r\n" + HOST,
        b"GET /livez?next=http://x/ HTTP/1.1\r\n" + HOST,
        GET + HOST + UPGRADE,
    ):
        assert first_status(url, head + b"\r\n") == 200, head


def test_a_whole_url_names_the_host_itself(world: World) -> None:
    settings = world.parts.settings.model_copy(update={"allowed_hosts": ("good.example",)})
    with served(replace(world, parts=replace(world.parts, settings=settings))) as url:
        for target, host, status in (
            (b"/livez", b"good.example", 200),
            (b"/livez", b"evil.example", 403),
            (b"http://good.example/livez", b"evil.example", 200),
            (b"http://evil.example/livez", b"good.example", 403),
            (b"http://good.example", b"evil.example", 200),
            (b"http://good.example?q=/livez", b"good.example", 200),
        ):
            assert first_status(url, b"GET %s HTTP/1.1\r\nhost: %s\r\n\r\n" % (target, host)) == status, target


def test_the_path_and_the_query_of_a_url_are_kept() -> None:
    headers = [(b"host", b"a"), (b"x", b"y")]
    line = read_line(b"GET", b"http://b:8/p/q?r=s", "1.1", headers)
    assert (line.target, line.headers) == (b"/p/q?r=s", ((b"host", b"b:8"), (b"x", b"y")))
    assert read_line(b"GET", b"http://b?r", "1.0", []).target == b"/?r"
    assert read_line(b"OPTIONS", b"*", "1.1", headers).target == b"*"
    with pytest.raises(UnclearRequest):
        read_line(b"GET", b"*", "1.1", headers)


def test_where_a_body_and_a_head_end_is_said_in_one_way(url: str) -> None:
    for rest in (
        TWO + TWO + b"\r\n{}",
        TWO + b"content-length: 20\r\n\r\n{}",
        TWO + CHUNKED + b"\r\n2\r\n{}\r\n0\r\n\r\n",
        CHUNKED + TWO + b"\r\n2\r\n{}\r\n0\r\n\r\n",
        CHUNKED + b"transfer-encoding: identity\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"transfer-encoding: chunked, identity\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"transfer-encoding: \x0bchunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        CHUNKED + b"\r\n0x2\r\n{}\r\n0\r\n\r\n",
        CHUNKED + b"\r\n 2\r\n{}\r\n0\r\n\r\n",
        CHUNKED + b"\r\n-2\r\n{}\r\n0\r\n\r\n",
        CHUNKED + b"\r\n2\r\n{}0\r\n\r\n",
        b"content-length: 0x2\r\n\r\n{}",
        b"content-length: 2 2\r\n\r\n{}",
        b"content-length:\r\n\r\n",
        b"content-length: 99999999999999999999999\r\n\r\n{}",
        b"x: y\r\n content-length: 2\r\n\r\n{}",  # a field that is folded
        b"x: y\r\n\tz\r\n" + TWO + b"\r\n{}",
        b" x: y\r\n" + TWO + b"\r\n{}",
        b"x: a\rb\r\n" + TWO + b"\r\n{}",  # a line that two readers end in two places
        b"x: a\r" + TWO + b"\r\n{}",
        b"\r: y\r\n" + TWO + b"\r\n{}",
        b": y\r\n" + TWO + b"\r\n{}",
        b"x y: z\r\n" + TWO + b"\r\n{}",
        b"x\r\n" + TWO + b"\r\n{}",
    ):
        assert detail_of(url, HEAD + rest + LAST_PROBE), rest


def test_a_method_that_nobody_knows_is_told_so(url: str) -> None:
    for sent in (b"FOO /livez HTTP/1.1\r\n" + HOST + b"\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03"):
        assert "its method is none" in detail_of(url, sent)


def test_whatever_is_refused_before_it_is_a_request_gets_an_id(world: World) -> None:
    world.engine.held = True
    with served(world, ConnectionLimits(max_connections=2, head_s=0.2)) as url:
        large = GET + HOST + b"x: " + b"y" * (70 << 10) + b"\r\n\r\n"
        answers = {400: answer_to(url, b"rubbish\r\n"), 408: answer_to(url, b"GET /li"), 431: answer_to(url, large)}
        with connected(url) as first, connected(url) as second:
            for each in (first, second):
                each.sendall(HEAD + LENGTH + b"\r\n" + BODY)
            until(lambda: world.engine.num_live == 2, "both run, and no connection idles")
            answers[503] = answer_to(url, b"")
        assert [status_of(answer) for answer in answers.values()] == list(answers)
        ids = [answer.partition(b"x-request-id: ")[2].partition(b"\r\n")[0] for answer in answers.values()]
        assert sorted(ids) == [b"refused-%d" % number for number in range(1, 5)]
