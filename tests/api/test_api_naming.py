"""Which adapter a call is for: every place it can be named in, and contradictions."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_serve.api.naming import Mention, agreed_name
from peft_serve.core import BASE
from peft_serve.errors import AdapterConflict
from tests.api.api_fakes import BASE_NAME, World

PLACES: list[tuple[dict[str, Any], dict[str, str], dict[str, Any]]] = [
    ({"adapter": "plain"}, {}, {}),
    ({}, {"X-Adapter": "plain"}, {}),
    ({}, {}, {"parameters": {"adapter_id": "plain"}}),
    ({}, {}, {"adapter_id": "plain"}),
    ({}, {}, {"adapter": "plain"}),
    ({}, {}, {"adapter": ["plain"]}),
    ({}, {}, {"model": "plain"}),
]


@pytest.mark.parametrize(("query", "headers", "body"), PLACES)
async def test_every_place_names_an_adapter(
    client: httpx.AsyncClient, query: dict[str, str], headers: dict[str, str], body: dict[str, Any]
) -> None:
    answer = await client.post("/generate", params=query, headers=headers, json={"inputs": "x", **body})
    assert answer.headers["x-adapter"] == "plain"


@pytest.mark.parametrize("place", PLACES)
async def test_places_that_disagree_are_refused(client: httpx.AsyncClient, place: Any, world: World) -> None:
    query, headers, body = place
    for other in PLACES:
        if other is place or {*other[2]} & {*body}:
            continue
        mixed = {
            "params": query | dict.fromkeys(other[0], "soft"),
            "headers": headers | dict.fromkeys(other[1], "soft"),
            "json": {"inputs": "x", **body, **_renamed(other[2])},
        }
        if other[0].keys() & query.keys() or other[1].keys() & headers.keys():
            continue
        answer = await client.post("/generate", **mixed)
        assert (answer.status_code, answer.json()["code"]) == (400, "adapter_conflict")
    assert world.engine.seen == []


def _renamed(body: dict[str, Any]) -> dict[str, Any]:
    if "parameters" in body:
        return {"parameters": {"adapter_id": "soft"}}
    return {name: ["soft"] if isinstance(value, list) else "soft" for name, value in body.items()}


async def test_agreement_absence_and_the_base(client: httpx.AsyncClient, world: World) -> None:
    agreed = await client.post("/generate?adapter=plain", headers={"X-Adapter": "plain"}, json={"inputs": "x"})
    assert agreed.headers["x-adapter"] == "plain"
    for query in ("", "?adapter=", "?adapter=base", f"?adapter={BASE_NAME}"):
        answer = await client.post(f"/generate{query}", json={"inputs": "x", "adapter_id": ""})
        assert answer.headers["x-adapter"] == "base"
    twice = await client.post("/generate?adapter=plain&adapter=soft", json={"inputs": "x"})
    assert twice.status_code == 400
    base = await client.post("/generate?adapter=base", json={"inputs": "x", "adapter_id": "plain"})
    assert base.status_code == 400
    assert all(request.adapter in (BASE, world.adapters["plain"]) for request in world.engine.seen)


@pytest.mark.parametrize("model", ["base", "dummy", "tgi", BASE_NAME, "", None])
async def test_words_for_the_base_in_model_do_not_disagree(client: httpx.AsyncClient, model: str | None) -> None:
    body = {"prompt": "x", "model": model}
    assert (await client.post("/v1/completions", json=body)).headers["x-adapter"] == "base"
    named = await client.post("/v1/completions?adapter=plain", json=body)
    assert named.headers["x-adapter"] == "plain"
    assert named.json()["model"] == "plain"


async def test_versions_are_pinned(client: httpx.AsyncClient, world: World) -> None:
    from tests.api.api_fakes import checkpoint

    first = world.adapters["plain"]
    second = world.publish("plain", checkpoint("second"))
    for ref, number, adapter in (("plain", 2, second), ("plain@1", 1, first), (f"plain@{first}", 1, first)):
        answer = await client.post("/generate", params={"adapter": ref}, json={"inputs": "x"})
        assert (answer.headers["x-adapter-version"], answer.json()["adapter"]["digest"]) == (str(number), adapter)
    assert (await client.post("/generate?adapter=plain@9", json={"inputs": "x"})).status_code == 404


HOSTILE = [
    "nobody",
    "../plain",
    "plain/..",
    "pla in@",
    "Plain",
    "plain@x",
    "a" * 70,
    "\u202eplain",
    "plain\x00",
    "@",
    "*",
]


@pytest.mark.parametrize("name", HOSTILE)
async def test_an_unknown_name_is_never_answered_by_the_base(
    client: httpx.AsyncClient, name: str, world: World
) -> None:
    for answer in (
        await client.post("/generate", params={"adapter": name}, json={"inputs": "x"}),
        await client.post("/generate", json={"inputs": "x", "adapter": name}),
        await client.post("/v1/completions", json={"prompt": "x", "model": name}),
    ):
        body = answer.json()
        assert (answer.status_code, body.get("code") or body["error"]["code"]) in [
            (404, "model_not_found"),
            (422, "invalid_parameter"),
        ]
        assert answer.status_code == 404 or "+" in answer.text
    assert world.engine.seen == []


@given(st.lists(st.sampled_from(["", "base", BASE_NAME, "a", "b", " "]), max_size=5))
def test_the_agreed_name_is_the_only_one_named(names: list[str]) -> None:
    mentions = [Mention(f"place {i}", name) for i, name in enumerate(names)]
    named = {"base" if name == BASE_NAME else name for name in names if name.strip()}
    if len(named) > 1:
        with pytest.raises(AdapterConflict):
            agreed_name(mentions, BASE_NAME)
    else:
        assert agreed_name(mentions, BASE_NAME) == (named.pop() if named else "base")


@pytest.mark.parametrize(
    ("field", "meant"),
    [("adaptor", "adapter"), ("Adapter", "adapter"), ("adapter_id", "adapter"), ("taskid", "task_id")],
)
async def test_a_mistyped_field_of_the_query_is_not_answered_by_the_base(
    client: httpx.AsyncClient, world: World, field: str, meant: str
) -> None:
    answer = await client.post("/generate", params={field: "plain"}, json={"inputs": "x"})
    assert answer.status_code == 422
    assert answer.json()["error"] == f"query {field}: did you mean {meant}?"
    assert world.engine.seen == []


@pytest.mark.parametrize("field", ["api-version", "trace_id", "chapter", "utm_source"])
async def test_what_gateways_add_to_a_query_passes(client: httpx.AsyncClient, field: str) -> None:
    answer = await client.post("/generate", params={field: "1", "adapter": "plain"}, json={"inputs": "x"})
    assert answer.headers["x-adapter"] == "plain"
