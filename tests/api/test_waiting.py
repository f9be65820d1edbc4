"""`X-Max-Wait`: how long a request may wait for its first token."""

from __future__ import annotations

import httpx
import pytest

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
