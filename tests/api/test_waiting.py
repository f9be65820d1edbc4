"""`X-Max-Wait`: how long a request may wait for its first token."""

from __future__ import annotations

import httpx
import pytest

from peft_serve.errors import DeadlineMissed
from tests.api.api_fakes import World

CALLS = {
    "native": ("/generate", {"inputs": "hello"}),
    "completions": ("/v1/completions", {"model": "plain", "prompt": "hello"}),
    "chat": ("/v1/chat/completions", {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}),
}


@pytest.mark.parametrize("call", CALLS)
async def test_the_deadline_reaches_the_engine(client: httpx.AsyncClient, world: World, call: str) -> None:
    path, body = CALLS[call]
    answer = await client.post(path, json=body, headers={"X-Max-Wait": "2.5"})
    assert answer.status_code == 200, answer.text
    request = world.engine.seen[-1]
    assert request.deadline_s == pytest.approx(request.arrival_s + 2.5)
    await client.post(path, json=body)
    assert world.engine.seen[-1].deadline_s is None


@pytest.mark.parametrize("given", ["", "soon", "0", "-1", "nan", "inf", "1e9"])
async def test_what_is_no_time_is_refused_by_name(client: httpx.AsyncClient, given: str) -> None:
    answer = await client.post("/generate", json={"inputs": "hello"}, headers={"X-Max-Wait": given})
    assert answer.status_code == 422
    assert "X-Max-Wait" in answer.text


async def test_a_request_that_waited_too_long_is_no_failure_of_the_server(
    client: httpx.AsyncClient, world: World
) -> None:
    world.engine.fails[world.adapters["plain"]] = DeadlineMissed("the first token would come too late")
    world.engine.fails[world.adapters["soft"]] = RuntimeError("gone")
    assert (await client.post("/generate?adapter=plain", json={"inputs": "hello"})).status_code == 429
    assert (await client.post("/generate?adapter=soft", json={"inputs": "hello"})).status_code == 500
    page = (await client.get("/metrics")).text
    outcomes = {
        line.split('outcome="')[1].split('"')[0] for line in page.splitlines() if "adapter_requests_total{" in line
    }
    assert outcomes == {"refused", "failed"}
    assert 'peft_serve_adapter_requests_total{adapter="plain",method="LORA",outcome="refused"} 1.0' in page
