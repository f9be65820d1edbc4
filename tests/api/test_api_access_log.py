"""The access log: one line for each exchange, whatever became of it, and no text."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from peft_serve.config import Settings
from tests.api.api_fakes import World
from tests.api.conftest import served
from tests.api.recorded import PARENT, SECRET, TRACE, Lines, traced
from tests.api.test_api_sockets import open_request, wait_for


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    caplog.set_level(logging.INFO)
    return Lines(caplog)


async def test_an_answer_is_one_line(client: httpx.AsyncClient, world: World, lines: Lines) -> None:
    body = {"inputs": SECRET, "parameters": {"max_new_tokens": 3, "ignore_eos": True}}
    answer = await client.post("/generate?adapter=plain", json=body, headers={"x-request-id": "mine-1"})
    (line,) = lines.fields
    assert line["request_id"] == "mine-1"
    assert (line["http_method"], line["path"], line["route"]) == ("POST", "/generate", "/generate")
    assert line["status"] == 200
    assert (line["adapter"], line["digest"], line["peft_type"]) == ("plain", world.adapters["plain"], "LORA")
    assert line["prompt_tokens"] == int(answer.headers["x-prompt-tokens"])
    assert (line["output_tokens"], line["cached_tokens"]) == (3, 0)
    assert line["queue_ms"] == 1.0
    assert line["load_ms"] == 0.0
    assert 0 < line["ttft_ms"] <= line["total_ms"]
    assert not {"client", "outcome", "error", "inputs", "trace_id"} & line.keys()


async def test_no_text_of_a_prompt_or_an_answer_is_written(
    client: httpx.AsyncClient, lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    said = set()
    for path, body in (
        ("/generate?adapter=plain", {"inputs": SECRET}),
        ("/generate_stream?adapter=plain", {"inputs": SECRET}),
        ("/v1/completions", {"prompt": SECRET, "stop": [SECRET]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": SECRET}]}),
        ("/generate?adapter=nobody", {"inputs": SECRET}),
        ("/generate", {"inputs": [SECRET, 7]}),
        ("/tokenize", {"inputs": SECRET}),
    ):
        answer = await client.post(path, json=body)
        if path.startswith("/generate?adapter=plain"):
            said.add(answer.json()["generated_text"])
    assert len(lines.fields) == 7
    written = "\n".join(record.getMessage() + str(record.__dict__) for record in caplog.records)
    for text in (SECRET, *said):
        assert text not in written


async def test_several_inputs_are_one_line_with_their_sum(client: httpx.AsyncClient, lines: Lines) -> None:
    body = {"inputs": ["a", "bc", "def"], "adapter": ["plain", "soft", "plain"]}
    answer = await client.post("/generate", json=body)
    (line,) = lines.fields
    assert line["inputs"] == 3
    assert line["adapter"] == "plain,soft"
    assert line["peft_type"] == "LORA,PROMPT_TUNING"
    assert line["digest"].count("sha256:") == 2
    assert line["prompt_tokens"] == int(answer.headers["x-prompt-tokens"])
    assert line["output_tokens"] == int(answer.headers["x-generated-tokens"])


async def test_the_base_has_no_digest(client: httpx.AsyncClient, lines: Lines) -> None:
    await client.post("/generate", json={"inputs": "a"})
    (line,) = lines.fields
    assert (line["adapter"], line["peft_type"]) == ("base", "base")
    assert "digest" not in line


async def test_a_refusal_tells_its_code(client: httpx.AsyncClient, world: World, lines: Lines) -> None:
    await client.post("/generate?adapter=nobody", json={"inputs": "a"})
    await client.post("/generate", content=b"x", headers={"content-encoding": "gzip"})
    await client.get("/nowhere")
    world.engine.max_queue = 0
    await client.post("/generate", json={"inputs": "a"})
    told = [(line["status"], line["error"], line.get("route")) for line in lines.fields]
    assert told == [
        (404, "model_not_found", "/generate"),
        (415, "unsupported_media_type", None),
        (404, "not_found", None),
        (429, "overloaded", "/generate"),
    ]
    assert all("adapter" not in line for line in lines.fields)


async def test_a_failure_of_the_server_is_a_warning(client: httpx.AsyncClient, world: World, lines: Lines) -> None:
    world.engine.fails[world.adapters["plain"]] = RuntimeError(SECRET)
    answer = await client.post("/generate?adapter=plain", json={"inputs": "a"})
    assert answer.status_code == 500
    (line,) = lines.fields
    assert (line["status"], line["error"], line["outcome"]) == (500, "internal", "failed")
    assert line["adapter"] == "plain"
    assert lines.levels == ["WARNING"]


async def test_probes_are_told_at_debug_only(
    client: httpx.AsyncClient, lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    for path in ("/livez", "/readyz", "/health", "/metrics", "/metrics/gateway"):
        await client.get(path)
    assert lines.fields == []
    caplog.set_level(logging.DEBUG, logger="peft_serve.access")
    await client.get("/livez")
    assert lines.fields[0]["path"] == "/livez"


async def test_a_path_is_told_short(client: httpx.AsyncClient, lines: Lines) -> None:
    await client.get("/v1/models/forged%1b[31m" + "x" * 900)
    (line,) = lines.fields
    assert line["path"].startswith("/v1/models/forged\x1b[31m"), "the formatters escape it"
    assert len(line["path"]) == 200
    assert line["route"] == "/v1/models/{model:path}"


def test_a_client_that_leaves_is_told(url: str, world: World, lines: Lines) -> None:
    world.engine.step_s = 0.02
    body = {"inputs": "x", "parameters": {"max_new_tokens": 250, "ignore_eos": True}}
    connection = open_request(url, "/generate_stream?adapter=plain", body)
    assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    connection.close()
    wait_for(lambda: len(lines.fields) == 1, "the line is written at the end")
    assert lines.fields[0]["outcome"] == "cancelled"
    assert 0 < lines.fields[0]["output_tokens"] < 250


@pytest.mark.parametrize("is_told", [False, True])
def test_a_clients_address_is_told_on_demand(world: World, lines: Lines, is_told: bool) -> None:
    parts = replace(world.parts, settings=Settings(log_client_address=is_told))
    with served(replace(world, parts=parts)) as url:
        httpx.post(f"{url}/generate", json={"inputs": "a"})
        wait_for(lambda: len(lines.fields) == 1, "a line")
    assert lines.fields[0].get("client") == ("127.0.0.1" if is_told else None)


async def test_a_record_that_fails_costs_no_answer(
    world: World, lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def record(self, exchange: Any) -> str | None:
            raise RuntimeError("no room for spans")

        def close(self) -> None: ...

    async with traced(world, Broken()) as client:
        assert (await client.post("/generate", json={"inputs": "a"})).status_code == 200
    assert "was not recorded" in caplog.text


async def test_the_documents_know_every_field(
    repository: Path, client: httpx.AsyncClient, world: World, lines: Lines
) -> None:
    body = {"inputs": ["a", "b"], "adapter": ["plain", "soft"]}
    await client.post("/generate", json=body, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    world.engine.fails[world.adapters["plain"]] = RuntimeError("lost")
    await client.post("/generate?adapter=plain", json={"inputs": "a"})
    written = {"client"}.union(*lines.fields)
    assert len(written) == 20
    text = (repository / "docs" / "operations.md").read_text()
    section = text.split("\n## Logs\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert written == set(re.findall(r"`(\w+)`", " ".join(rows)))
    example = json.loads(next(line for line in section.splitlines() if line.startswith("{")))
    assert example.keys() - {"time", "level", "logger", "message"} <= written
