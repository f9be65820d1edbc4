"""Two replicas on this machine, started as a user does: the same tokens, affinity, uploads, bounds and faults."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest.ray_server import RayServer, serving
from peft_serve.api.app import create_app
from peft_serve.config import Settings
from peft_serve.engine.adapter_places import shipped_adapters
from peft_serve.engine.assembly import build

pytest.importorskip("ray.serve")

MAX_ONGOING, MAX_QUEUE = 6, 2
BOUND = 2 * MAX_ONGOING + MAX_QUEUE
PLAIN = {"ignore_eos_token": True, "choices": None, "template": "{text}"}  # else one of few words
COMPLETION = {"model": "sms-spam", "temperature": 0, "choices": None}
ADAPTERS = ("twitter-complaints", "sms-spam", "banking77")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayServer]:
    store = tmp_path_factory.mktemp("store")
    options = ("--replicas", "2", "--max-ongoing", str(MAX_ONGOING), "--max-queue", str(MAX_QUEUE))
    with serving(store, *options) as running:
        yield running


def asks() -> list[tuple[str, dict[str, Any]]]:
    """Base, adapters, combinations and a grammar, greedy and sampled."""
    long = PLAIN | {"max_new_tokens": 24, "details": True}
    found = [("/generate", {"inputs": "The weather today", "parameters": long})]
    for i, name in enumerate((*ADAPTERS, "sms-spam:0.5%2Bbanking77:0.5")):
        sampled = long | {"do_sample": True, "seed": 7 + i, "temperature": 0.9}
        bodies = ({"inputs": f"message number {i}", "parameters": parameters} for parameters in (long, sampled))
        found += [(f"/generate?adapter={name}", body) for body in bodies]
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    spelled = COMPLETION | {"prompt": "say", "max_tokens": 40, "response_format": form}
    several = {"inputs": ["one", "two", "three"], "parameters": PLAIN | {"max_new_tokens": 5, "details": True}}
    return [*found, ("/v1/completions", spelled), ("/generate?adapter=sst2", several)]


def shown(path: str, answer: Any) -> Any:
    """What has to be equal."""
    if isinstance(answer, list):
        return [shown(path, each) for each in answer]
    if path.startswith("/v1"):
        return answer["choices"][0]["text"], answer["usage"]
    return answer["generated_text"], [token["id"] for token in answer["details"]["tokens"]]


async def alone(store: Path) -> list[Any]:
    """The answers of a single server in this process."""
    parts, engine = build(Settings(model="demo-llama", store=store, num_threads=1), lambda _: None)
    engine.start()
    try:
        transport = httpx.ASGITransport(app=create_app(parts))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answers = [await client.post(path, json=body, timeout=60) for path, body in asks()]
    finally:
        engine.stop()
    assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
    return [answer.json() for answer in answers]


def at_once(server: RayServer, calls: Sequence[tuple[str, Any]], width: int) -> list[httpx.Response]:
    with ThreadPoolExecutor(width) as pool:
        return list(pool.map(lambda call: server.post(*call), calls))


async def test_tokens_are_those_of_a_single_server_in_any_mix(server: RayServer, tmp_path: Path) -> None:
    expected = await alone(tmp_path)
    found = at_once(server, asks(), 10)
    for (path, _), answer, own in zip(asks(), found, expected, strict=True):
        assert answer.status_code == 200, answer.text
        assert shown(path, answer.json()) == shown(path, own), path


def test_an_answer_streams_and_ends_at_a_stop_string(server: RayServer) -> None:
    body = COMPLETION | {"prompt": "hello", "max_tokens": 30, "ignore_eos": True}
    whole = server.post("/v1/completions", body).json()["choices"][0]["text"]
    stop = whole[len(whole) // 2 :][:4]
    streaming = body | {"stream": True, "stop": [stop]}
    pieces, num_chunks = [], 0
    with server.client.stream("POST", f"{server.url}/v1/completions", json=streaming) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                pieces += [choice["text"] for choice in json.loads(line[6:])["choices"]]
                num_chunks += 1
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert num_chunks > 1


def test_an_adapters_requests_go_where_the_adapter_is(server: RayServer) -> None:
    calls = [
        (f"/generate?adapter={ADAPTERS[i % 3]}", {"inputs": f"{i}", "parameters": {"max_new_tokens": 1}})
        for i in range(200)
    ]
    at_once(server, calls[:9], 1)
    time.sleep(2.5)  # replicas tell once a second how long one waits there, for what other tests asked too
    before = server.placed()
    assert {answer.status_code for answer in at_once(server, calls, 2)} == {200}
    told = {kind: number - before[kind] for kind, number in server.placed().items()}
    assert told["same"] + told["moved"] == 200
    assert told["same"] >= 0.99 * 200, told


def test_one_request_more_than_there_is_room_for_is_refused(server: RayServer) -> None:
    long = {"inputs": "long", "parameters": PLAIN | {"max_new_tokens": 450}}
    answers = at_once(server, [("/generate", long)] * (BOUND + 5), BOUND + 5)
    refused = [answer for answer in answers if answer.status_code == 429]
    assert [answer.status_code for answer in answers].count(200) == BOUND
    assert len(refused) == 5
    assert all(answer.headers["retry-after"] and answer.json()["error_type"] == "overloaded" for answer in refused)


def test_an_upload_outlives_the_replica_that_had_it(server: RayServer) -> None:
    """Its answers are the same before a replica is killed, from the other one, and nobody loses a request for it."""
    zipped = {"content-type": "application/zip"}
    uploaded = server.client.put(f"{server.url}/adapters/mine", content=archive(), headers=zipped)
    assert uploaded.status_code == 201, uploaded.text
    assert "not tried out" not in uploaded.text
    before = server.placed()["moved"]
    long = PLAIN | {"max_new_tokens": 400}
    calls = [("/generate?adapter=mine", {"inputs": f"number {i % 3}", "parameters": long}) for i in range(12)]
    server.await_replicas(2)
    for _ in range(3):  # where Serve's question how full a replica is times out on a busy machine, one answers them all
        first = at_once(server, calls, len(calls))
        assert {answer.status_code for answer in first} == {200}
        if server.placed()["moved"] > before:
            break
    assert server.placed()["moved"] > before, f"one replica has no room for these: {server.placed()} {server.said}"
    num_placed = sum(server.placed().values())
    with ThreadPoolExecutor(len(calls)) as pool:
        running = [pool.submit(server.post, *call) for call in calls]
        victim = server.replicas()[0]
        while sum(server.placed().values()) < num_placed + len(calls):  # one replica has not room for them
            assert not all(each.done() for each in running), "they ended before anything could happen to them"
        victim.kill()
        found = [each.result() for each in running]
    assert [answer.status_code for answer in found] == [200] * len(calls), [answer.text for answer in found]
    assert [answer.json() for answer in found] == [answer.json() for answer in first]
    assert server.placed()["again"] > 0, "it had requests"


def test_an_answer_has_one_request_id_which_is_the_callers_if_he_gave_one(server: RayServer) -> None:
    named = server.post("/generate", {"inputs": 1}, headers={"x-request-id": "mine.1"})
    assert named.headers.get_list("x-request-id") == ["mine.1"] == [named.json()["request_id"]]
    refused = server.post("/generate", {"inputs": 1})
    assert refused.headers.get_list("x-request-id") == [refused.json()["request_id"]]


def archive() -> bytes:
    """An adapter that nobody has: a shipped one with another config."""
    found = shipped_adapters("demo-llama")
    assert found is not None
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for path in sorted((found / "sms-spam").iterdir()):
            content = path.read_bytes()
            if path.name == "adapter_config.json":
                content += b"\n\n"
            packed.writestr(path.name, content)
    return buffer.getvalue()
