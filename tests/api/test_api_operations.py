"""Health, metrics, documentation."""

from __future__ import annotations

import json
import re

import httpx
import pytest

from peft_serve.cluster.board import merged
from peft_serve.engine.snapshot import EngineState
from tests.api.api_fakes import World


async def test_health_follows_the_engine(client: httpx.AsyncClient, world: World) -> None:
    expected = {
        EngineState.STARTING: (200, 503),
        EngineState.RUNNING: (200, 200),
        EngineState.DRAINING: (200, 503),
        EngineState.STOPPED: (503, 503),
        EngineState.DEAD: (503, 503),
    }
    for state, (health, ready) in expected.items():
        world.engine.state = state
        assert (await client.get("/health")).status_code == health
        answer = await client.get("/readyz")
        assert answer.status_code == ready
        assert ("retry-after" in answer.headers) == (ready == 503)
        assert (await client.get("/livez")).status_code == 200
        for path in ("/health", "/readyz", "/livez"):
            by_head = await client.head(path)
            assert by_head.status_code == (await client.get(path)).status_code
    world.engine.state = EngineState.RUNNING
    world.engine.stalled_s = 61
    assert (await client.get("/health")).status_code == 503
    assert (await client.get("/livez")).status_code == 200


async def test_metrics_name_adapters_as_callers_do(client: httpx.AsyncClient, world: World) -> None:
    await client.post("/adapters/plain/load")
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = re.findall(r"^vllm:lora_requests_info\{(.*)\} \S+$", answer.text, re.MULTILINE)
    assert samples == ['max_lora="8",running_lora_adapters="plain",waiting_lora_adapters=""']
    assert 'peft_serve_adapter_resident{adapter="plain",tier="device"} 1.0' in answer.text


async def test_the_slots_of_all_replicas_are_told_where_an_adapter_takes_one_on_each(
    client: httpx.AsyncClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.post("/adapters/plain/load")
    of_one = world.engine.snapshot()
    monkeypatch.setattr(world.engine, "snapshot", lambda: merged([of_one, of_one]))
    page = (await client.get("/metrics/gateway")).text
    assert re.search(r"vllm:num_gpu_loaded_lora_adapters{.*} 2.0", page), page
    assert re.search(r"vllm:max_gpu_lora_adapters{.*} 16.0", page)
    assert 'max_lora="16"' in page
    assert page.count('adapter_name="plain"') == 1


async def test_the_openapi_page_describes_every_route(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    paths = document["paths"]
    for path in ("/", "/generate", "/generate_stream", "/tokenize", "/info", "/v1/completions", "/v1/chat/completions"):
        assert path in paths
    for path in ("/adapters", "/adapters/{name}", "/adapters/validate", "/health", "/livez", "/readyz", "/metrics"):
        assert path in paths
    schemas = document["components"]["schemas"]
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references <= set(schemas), references - set(schemas)
    assert schemas["Parameters"]["properties"]["top_p"]
    operations = [op["operationId"] for path in paths.values() for op in path.values()]
    assert len(set(operations)) == len(operations)


_OFF = {"/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
"""Routes that take JSON and are off unless the operator allows sources, or updating at run time."""


async def test_examples_of_the_page_are_answered(client: httpx.AsyncClient, world: World) -> None:
    world.publish("twitter-complaints", _files())
    document = (await client.get("/openapi.json")).json()
    tried = 0
    for path, methods in document["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        if "application/json" in content:
            answer = await client.post(path, json=content["application/json"]["example"])
            assert answer.status_code == (403 if path in _OFF else 200), (path, answer.text)
            tried += 1
    assert tried == 10 + len(_OFF)


async def test_the_page_needs_nothing_from_elsewhere(client: httpx.AsyncClient) -> None:
    answer = await client.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert "openapi.json" in answer.text
    assert "http://" not in answer.text
    assert "https://" not in answer.text


def _files() -> dict[str, bytes]:
    from tests.api.api_fakes import checkpoint

    return checkpoint("twitter")
