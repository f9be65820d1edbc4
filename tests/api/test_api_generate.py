"""`/generate` and its relatives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from peft_serve.api import fields
from peft_serve.api.app import create_app
from peft_serve.api.bodies import Parameters
from peft_serve.core import BASE, FinishReason
from peft_serve.engine.snapshot import EngineState
from peft_serve.errors import AdapterUnavailable
from tests.api.api_fakes import BASE_NAME, EOS, World, checkpoint, make_world
from tests.api.conftest import http, running


def events(text: str) -> list[dict[str, Any]]:
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data:") and not line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data:")) for line in lines]


async def test_one_input_answers_an_object_and_says_who_answered(client: httpx.AsyncClient, world: World) -> None:
    answer = await client.post("/generate?adapter=plain", json={"inputs": "hello"})
    assert answer.status_code == 200
    body = answer.json()
    assert set(body) == {"generated_text", "adapter"}
    assert body["adapter"] == {
        "name": "plain",
        "version": 1,
        "digest": world.adapters["plain"],
        "peft_type": "LORA",
    }
    assert len(body["generated_text"]) == 5
    assert answer.headers["x-adapter"] == "plain"
    assert answer.headers["x-adapter-version"] == "1"
    assert answer.headers["x-prompt-tokens"] == "5"
    assert answer.headers["x-generated-tokens"] == "6"
    for name in ("x-queue-time", "x-time-to-first-token", "x-total-time"):
        assert float(answer.headers[name]) >= 0
    assert len(answer.headers["x-request-id"]) == 32


async def test_the_base_answers_when_nobody_is_named(client: httpx.AsyncClient, world: World) -> None:
    answer = await client.post("/generate", json={"inputs": "hello"})
    assert answer.json()["adapter"] == {"name": "base", "version": None, "digest": None, "peft_type": None}
    assert answer.headers["x-adapter"] == "base"
    assert "x-adapter-version" not in answer.headers
    assert world.engine.seen[-1].adapter == BASE
    other = await client.post("/generate?adapter=plain", json={"inputs": "hello"})
    assert other.json()["generated_text"] != answer.json()["generated_text"]


async def test_a_list_answers_a_list_in_order_and_as_alone(client: httpx.AsyncClient) -> None:
    texts = [f"text {i}" for i in range(8)]
    names = ["plain", None, "soft", "base", "plain", "soft", "", "plain@1"]
    answer = await client.post("/generate", json={"inputs": texts, "adapter": names})
    assert answer.status_code == 200, answer.text
    for text, name, one in zip(texts, names, answer.json(), strict=True):
        alone = await client.post("/generate", json={"inputs": text, "adapter": name})
        assert alone.json() == one
    assert answer.headers["x-adapter"] == "plain,base,soft"


async def test_a_list_of_one_is_a_list_and_root_always_answers_one(client: httpx.AsyncClient) -> None:
    assert isinstance((await client.post("/generate", json={"inputs": ["a"]})).json(), list)
    assert len((await client.post("/", json={"inputs": "a"})).json()) == 1
    assert len((await client.post("/", json={"inputs": ["a", "b"]})).json()) == 2


async def test_names_and_inputs_must_be_as_many(client: httpx.AsyncClient) -> None:
    answer = await client.post("/generate", json={"inputs": ["a", "b"], "adapter": ["plain"]})
    assert answer.status_code == 422
    assert answer.json()["param"] == "adapter"


async def test_nothing_runs_when_one_input_is_refused(client: httpx.AsyncClient, world: World) -> None:
    answer = await client.post("/generate", json={"inputs": ["a", "b"], "adapter": ["plain", "nobody"]})
    assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")
    long = await client.post("/generate?adapter=plain", json={"inputs": ["a", "b" * 600]})
    assert (long.status_code, long.json()["code"]) == (422, "context_length_exceeded")
    assert world.engine.seen == []


async def test_one_that_fails_cancels_the_rest(client: httpx.AsyncClient, world: World) -> None:
    world.engine.fails[world.adapters["plain"]] = AdapterUnavailable("adapter 'plain': its files are damaged")
    world.engine.step_s = 0.01
    body = {"inputs": ["a", "b", "c"], "adapter": ["plain", "soft", "soft"], "parameters": {"max_new_tokens": 99}}
    answer = await client.post("/generate", json=body)
    assert (answer.status_code, answer.json()["code"]) == (503, "adapter_unavailable")
    assert "retry-after" not in answer.headers
    assert len(world.engine.cancelled) == 2


async def test_details_are_told_when_asked_for(client: httpx.AsyncClient) -> None:
    parameters = {"details": True, "top_n_tokens": 2}
    body = (await client.post("/generate", json={"inputs": "hello", "parameters": parameters})).json()
    details = body["details"]
    assert details["finish_reason"] == "eos_token"
    assert details["generated_tokens"] == len(details["tokens"]) == 6
    assert details["prompt_tokens"] == details["input_length"] == 5
    assert details["seed"] is None
    assert details["prefill"] == []
    assert details["best_of_sequences"] is None
    assert details["skipped_tokens"] == 0
    assert "".join(t["text"] for t in details["tokens"] if not t["special"]) == body["generated_text"]
    assert details["tokens"][-1] == {"id": EOS, "text": "</s>", "logprob": -0.25, "special": True, "skipped": False}
    assert [len(top) for top in details["top_tokens"]] == [2] * 6
    assert "choices" not in details


async def test_explicit_nulls_are_absent(client: httpx.AsyncClient, world: World) -> None:
    names = [*Parameters.model_fields, *fields.PARAMETERS.refused, *fields.PARAMETERS.ignored, "whatever_comes_next"]
    body = {"inputs": "hello", "adapter": None, "stream": None, "model": None, "adapter_id": None, "options": None}
    nulls = await client.post("/generate", json=body | {"parameters": dict.fromkeys(names)})
    assert nulls.status_code == 200, nulls.text
    assert nulls.json() == (await client.post("/generate", json={"inputs": "hello"})).json()
    assert world.engine.seen[0].sampling == world.engine.seen[1].sampling
    assert (await client.post("/generate", json={"inputs": "hello", "parameters": None})).status_code == 200


async def test_a_profile_fills_in_template_choices_and_parameters(client: httpx.AsyncClient, world: World) -> None:
    answer = await client.post(
        "/generate?adapter=complaints", json={"inputs": "Where is it?", "parameters": {"details": True}}
    )
    body, request = answer.json(), world.engine.seen[-1]
    assert world.parts.codec.decode(request.prompt) == "Tweet text : Where is it? Label :"
    assert [world.parts.codec.decode(ids) for ids in request.choices] == [" complaint", " no complaint"]
    choices = body["details"]["choices"]
    assert body["generated_text"] == choices[0]["label"]
    assert body["details"]["finish_reason"] == "eos_token"
    assert sum(choice["score"] for choice in choices) == pytest.approx(1.0)
    assert choices[0]["logprob"] > choices[1]["logprob"]
    tokens = body["details"]["tokens"]
    assert "".join(token["text"] for token in tokens).strip() == choices[0]["label"]
    assert sum(token["logprob"] for token in tokens) == pytest.approx(choices[0]["logprob"])


async def test_null_switches_a_profile_off_and_a_value_replaces_it(client: httpx.AsyncClient, world: World) -> None:
    async def asked(**parameters: Any) -> Any:
        answer = await client.post("/generate?adapter=complaints", json={"inputs": "x", "parameters": parameters})
        assert answer.status_code == 200, answer.text
        return world.engine.seen[-1]

    codec = world.parts.codec
    assert codec.decode((await asked(template=None)).prompt) == "x"
    assert codec.decode((await asked(template="<{text}>")).prompt) == "<x>"
    free = await asked(choices=None)
    assert free.choices == ()
    assert free.sampling.max_new_tokens == 4  # the profile's
    assert (await asked(choices=None, max_new_tokens=7)).sampling.max_new_tokens == 7
    chosen = await asked(choices={"yes": "it is", "no": "it is not"})
    assert [codec.decode(ids) for ids in chosen.choices] == [" it is", " it is not"]


async def test_choices_of_a_request_name_the_label(client: httpx.AsyncClient) -> None:
    for choices in (["a", "b", "c"], {"x": "first", "y": "second"}):
        answer = await client.post("/generate", json={"inputs": "q", "parameters": {"choices": choices}})
        assert answer.json()["generated_text"] in choices


async def test_choices_stream_as_one_event(client: httpx.AsyncClient) -> None:
    whole = (await client.post("/generate?adapter=complaints", json={"inputs": "q"})).json()
    answer = await client.post("/generate_stream?adapter=complaints", json={"inputs": "q"})
    (only,) = events(answer.text)
    assert only["generated_text"] == only["token"]["text"] == whole["generated_text"]
    assert only["details"]["choices"][0]["label"] == whole["generated_text"]


async def test_a_stream_has_one_event_a_token_and_the_last_has_all(client: httpx.AsyncClient) -> None:
    whole = (await client.post("/generate", json={"inputs": "hello"})).json()
    for path, body in (("/generate_stream", {}), ("/generate", {"stream": True}), ("/", {"stream": True})):
        answer = await client.post(path, json={"inputs": "hello", **body})
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-prompt-tokens"] == "5"
        assert answer.headers["x-adapter"] == "base"
        got = events(answer.text)
        assert [each["index"] for each in got] == [1, 2, 3, 4, 5, 6]
        assert all(each["generated_text"] is None and each["details"] is None for each in got[:-1])
        assert got[-1]["generated_text"] == whole["generated_text"]
        assert got[-1]["details"]["finish_reason"] == "eos_token"
        assert "".join(e["token"]["text"] for e in got if not e["token"]["special"]) == whole["generated_text"]
        assert "[DONE]" not in answer.text


async def test_a_stream_to_the_length_has_exactly_as_many_events(client: httpx.AsyncClient) -> None:
    parameters = {"max_new_tokens": 9, "ignore_eos": True}
    answer = await client.post("/generate_stream", json={"inputs": "x", "parameters": parameters})
    got = events(answer.text)
    assert len(got) == 9
    assert got[-1]["details"]["finish_reason"] == "length"


async def test_streams_of_several_are_refused(client: httpx.AsyncClient) -> None:
    two = await client.post("/generate_stream", json={"inputs": ["a", "b"]})
    assert two.status_code == 422
    best = await client.post("/generate_stream", json={"inputs": "a", "parameters": {"best_of": 2, "do_sample": True}})
    assert best.status_code == 422


async def test_a_stop_string_ends_the_answer_and_stays_in_it(client: httpx.AsyncClient, world: World) -> None:
    world.engine.says["count"] = "one two three four"
    for stop, kept in (
        (["three"], "one two three"),
        (["o thr", "three"], "one two thr"),
        (["zzz"], "one two three four"),
    ):
        body = {"inputs": "count", "parameters": {"stop": stop, "details": True, "max_new_tokens": 30}}
        answer = (await client.post("/generate", json=body)).json()
        assert answer["generated_text"] == kept
        expected = "eos_token" if stop == ["zzz"] else "stop_sequence"
        assert answer["details"]["finish_reason"] == expected
        got = events((await client.post("/generate_stream", json=body)).text)
        assert "".join(e["token"]["text"] for e in got if not e["token"]["special"]) == kept
        assert got[-1]["generated_text"] == kept
    assert FinishReason.STOP in [reason for _, reason in world.engine.cancelled]


async def test_characters_of_many_bytes_are_shown_whole(client: httpx.AsyncClient, world: World) -> None:
    world.engine.says["hi"] = "grüß 🌍!"
    body = {"inputs": "hi", "parameters": {"max_new_tokens": 50}}
    got = events((await client.post("/generate_stream", json=body)).text)
    assert "".join(e["token"]["text"] for e in got if not e["token"]["special"]) == "grüß 🌍!"
    cut = {"inputs": "hi", "parameters": {"max_new_tokens": 4, "details": True}}  # in the middle of ß
    assert (await client.post("/generate", json=cut)).json()["generated_text"].startswith("grü")


async def test_full_text_truncate_and_seed(client: httpx.AsyncClient, world: World) -> None:
    full = await client.post("/generate", json={"inputs": "hello", "parameters": {"return_full_text": True}})
    assert full.json()["generated_text"].startswith("hello")
    await client.post("/generate", json={"inputs": "hello", "parameters": {"truncate": 2}})
    assert world.parts.codec.decode(world.engine.seen[-1].prompt) == "lo"
    sampled = {"inputs": "hello", "parameters": {"do_sample": True, "seed": 7, "details": True}}
    first, second = [(await client.post("/generate", json=sampled)).json() for _ in range(2)]
    assert first == second
    assert first["details"]["seed"] == 7
    del sampled["parameters"]["seed"]  # type: ignore[attr-defined]
    seeds = {(await client.post("/generate", json=sampled)).json()["details"]["seed"] for _ in range(3)}
    assert len(seeds) == 3


async def test_temperature_decides_about_sampling_unless_do_sample_does(
    client: httpx.AsyncClient, world: World
) -> None:
    cases = (
        ({}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 0}, False),
        ({"top_p": 0.5}, True),
        ({"temperature": 0.7, "do_sample": False}, False),
        ({"do_sample": True}, True),
    )
    for parameters, expected in cases:
        answer = await client.post("/generate", json={"inputs": "x", "parameters": parameters})
        assert answer.status_code == 200, answer.text
        assert world.engine.seen[-1].sampling.do_sample is expected, parameters
    both = await client.post("/generate", json={"inputs": "x", "parameters": {"temperature": 0, "do_sample": True}})
    assert both.status_code == 422


async def test_best_of_answers_with_one_and_tells_the_others(client: httpx.AsyncClient, world: World) -> None:
    parameters = {"best_of": 3, "do_sample": True, "seed": 5, "details": True}
    body = (await client.post("/generate", json={"inputs": "x", "parameters": parameters})).json()
    assert [request.sampling.seed for request in world.engine.seen] == [5, 6, 7]
    assert len(body["details"]["best_of_sequences"]) == 2
    differ = await client.post("/generate", json={"inputs": "x", "parameters": {"best_of": 3, "n": 2}})
    assert differ.json()["param"] == "n"


async def test_the_context_counts_prompt_virtual_and_new_tokens(client: httpx.AsyncClient) -> None:
    async def ask(name: str, num: int, new: int | None) -> httpx.Response:
        return await client.post(
            f"/generate?adapter={name}", json={"inputs": "x" * num, "parameters": {"max_new_tokens": new}}
        )

    assert (await ask("base", 500, 12)).status_code == 200
    over = await ask("base", 500, 13)
    assert over.status_code == 422
    assert over.json()["detail"].startswith(
        "This model's maximum context length is 512 tokens. However, you requested 513 tokens"
    )
    assert (await ask("soft", 400, 12)).status_code == 200
    assert (await ask("soft", 400, 13)).status_code == 422
    assert (await ask("base", 505, None)).status_code == 200  # what nobody asked for fits in
    assert (await ask("base", 512, None)).status_code == 422


async def test_limits_of_the_server_are_named(client: httpx.AsyncClient) -> None:
    cases = (
        ({"max_new_tokens": 257}, "max_new_tokens"),
        ({"min_new_tokens": 21}, "min_new_tokens"),
        ({"top_n_tokens": 21}, "top_n_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ["x" * 2000]}, "stop"),
        ({"choices": [str(i) for i in range(300)]}, "choices"),
        ({"best_of": 17, "do_sample": True}, "best_of"),
    )
    for parameters, param in cases:
        answer = await client.post("/generate", json={"inputs": "x", "parameters": parameters})
        assert (answer.status_code, answer.json()["param"]) == (422, param), answer.text
    assert (await client.post("/generate", json={"inputs": ["x"] * 17})).status_code == 422
    assert (await client.post("/generate", json={"inputs": ""})).status_code == 422


async def test_a_failure_before_the_first_token_has_a_status_and_after_it_an_event(
    client: httpx.AsyncClient, world: World
) -> None:
    world.engine.fails[world.adapters["plain"]] = AdapterUnavailable("it does not load")
    world.engine.fails_after[world.adapters["soft"]] = RuntimeError("/secret/path 0x7f")
    before = await client.post("/generate_stream?adapter=plain", json={"inputs": "x"})
    assert (before.status_code, before.json()["error_type"]) == (503, "generation")
    assert "retry-after" not in before.headers, "it does not mend by itself"
    after = await client.post("/generate_stream?adapter=soft", json={"inputs": "x"})
    got = events(after.text)
    assert after.status_code == 200
    assert len(got) == 3
    assert got[-1]["error_type"] == "generation"
    assert "secret" not in after.text


async def test_a_request_that_the_server_gives_up_is_incomplete(client: httpx.AsyncClient, world: World) -> None:
    world.engine.says["x"] = "some words"

    class Impatient:
        """Ends what it is given, as a drain that has run out of time."""

        def __init__(self) -> None:
            self._submit = world.engine.submit

        def __call__(self, request: Any) -> None:
            self._submit(request)
            world.engine.cancel(request.id, FinishReason.CANCELLED)

    world.engine.held = True
    world.engine.submit = Impatient()  # type: ignore[method-assign]
    answer = await client.post("/generate", json={"inputs": "x"})
    assert (answer.status_code, answer.json()["error_type"]) == (503, "incomplete_generation")


async def test_not_running_and_full_are_told_with_a_time(client: httpx.AsyncClient, world: World) -> None:
    for state in (EngineState.STARTING, EngineState.DRAINING, EngineState.DEAD):
        world.engine.state = state
        answer = await client.post("/generate", json={"inputs": "x"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    world.engine.state = EngineState.RUNNING
    world.engine.max_queue = 2
    world.engine.held = True
    full = await client.post("/generate?adapter=plain", json={"inputs": ["a", "b", "c"], "parameters": {"best_of": 2}})
    assert (full.status_code, full.headers["retry-after"]) == (429, "3")
    assert full.json()["error_type"] == "overloaded"


async def test_an_encoder_decoder_is_given_source_and_start(tiny_tokenizer: Any, tmp_path: Path) -> None:
    world = make_world(tiny_tokenizer, tmp_path, is_encoder_decoder=True)
    world.publish("plain", checkpoint("plain"))
    world.engine.start()
    transport = httpx.ASGITransport(app=create_app(world.parts))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        parameters = {"choices": ["yes", "no"]}
        await client.post("/generate?adapter=plain", json={"inputs": "hello", "parameters": parameters})
        request = world.engine.seen[-1]
        assert world.parts.codec.decode(request.prompt) == "hello"
        assert request.decoder_prompt == (0,)
        assert [world.parts.codec.decode(ids) for ids in request.choices] == ["yes", "no"]
        fits = await client.post("/generate", json={"inputs": "x" * 512, "parameters": {"max_new_tokens": 200}})
        assert fits.status_code == 200
        over = await client.post("/generate", json={"inputs": "x" * 513})
        assert over.json()["code"] == "context_length_exceeded"
        info = (await client.get("/info")).json()
        assert info["model_pipeline_tag"] == "text2text-generation"
    world.engine.stop()


async def test_tokenize_and_info(client: httpx.AsyncClient) -> None:
    tokens = (await client.post("/tokenize", json={"inputs": "héy"})).json()
    assert [(t["start"], t["stop"]) for t in tokens] == [(0, 1), (1, 1), (1, 2), (2, 3)]
    assert tokens[0]["text"] == "h"
    assert (await client.post("/tokenize", json={"inputs": 3})).status_code == 422
    assert len((await client.post("/tokenize", json={"inputs": "x" * 8192})).json()) == 8192
    long = await client.post("/tokenize", json={"inputs": "x" * 8193})
    assert (long.status_code, long.json()["param"]) == (422, "inputs")
    assert "8193 tokens; this route tells at most 8192" in long.json()["detail"]
    info = (await client.get("/info")).json()
    assert info["model_id"] == BASE_NAME
    assert info["max_total_tokens"] == 512
    assert info["max_num_beams"] == 16


async def test_requests_are_counted(client: httpx.AsyncClient) -> None:
    await client.post("/generate?adapter=plain", json={"inputs": "hello"})
    page = (await client.get("/metrics")).text
    assert 'peft_serve_adapter_requests_total{adapter="plain",method="LORA",outcome="ok"} 1.0' in page
    assert 'vllm:request_success_total{finished_reason="stop",model_name=""} 1.0' in page


@pytest.mark.parametrize(
    ("field", "said"),
    [("max_tokens", "did you mean max_new_tokens?"), ("Temprature", "did you mean temperature?"),
     ("x" * 5000, "/docs lists the ones it has")],
)  # fmt: skip
async def test_a_field_that_is_not_known_is_told_the_nearest(client: httpx.AsyncClient, field: str, said: str) -> None:
    answer = await client.post("/generate", json={"inputs": "hello", "parameters": {field: 1}})
    assert (answer.status_code, said in answer.json()["detail"]) == (422, True), answer.text


async def test_what_is_wrong_with_inputs_is_said_in_one_sentence(client: httpx.AsyncClient) -> None:
    for inputs, said in (([], "inputs: the list is empty"), ([3], "a list of strings"), (3, "a list of strings")):
        answer = await client.post("/generate", json={"inputs": inputs})
        assert (answer.status_code, answer.json()["param"]) == (422, "inputs")
        assert said in answer.json()["detail"]
    long = await client.post("/generate", json={"inputs": "x" * 600})
    assert long.json()["param"] == "inputs"
    assert "(or set truncate)" in long.json()["detail"]


async def test_more_than_can_ever_be_queued_is_no_matter_of_trying_again(tiny_tokenizer: Any, tmp_path: Path) -> None:
    world = make_world(tiny_tokenizer, tmp_path, max_queue=3)
    with running(world):
        async with http(world) as client:
            for body in ({"inputs": ["a"] * 4}, {"inputs": "a", "parameters": {"best_of": 4, "do_sample": True}}):
                answer = await client.post("/generate", json=body)
                assert answer.status_code == 422, answer.text
                assert "3 in one request" in answer.text
