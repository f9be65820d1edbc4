"""Uploads are tried out before a name stands for them: over a fake engine, which says what a trial should meet."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import httpx
import pytest

from peft_serve.api.trial import NUM_IDS, Trial
from peft_serve.core import BASE, AdapterId, Reading, Request
from peft_serve.engine.client import EngineClient
from peft_serve.engine.snapshot import EngineState
from peft_serve.errors import AdapterUnavailable, Internal, Unavailable
from tests.api.api_fakes import MAX_CONTEXT, World, checkpoint, checkpoint_files, fake_gate, make_world, zipped
from tests.api.conftest import http, running

ZIP = {"content-type": "application/zip"}


async def put(client: httpx.AsyncClient, name: str, files: dict[str, bytes], **query: int) -> httpx.Response:
    return await client.put(f"/adapters/{name}", content=zipped(files), headers=ZIP, params=query)


def id_of(files: dict[str, bytes]) -> AdapterId:
    return checkpoint_files(files).digest()


def trials(world: World) -> list[Request]:
    return [request for request in world.engine.seen if request.id.startswith("trial-")]


async def until(world: World, num_live: int) -> None:
    while world.engine.num_live < num_live:
        await asyncio.sleep(0.005)


async def test_an_upload_is_tried_on_one_prompt_beside_the_base(client: httpx.AsyncClient, world: World) -> None:
    files = checkpoint("new")
    answer = await put(client, "new", files)
    assert (answer.status_code, answer.json()["tried"], answer.json()["warnings"]) == (201, True, [])
    seen = trials(world)
    assert all(request.is_trial for request in seen)
    wanted = {(adapter, reading) for adapter in (BASE, id_of(files)) for reading in (None, Reading.LAST)}
    assert {(request.adapter, request.reading) for request in seen} == wanted
    assert len(seen) == len(wanted)
    (prompt,) = {request.prompt for request in seen}
    vocab_size = world.parts.base.vocab_size
    assert (len(prompt), prompt) == (NUM_IDS, tuple(sorted(prompt)))
    assert max(prompt) - min(prompt) > vocab_size // 2
    assert max(prompt) < vocab_size
    assert {len(request.choices) for request in seen} == {0, len(set(prompt))}


async def test_trials_are_no_callers_requests(client: httpx.AsyncClient, world: World) -> None:
    await put(client, "new", checkpoint("new"))
    page = (await client.get("/metrics")).text
    assert "peft_serve_adapter_requests_total{" not in page
    assert "vllm:request_success_total{" not in page
    assert 'peft_serve_adapter_uploads_total{outcome="created"} 1.0' in page


async def test_the_same_files_are_tried_once(client: httpx.AsyncClient, world: World) -> None:
    for files in (checkpoint("v1"), checkpoint("v2")):
        assert (await put(client, "new", files)).json()["tried"]
    num = len(trials(world))
    again = (await put(client, "new", checkpoint("v2"))).json()
    assert (again["version"], again["tried"], again["warnings"]) == (2, False, [])
    earlier = (await put(client, "new", checkpoint("v1"))).json()
    assert (earlier["version"], earlier["tried"]) == (3, False)
    assert len(trials(world)) == num


async def test_what_is_only_checked_is_not_tried(client: httpx.AsyncClient, world: World) -> None:
    dry = await put(client, "new", checkpoint("v1"), dry_run=1)
    validated = await client.post("/adapters/validate", content=zipped(checkpoint("v1")), headers=ZIP)
    assert (dry.json()["tried"], validated.json()["tried"]) == (False, False)
    assert trials(world) == []


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([[0.5, math.nan, 1.0]], "gives NaN or Infinity on the trial prompt"),
        ([[0.5, -math.inf, 1.0]], "gives NaN or Infinity on the trial prompt"),
        ([[0.5, 1.0]], "gives (1, 2) numbers on the trial prompt, not (1, 3)"),
        ([], "gives (0, 0) numbers on the trial prompt, not (1, 3)"),
    ],
)
async def test_what_cannot_be_right_is_refused(
    reading: httpx.AsyncClient, encoder: World, rows: list[list[float]], reason: str
) -> None:
    good, bad = checkpoint("good"), checkpoint("bad")
    encoder.engine.reads = lambda request: {BASE: [[1.0, 2.0, 3.0]], id_of(bad): rows}.get(
        request.adapter, [[3.0, 2.0, 1.0]]
    )
    assert (await put(reading, "new", good)).status_code == 201
    refused = await put(reading, "new", bad)
    assert (refused.status_code, refused.json()["code"]) == (422, "adapter_invalid"), refused.text
    (error,) = refused.json()["errors"]
    assert error["path"] == "adapter_model.safetensors"
    assert error["reason"].startswith(reason)
    assert (await reading.get("/adapters/new")).json()["digest"] == id_of(good)
    assert len((await reading.get("/adapters/new/versions")).json()["versions"]) == 1
    assert ("unload", id_of(bad)) in encoder.engine.commands
    with pytest.raises(AdapterUnavailable, match="missing"):
        encoder.catalog.files(id_of(bad))
    page = (await reading.get("/metrics")).text
    assert 'peft_serve_adapter_uploads_total{outcome="refused"} 1.0' in page


async def test_files_that_another_name_has_survive_a_refusal(reading: httpx.AsyncClient, encoder: World) -> None:
    files = checkpoint("shared")
    assert (await put(reading, "first", files)).status_code == 201
    encoder.engine.reads = lambda request: [[math.nan if request.adapter != BASE else 1.0]]
    assert (await put(reading, "second", files)).status_code == 422
    assert (await reading.get("/adapters/second")).status_code == 404
    assert encoder.catalog.files(id_of(files)).digest() == id_of(files)
    assert (await reading.get("/adapters/first")).json()["state"] == "active"


async def test_what_changes_nothing_is_told(reading: httpx.AsyncClient, encoder: World) -> None:
    encoder.engine.reads = lambda _: [[1.0, 2.0, 3.0]]
    plain = await put(reading, "same", checkpoint("same"))
    assert (plain.status_code, plain.json()["tried"]) == (201, True)
    assert plain.json()["warnings"][0].startswith("changes nothing on the trial prompt")
    head = await put(reading, "head", checkpoint("head", head=["SEQ_CLS", 3]))
    assert head.json()["warnings"][0].startswith("changes nothing below its head on the trial prompt")
    encoder.engine.reads = lambda request: [[1.0, 2.0, 3.0 if request.adapter == BASE else math.nextafter(3.0, 4)]]
    assert (await put(reading, "hardly", checkpoint("hardly"))).json()["warnings"] == []
    encoder.engine.reads = lambda request: [[1.0, 2.0, 3.0]] if request.adapter == BASE else [[0.0, 0.0, 0.0]]
    flat = (await put(reading, "flat", checkpoint("flat"))).json()
    assert flat["warnings"][0].startswith("gives one and the same value everywhere")


async def test_a_base_that_overflows_by_itself_blames_nobody(reading: httpx.AsyncClient, encoder: World) -> None:
    encoder.engine.reads = lambda _: [[1.0, math.nan]]
    assert (await put(reading, "new", checkpoint("new"))).status_code == 201


async def test_heads_are_read_in_their_shape(reading: httpx.AsyncClient, encoder: World) -> None:
    for name, task, num_labels in (("a", "SEQ_CLS", 3), ("b", "TOKEN_CLS", 4), ("c", "QUESTION_ANS", 2)):
        files = checkpoint(name, head=[task, num_labels])
        encoder.engine.num_labels[id_of(files)] = num_labels
        answer = await put(reading, name, files)
        assert (answer.status_code, answer.json()["warnings"]) == (201, []), answer.text
        encoder.engine.num_labels[id_of(checkpoint(f"{name}2", head=[task, num_labels]))] = num_labels + 1
    refused = await put(reading, "a", checkpoint("a2", head=["SEQ_CLS", 3]))
    assert refused.status_code == 422
    assert "gives (1, 4) numbers" in refused.text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (AdapterUnavailable("could not be put on the device: no such site"), 422),
        (Internal("the forward pass failed (RuntimeError)"), 422),
        (AdapterUnavailable("its files cannot be read", retry_after_s=30.0), 201),
        (Unavailable("the server stopped"), 201),
        (RuntimeError("whatever"), 201),
    ],
)
async def test_a_failure_is_the_adapters_or_the_servers(
    client: httpx.AsyncClient, world: World, error: Exception, status: int
) -> None:
    files = checkpoint("new")
    world.engine.fails[id_of(files)] = error
    answer = await put(client, "new", files)
    assert answer.status_code == status, answer.text
    if status == 422:
        assert answer.json()["errors"][0]["reason"] == f"does not run on the trial prompt: {error}"
    else:
        assert answer.json()["tried"] is False
        assert answer.json()["warnings"][0].startswith("was not tried out: ")
    own = [request for request in trials(world) if request.adapter == id_of(files) and request.reading is None]
    assert len(own) == (2 if isinstance(error, Internal) else 1), "a pass that fails is run once more"


async def test_a_base_that_fails_proves_nothing(client: httpx.AsyncClient, world: World) -> None:
    world.engine.fails[BASE] = Internal("the forward pass failed")
    answer = (await put(client, "new", checkpoint("new"))).json()
    assert (answer["tried"], "the base itself" in answer["warnings"][0]) == (False, True)


async def test_pins_that_leave_no_room_are_not_the_adapters_fault(client: httpx.AsyncClient, world: World) -> None:
    files = checkpoint("new")
    full = AdapterUnavailable("8 pinned adapters leave no room: unpin one", retry_after_s=30.0)
    world.engine.fails[id_of(files)] = full
    answer = await put(client, "new", files)
    assert (answer.status_code, answer.json()["tried"]) == (201, False)
    assert "unpin one" in answer.json()["warnings"][0]


async def test_a_server_that_cannot_try_it_lets_it_through(client: httpx.AsyncClient, world: World) -> None:
    world.engine.max_queue = 1  # the first request is taken, the next is not
    world.engine.held = True
    full = await put(client, "full", checkpoint("full"))
    assert (full.status_code, full.json()["tried"]) == (201, False)
    assert full.json()["warnings"] == ["was not tried out: the queue is full; come back later"]
    assert world.engine.num_live == 0, "what was taken is given back"
    world.engine.held, world.engine.max_queue = False, 99
    world.engine.state = EngineState.DRAINING
    draining = await put(client, "draining", checkpoint("draining"))
    assert (draining.status_code, draining.json()["tried"]) == (201, False)
    world.engine.state = EngineState.RUNNING
    long = await put(client, "long", checkpoint("long", num_virtual_tokens=MAX_CONTEXT))
    assert long.json()["warnings"] == ["was not tried out: its virtual tokens leave no room for a prompt"]


async def test_the_name_waits_for_the_trial_and_nobody_else_does(client: httpx.AsyncClient, world: World) -> None:
    world.engine.held = True
    upload = asyncio.create_task(put(client, "new", checkpoint("new")))
    await until(world, num_live=4)
    assert (await client.get("/adapters/new")).status_code == 404
    assert (await client.get("/adapters/plain")).status_code == 200
    assert not upload.done()
    world.engine.held = False
    assert (await upload).status_code == 201
    assert (await client.get("/adapters/new")).status_code == 200


async def test_a_trial_that_takes_too_long_is_given_up(world: World) -> None:
    world.engine.held = True
    loop = asyncio.get_running_loop()
    learned: list[tuple[str, str]] = []
    trial = Trial(
        world.parts,
        EngineClient(world.engine, loop),
        loop,
        new_id=lambda prefix: f"{prefix}{len(world.engine.seen)}",
        learn=lambda adapter, name: learned.append((adapter, name)),
        limit_s=0.05,
    )
    found = fake_gate(checkpoint_files(checkpoint("new")))
    proof = await asyncio.to_thread(trial.prove, "new", found)
    assert proof.is_tried is False
    assert proof.warnings == ("was not tried out: the server did not get to it within 0.05 seconds",)
    assert world.engine.num_live == 0, "its requests are cancelled"
    assert learned == [(found.id, "new")]


async def test_a_prompt_holds_what_the_adapter_acts_on(client: httpx.AsyncClient, world: World) -> None:
    vocab_size = world.parts.base.vocab_size
    await put(client, "invoked", checkpoint("invoked", cues=[5, 4, 5, vocab_size, vocab_size + 9]))
    assert {request.prompt[NUM_IDS:] for request in trials(world)} == {(5, 4, 5)}
    world.engine.seen.clear()
    await put(client, "narrow", checkpoint("narrow", cues=[5, 4], num_virtual_tokens=MAX_CONTEXT - 4))
    (prompt,) = {request.prompt for request in trials(world)}
    assert (len(prompt), prompt[1:]) == (3, (5, 4))


async def test_the_first_of_several_tasks_is_tried(client: httpx.AsyncClient, world: World) -> None:
    files = checkpoint("several", num_tasks=3)
    assert (await put(client, "several", files)).json()["tried"]
    assert {request.adapter for request in trials(world)} == {BASE, f"{id_of(files)}#0"}


async def test_an_encoder_decoder_scores(tiny_tokenizer: Any, tmp_path: Path) -> None:
    made = make_world(tiny_tokenizer, tmp_path, is_encoder_decoder=True)
    with running(made):
        async with http(made) as client:
            answer = await put(client, "new", checkpoint("new"))
    assert (answer.status_code, answer.json()["tried"], answer.json()["warnings"]) == (201, True, [])
    assert len(trials(made)) == 2
    assert all(request.decoder_prompt == (0,) and len(request.choices) > 1 for request in trials(made))
