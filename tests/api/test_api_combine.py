"""Several adapters in one request: combinations, tasks of one checkpoint, and ensembles."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from peft_serve.adapters.combined import Part, combined_id, parts_of
from peft_serve.api.ensembles import pooled
from peft_serve.core import BASE, FinishReason
from peft_serve.errors import InvalidParameter
from tests.api.api_fakes import BASE_NAME, World, checkpoint
from tests.api.conftest import COMPLAINTS


def seen_parts(world: World) -> list[tuple[str, float, int | None]]:
    names = {adapter: name for name, adapter in world.adapters.items()}
    return [(names[part.id], part.weight, part.task) for part in parts_of(world.engine.seen[-1].adapter)]


@pytest.mark.parametrize(
    ("expression", "parts"),
    [
        ("plain+soft", [("plain", 1.0, None), ("soft", 1.0, None)]),
        ("soft+plain", [("soft", 1.0, None), ("plain", 1.0, None)]),
        ("plain:0.7+complaints:0.3", [("plain", 0.7, None), ("complaints", 0.3, None)]),
        ("plain@1:-2+soft", [("plain", -2.0, None), ("soft", 1.0, None)]),
        ("plain:0.5", [("plain", 0.5, None)]),
        ("plain:1", [("plain", 1.0, None)]),
    ],
)
async def test_an_expression_is_one_adapter(
    client: httpx.AsyncClient, world: World, expression: str, parts: list[tuple[str, float, int | None]]
) -> None:
    answer = await client.post("/generate", params={"adapter": expression}, json={"inputs": "x"})
    assert answer.status_code == 200, answer.text
    assert seen_parts(world) == parts
    expected = expression.removesuffix(":1")
    assert answer.headers["x-adapter"] == expected
    assert answer.headers["x-adapter-version"] == "+".join("1" for _ in parts)
    told = answer.json()["adapter"]
    assert told["name"] == expected
    if expected == "plain":
        assert "parts" not in told
        return
    assert told["version"] is told["digest"] is None
    assert [(part["name"], part["weight"]) for part in told["parts"]] == [part[:2] for part in parts]
    page = (await client.get("/metrics")).text
    if len(parts) > 1:
        assert f'adapter_requests_total{{adapter="{expected}",method="combined",outcome="ok"}} 1.0' in page


@pytest.mark.parametrize("query", ["adapter=plain+soft", "adapter=plain%2Bsoft"])
async def test_every_place_takes_an_expression(client: httpx.AsyncClient, world: World, query: str) -> None:
    both = combined_id([Part(id=world.adapters["plain"]), Part(id=world.adapters["soft"])])
    body = {"inputs": "x"}
    places = (
        await client.post(f"/generate?{query}", json=body),
        await client.post("/generate", headers={"X-Adapter": "plain+soft"}, json=body),
        await client.post("/generate", json={**body, "adapter": "plain+soft"}),
        await client.post("/generate", json={**body, "adapter": ["plain+soft"], "inputs": ["x"]}),
        await client.post("/generate", json={**body, "parameters": {"adapter_id": "plain+soft"}}),
        await client.post("/v1/completions", json={"prompt": "x", "model": "plain+soft"}),
    )
    assert [answer.status_code for answer in places] == [200] * len(places)
    assert [request.adapter for request in world.engine.seen] == [both] * len(places)
    assert places[-1].json()["model"] == "plain+soft"


async def test_versions_are_pinned_when_the_request_is_admitted(client: httpx.AsyncClient, world: World) -> None:
    first = world.adapters["plain"]
    second = world.publish("plain", checkpoint("second"))
    await client.post("/generate?adapter=plain@1%2Bsoft", json={"inputs": "x"})
    assert parts_of(world.engine.seen[-1].adapter)[0].id == first
    answer = await client.post("/generate?adapter=plain%2Bsoft", json={"inputs": "x"})
    assert parts_of(world.engine.seen[-1].adapter)[0].id == second
    assert answer.headers["x-adapter-version"] == "2+1"
    world.adapters["first"] = first  # what holds it is counted as well


async def test_every_part_is_held_until_the_answers_end(client: httpx.AsyncClient, world: World) -> None:
    world.engine.fails_after[combined_id([Part(id=world.adapters["plain"]), Part(id=world.adapters["soft"])])] = (
        RuntimeError("x")
    )
    world.engine.step_s = 0.05
    counts = []
    submit = world.engine.submit

    def watched(request: Any) -> None:
        submit(request)
        counts.append([world.catalog.in_flight(world.adapters[name]) for name in ("plain", "soft", "complaints")])

    world.engine.submit = watched  # type: ignore[method-assign]
    answer = await client.post("/generate?adapter=plain%2Bsoft", json={"inputs": ["a", "b"]})
    assert answer.status_code == 500
    assert all(plain >= 2 and soft >= 2 and other == 0 for plain, soft, other in counts)
    assert world.num_held == 0


async def test_deleting_a_part_unloads_what_is_made_of_it(client: httpx.AsyncClient, world: World) -> None:
    both = combined_id([Part(id=world.adapters["plain"]), Part(id=world.adapters["soft"], weight=2.0)])
    other = combined_id([Part(id=world.adapters["complaints"], weight=2.0)])
    world.engine.resident |= {both: False, other: False}
    assert (await client.delete("/adapters/plain")).status_code == 204
    assert ("unload", both) in world.engine.commands
    assert ("unload", other) not in world.engine.commands


REFUSED = [
    ("plain+nobody", 404, "'nobody' does not exist"),
    ("plain+soft@9", 404, "does not exist"),
    ("plain+base", 422, "the base is part of every answer"),
    (f"plain+{BASE_NAME}", 422, "the base is part of every answer"),
    ("base:0.5", 422, "the base is part of every answer"),
    ("plain+plain", 422, "twice"),
    ("plain+plain@1", 422, "stand for the same files"),
    ("plain:0+soft", 422, "a weight is a number"),
    ("plain:x", 422, "a weight is a number"),
    ("plain@sha256:00", 422, "a digest is written whole"),
    ("plain:1e3+soft", 422, "a weight is a number"),
    ("+".join(f"n{i}" for i in range(9)), 422, "at most 8"),
    ("plain+", 422, "nothing beside"),
    ("+", 422, "nothing beside"),
]


@pytest.mark.parametrize(("expression", "status", "reason"), REFUSED)
async def test_what_is_no_combination_is_refused(
    client: httpx.AsyncClient, world: World, expression: str, status: int, reason: str
) -> None:
    answer = await client.post("/generate", params={"adapter": expression}, json={"inputs": "x"})
    assert (answer.status_code, reason in answer.json()["detail"]) == (status, True), answer.text
    assert (world.engine.seen, world.num_held) == ([], 0)


async def test_parts_that_do_not_go_together_are_the_callers_to_put_right(
    client: httpx.AsyncClient, world: World
) -> None:
    both = combined_id([Part(id=world.adapters["plain"]), Part(id=world.adapters["soft"])])
    world.engine.fails[both] = InvalidParameter("adapter: these cannot be combined: why; name one", param="adapter")
    answer = await client.post("/generate?adapter=plain%2Bsoft", json={"inputs": "x"})
    assert (answer.status_code, answer.json()["param"]) == (422, "adapter")
    assert "cannot be combined" in answer.json()["detail"]
    openai = await client.post("/v1/completions", json={"prompt": "x", "model": "plain+soft"})
    assert (openai.status_code, openai.json()["error"]["param"]) == (400, "adapter")


async def test_virtual_tokens_of_all_parts_count(client: httpx.AsyncClient, world: World) -> None:
    world.publish("soft-too", checkpoint("soft-too", peft_type="PROMPT_TUNING", num_virtual_tokens=100))

    async def status(expression: str, num: int) -> int:
        body = {"inputs": "x" * num, "parameters": {"max_new_tokens": 12}}
        return (await client.post("/generate", params={"adapter": expression}, json=body)).status_code

    assert await status("soft+soft-too", 300) == 200
    assert await status("soft+soft-too", 301) == 422
    assert await status("soft+plain", 400) == 200


async def test_profiles_are_united_and_differences_are_asked_back(client: httpx.AsyncClient, world: World) -> None:
    answer = await client.post("/generate?adapter=plain%2Bcomplaints", json={"inputs": "Where?"})
    assert answer.json()["generated_text"] in COMPLAINTS["choices"]
    assert world.parts.codec.decode(world.engine.seen[-1].prompt) == "Tweet text : Where? Label :"
    world.publish("other", checkpoint("other", profile={"template": "<{text}>", "parameters": {"max_new_tokens": 4}}))
    differ = await client.post("/generate?adapter=other%2Bcomplaints", json={"inputs": "x"})
    assert (differ.status_code, differ.json()["param"]) == (422, "template")
    said = {"inputs": "x", "parameters": {"template": "[{text}]"}}
    assert (await client.post("/generate?adapter=other%2Bcomplaints", json=said)).status_code == 200
    assert world.parts.codec.decode(world.engine.seen[-1].prompt) == "[x]"
    world.publish("longer", checkpoint("longer", profile={"parameters": {"max_new_tokens": 5}}))
    number = await client.post("/generate?adapter=other%2Blonger", json={"inputs": "x"})
    assert (number.status_code, number.json()["param"]) == (422, "max_new_tokens")


async def test_two_heads_are_refused_and_one_answers(reading: httpx.AsyncClient, encoder: World) -> None:
    two = await reading.post("/classify?adapter=moods%2Brating", json={"inputs": "new"})
    assert (two.status_code, "2 task heads" in two.json()["detail"]) == (422, True)
    one = await reading.post("/classify?adapter=plain%2Bmoods", json={"inputs": "new"})
    assert {each["label"] for each in one.json()[0]} == {"sad", "glad", "mad"}
    embedded = await reading.post("/embed?adapter=plain:0.5%2Bmoods", json={"inputs": "new"})
    assert embedded.status_code == 200
    assert [part[:2] for part in seen_parts(encoder)] == [("plain", 0.5), ("moods", 1.0)]


# ---- tasks


async def test_a_task_is_named_in_every_place(client: httpx.AsyncClient, world: World) -> None:
    world.publish("many", checkpoint("many", num_tasks=3))
    for answer in (
        await client.post("/generate?adapter=many&task_id=2", json={"inputs": "x"}),
        await client.post("/generate?adapter=many", json={"inputs": "x", "parameters": {"task_id": 2}}),
        await client.post("/v1/completions", json={"prompt": "x", "model": "many", "task_id": 2}),
        await client.post("/v1/completions?task_id=2", json={"prompt": "x", "model": "many"}),
        await client.post(
            "/v1/chat/completions?task_id=2", json={"messages": [{"role": "user", "content": "x"}], "model": "many"}
        ),
        await client.post("/embed?adapter=many&task_id=2", json={"inputs": "x"}),
        await client.post("/v1/embeddings?task_id=2", json={"input": "x", "model": "many"}),
        await client.post("/classify?adapter=many&task_id=2", json={"inputs": "x", "parameters": {"choices": ["a"]}}),
    ):
        assert answer.status_code == 200, answer.text
        assert seen_parts(world) == [("many", 1.0, 2)]
        assert answer.headers["x-adapter"] == "many"


async def test_tasks_have_a_range(client: httpx.AsyncClient, world: World) -> None:
    world.publish("many", checkpoint("many", num_tasks=3))
    cases = [
        ("many", "", "holds 3 tasks and the request names none; send task_id 0 to 2"),
        ("many", "&task_id=3", "3 is none of them; send task_id 0 to 2"),
        ("plain", "&task_id=1", "plain holds one task"),
        ("base", "&task_id=1", "base holds one task"),
        ("plain%2Bsoft", "&task_id=1", "holds one task"),
        ("many", "&task_id=x", "a number from 0 on"),
        ("many", "&task_id=-1", "a number from 0 on"),
    ]
    for adapter, query, reason in cases:
        answer = await client.post(f"/generate?adapter={adapter}{query}", json={"inputs": "x"})
        assert (answer.status_code, answer.json()["param"]) == (422, "task_id")
        assert reason in answer.json()["detail"]
    differ = await client.post("/generate?adapter=many&task_id=1", json={"inputs": "x", "parameters": {"task_id": 2}})
    assert differ.status_code == 400
    for adapter in ("plain", "base"):
        first = await client.post(f"/generate?adapter={adapter}&task_id=0", json={"inputs": "x"})
        assert first.status_code == 200
        assert world.engine.seen[-1].adapter == world.adapters.get(adapter, BASE)
    assert (await client.get("/v1/models/many")).json()["num_tasks"] == 3


async def test_a_profile_may_name_the_task(client: httpx.AsyncClient, world: World) -> None:
    world.publish("many", checkpoint("many", num_tasks=3, profile={"parameters": {"task_id": 1}}))
    await client.post("/generate?adapter=many", json={"inputs": "x"})
    assert seen_parts(world) == [("many", 1.0, 1)]
    await client.post("/generate?adapter=many&task_id=0", json={"inputs": "x"})
    assert seen_parts(world) == [("many", 1.0, 0)]
    await client.post("/embed?adapter=plain:2%2Bmany", json={"inputs": "x"})
    assert seen_parts(world) == [("plain", 2.0, None), ("many", 1.0, 1)]


# ---- ensembles


def test_scores_are_averaged_or_counted() -> None:
    members = [{"a": 0.6, "b": 0.3, "c": 0.1}, {"a": 0.5, "b": 0.4, "c": 0.1}, {"a": 0.0, "b": 0.9, "c": 0.1}]
    assert list(pooled(members, "mean").items()) == [
        ("b", pytest.approx(1.6 / 3)),
        ("a", pytest.approx(1.1 / 3)),
        ("c", pytest.approx(0.1)),
    ]
    assert list(pooled(members, "vote").items()) == [("a", pytest.approx(2 / 3)), ("b", pytest.approx(1 / 3)), ("c", 0)]
    assert list(pooled(members[1:], "vote")) == ["b", "a", "c"], "of as many votes, the better mean"


async def test_members_answer_together(reading: httpx.AsyncClient, encoder: World) -> None:
    members = ["moods", "moods-too"]
    for body in (
        {"inputs": ["new", "york"], "ensemble": members, "parameters": {"details": True}},
        {"inputs": ["new", "york"], "parameters": {"ensemble": members, "details": True}},
    ):
        answer = await reading.post("/classify", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-adapter"] == "moods,moods-too"
        for text, told in zip(("new", "york"), answer.json(), strict=True):
            alone = [(await reading.post(f"/classify?adapter={m}", json={"inputs": text})).json()[0] for m in members]
            assert [member["answer"] for member in told["members"]] == alone
            assert [member["adapter"]["name"] for member in told["members"]] == members
            scores = [{each["label"]: each["score"] for each in member} for member in alone]
            mean = {label: (scores[0][label] + scores[1][label]) / 2 for label in scores[0]}
            assert {each["label"]: each["score"] for each in told["answer"]} == pytest.approx(mean)
            assert told["adapter"]["name"] == "moods,moods-too"
    plain = await reading.post("/classify", json={"inputs": "new", "ensemble": members, "parameters": {"top_k": 1}})
    assert [len(each) for each in plain.json()] == [1]
    votes = {"inputs": "new", "ensemble": members, "parameters": {"ensemble_by": "vote"}}
    shares = [each["score"] for each in (await reading.post("/classify", json=votes)).json()[0]]
    assert sorted(shares, reverse=True) == shares
    assert set(shares) <= {0.0, 0.5, 1.0}
    beside = await reading.post("/classify", json={"inputs": "new", "ensemble": members, "ensemble_by": "vote"})
    assert beside.json() == (await reading.post("/classify", json=votes)).json()


async def test_choices_can_be_made_together(client: httpx.AsyncClient, world: World) -> None:
    world.publish("complaints-too", checkpoint("too", profile=COMPLAINTS))
    members = ["complaints", "complaints-too", "plain+complaints-too"]
    body = {"inputs": "Where is it?", "ensemble": members, "parameters": {"details": True}}
    answer = await client.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    own = [member["details"]["choices"] for member in told["details"]["members"]]
    for choice in told["details"]["choices"]:
        scores = [each["score"] for choices in own for each in choices if each["label"] == choice["label"]]
        assert len(scores) == 3
        assert choice["score"] == pytest.approx(sum(scores) / 3)
    assert told["generated_text"] == told["details"]["choices"][0]["label"]
    assert [member["name"] for member in told["adapter"]["members"]] == members
    assert len({request.adapter for request in world.engine.seen}) == 3
    classified = (await client.post("/classify", json={"inputs": "Where is it?", "ensemble": members})).json()
    assert classified == [[{"label": c["label"], "score": c["score"]} for c in told["details"]["choices"]]]
    voted = (await client.post("/generate", json={**body, "ensemble_by": "vote"})).json()["details"]["choices"]
    assert sum(choice["score"] for choice in voted) == pytest.approx(1)
    assert all((3 * choice["score"]) % 1 == pytest.approx(0) for choice in voted)
    plain = await client.post("/generate", json={**body, "inputs": ["a", "b"], "parameters": {}})
    assert [set(one) for one in plain.json()] == [{"generated_text", "adapter"}] * 2


async def test_what_is_no_ensemble_is_refused(client: httpx.AsyncClient, world: World) -> None:
    world.publish("three", checkpoint("three", profile={"choices": {"a": "a", "b": "b", "c": "c"}}))
    cases: list[tuple[str, dict[str, Any], int, str]] = [
        ("/generate", {"ensemble": ["complaints", "plain"]}, 422, "plain does not answer with one label"),
        ("/generate", {"ensemble": ["complaints", "three"]}, 422, "have different labels"),
        ("/generate", {"ensemble": ["complaints"]}, 422, "ensemble"),
        ("/generate", {"ensemble": ["complaints", "three"], "stream": True}, 422, "leave stream"),
        ("/generate", {"ensemble": ["complaints", "three"], "parameters": {"n": 2}}, 422, "best_of"),
        ("/generate", {"ensemble": ["complaints", "three"], "adapter": "plain"}, 400, "as well"),
        ("/generate?adapter=plain", {"ensemble": ["complaints", "three"]}, 400, "as well"),
        ("/classify", {"ensemble": ["complaints", "three"], "adapter_id": "plain"}, 400, "as well"),
        ("/classify", {"ensemble": ["a", "b"], "parameters": {"ensemble": ["a", "c"]}}, 400, "as well"),
        ("/classify", {"ensemble": ["complaints", "nobody"]}, 404, "nobody"),
        ("/classify", {"ensemble": ["complaints", "complaints"]}, 422, "twice"),
        ("/classify", {"ensemble": ["complaints"] * 17}, 422, "ensemble"),
    ]
    for path, body, status, reason in cases:
        answer = await client.post(path, json={"inputs": "x", **body})
        assert (answer.status_code, reason in answer.json()["detail"]) == (status, True), answer.text
    assert world.engine.seen == []
    assert FinishReason.CANCELLED not in [reason for _, reason in world.engine.cancelled]


async def test_spans_and_tokens_are_not_averaged(reading: httpx.AsyncClient) -> None:
    answer = await reading.post("/classify", json={"inputs": "new", "ensemble": ["names", "moods"]})
    assert (answer.status_code, answer.json()["param"]) == (422, "ensemble")
