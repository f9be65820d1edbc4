"""The client against a fake server: tokens, times, errors, and how many requests are in flight."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from loadtest.client import ClientOptions, LoadClient
from loadtest.lengths import parse_lengths
from loadtest.outcome import Outcome
from loadtest.routes import Completions
from loadtest.sse import EventSplitter
from loadtest.trace import TraceRequest, TraceSpec, build_trace


def request(index: int = 0, *, adapter: str = "", tokens: int = 3, arrival_s: float = 0.0) -> TraceRequest:
    return TraceRequest(
        index=index,
        arrival_s=arrival_s,
        adapter=adapter,
        text=" abe ban dad",
        prompt_tokens=3,
        max_new_tokens=tokens,
    )


def play(options: ClientOptions, requests: list[TraceRequest], *, concurrency: int = 0, **more: Any) -> list[Outcome]:
    async def whole() -> list[Outcome]:
        async with LoadClient(options) as client:
            if concurrency:
                return await client.closed_loop(requests, concurrency=concurrency, **more)
            return await client.open_loop(requests, **more)

    return asyncio.run(whole())


def test_events_are_cut_wherever_the_chunks_are() -> None:
    stream = b': hello\n\ndata:{"a":1}\n\ndata: {"b":\r\ndata: 2}\r\n\r\nevent: x\ndata: [DONE]\n\n'
    for size in range(1, len(stream)):
        splitter = EventSplitter()
        found = [payload for at in range(0, len(stream), size) for payload in splitter.feed(stream[at : at + size])]
        assert found == [b'{"a":1}', b'{"b":\n2}', b"[DONE]"]


def test_native_route_asks_for_exact_greedy_answers(fake_server: Any) -> None:
    (outcome,) = play(ClientOptions(url=fake_server.url), [request(adapter="sql")])
    assert fake_server.bodies == [
        {"adapter": "sql", "inputs": " abe ban dad", "parameters": {"max_new_tokens": 3, "ignore_eos": True}}
    ]
    assert outcome.ok
    assert outcome.text == "sql: 3 tokens"
    assert outcome.prompt_tokens == 3
    assert len(outcome.token_times_s) == 3


def test_completions_route_sends_ids_and_leaves_the_closing_event_uncounted(fake_server: Any) -> None:
    route = Completions(encode=lambda text: [5] * len(text.split()))
    options = ClientOptions(url=fake_server.url, route=route)
    (outcome,) = play(options, [request(tokens=4)])
    assert fake_server.bodies[0]["prompt"] == [5, 5, 5]
    assert fake_server.bodies[0]["ignore_eos"] is True
    assert outcome.ok
    assert outcome.text == " 0 1 2 3"
    assert len(outcome.token_times_s) == 4
    assert outcome.prompt_tokens == 3


def test_times_follow_the_server(fake_server: Any) -> None:
    fake_server.token_delay_s = 0.03
    (outcome,) = play(ClientOptions(url=fake_server.url), [request(tokens=5)])
    assert outcome.ttft_s is not None
    assert outcome.tpot_s is not None
    assert 0.03 <= outcome.ttft_s < 0.3
    assert 0.025 <= outcome.tpot_s < 0.15
    assert outcome.e2e_s >= 0.15


def test_failures_are_outcomes_with_their_reason(fake_server: Any) -> None:
    requests = [request(0, adapter="bad-unknown"), request(1, adapter="bad-middle"), request(2, adapter="fine")]
    unknown, middle, fine = play(ClientOptions(url=fake_server.url), requests)
    assert (unknown.error, unknown.status) == ("status 404", 404)
    assert middle.error == "stream error: generation"
    assert len(middle.token_times_s) == 1
    assert fine.ok


def test_nobody_there_is_a_failure_too() -> None:
    (outcome,) = play(ClientOptions(url="http://127.0.0.1:9"), [request()])
    assert outcome.error == "ClientConnectorError"
    assert outcome.ttft_s is None


def test_open_loop_sends_on_time_whatever_the_server_does(fake_server: Any) -> None:
    fake_server.token_delay_s = 0.1
    requests = [request(number, arrival_s=0.05 * number) for number in range(6)]
    done = []
    outcomes = play(ClientOptions(url=fake_server.url), requests, on_done=lambda: done.append(1))
    assert [outcome.index for outcome in outcomes] == list(range(6))
    assert len(done) == 6
    assert fake_server.most_running > 3
    assert all(0 <= outcome.sent_s - outcome.due_s < 0.1 for outcome in outcomes)


def test_open_loop_drops_what_does_not_end_in_time(fake_server: Any) -> None:
    fake_server.token_delay_s = 0.1
    quick, slow = play(ClientOptions(url=fake_server.url, drain_s=0.55), [request(0, tokens=1), request(1, tokens=99)])
    assert quick.ok
    assert slow.error == "unfinished"
    assert 1 <= len(slow.token_times_s) < 99


@pytest.mark.parametrize("concurrency", [1, 4])
def test_closed_loop_keeps_its_number_in_flight(fake_server: Any, concurrency: int) -> None:
    fake_server.token_delay_s = 0.005
    spec = TraceSpec(adapters=("x", "y"), lengths=parse_lengths("2-2,3-3"), num_requests=12)
    outcomes = play(ClientOptions(url=fake_server.url), list(build_trace(spec).requests), concurrency=concurrency)
    assert [outcome.index for outcome in outcomes] == list(range(12))
    assert all(outcome.ok for outcome in outcomes)
    assert fake_server.most_running == concurrency


def test_closed_loop_ends_by_the_clock(fake_server: Any) -> None:
    fake_server.token_delay_s = 0.05
    requests = [replace(request(number), max_new_tokens=4) for number in range(1000)]
    outcomes = play(ClientOptions(url=fake_server.url), requests, concurrency=2, duration_s=0.7)
    assert 4 <= sum(outcome.ok for outcome in outcomes) <= 8
    assert {outcome.error for outcome in outcomes} <= {None, "unfinished"}
