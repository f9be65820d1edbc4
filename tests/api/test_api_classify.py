"""`/classify`: what each kind of head, and choices, answer; and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import httpx
import pytest

from peft_serve.adapters.records import HeadFacts
from peft_serve.core import BASE, Reading
from tests.api.api_fakes import BASE_NAME, World, checkpoint, make_world
from tests.api.conftest import http, running

LOGITS = [0.5, 2.0, -1.0]


def softmax(row: list[float]) -> list[float]:
    weights = [math.exp(value) for value in row]
    return [weight / sum(weights) for weight in weights]


async def ask(client: httpx.AsyncClient, adapter: str, inputs: Any, **parameters: Any) -> httpx.Response:
    return await client.post(f"/classify?adapter={adapter}", json={"inputs": inputs, "parameters": parameters})


async def test_a_sequence_head_answers_labels_best_first(reading: httpx.AsyncClient, encoder: World) -> None:
    encoder.engine.reads = lambda _: [LOGITS]
    answer = await ask(reading, "moods", "where is my order?")
    assert answer.status_code == 200, answer.text
    shares = softmax(LOGITS)
    ((first, second, third),) = answer.json()
    assert first == {"label": "glad", "score": pytest.approx(shares[1])}
    assert second == {"label": "sad", "score": pytest.approx(shares[0])}
    assert third == {"label": "mad", "score": pytest.approx(shares[2])}
    request = encoder.engine.seen[-1]
    assert (request.adapter, request.reading, request.segments) == (encoder.adapters["moods"], Reading.SEQUENCE, ())
    assert encoder.parts.codec.pieces(request.prompt) == ["[CLS]", "where", "is", "my", "order", "?", "[SEP]"]
    assert answer.headers["x-adapter"] == "moods"
    assert answer.headers["x-adapter-version"] == "1"
    assert answer.headers["x-prompt-tokens"] == "7"
    assert answer.headers["x-generated-tokens"] == "0"
    assert float(answer.headers["x-total-time"]) >= 0


async def test_lists_pairs_and_top_k(reading: httpx.AsyncClient, encoder: World) -> None:
    inputs = ["my name", {"text": "my order"}, {"text": "my order", "text_pair": "came on monday"}]
    answer = await ask(reading, "moods", inputs, top_k=2)
    assert [len(each) for each in answer.json()] == [2, 2, 2]
    for text, one in zip(inputs, answer.json(), strict=True):
        assert (await ask(reading, "moods", text, top_k=2)).json() == [one]
    pair = encoder.engine.seen[-1]
    assert encoder.parts.codec.pieces(pair.prompt)[4:] == ["came", "on", "monday", "[SEP]"]
    assert pair.segments == (0, 0, 0, 0, 1, 1, 1, 1)


async def test_one_label_is_a_sigmoid_and_functions_can_be_chosen(reading: httpx.AsyncClient, encoder: World) -> None:
    encoder.engine.reads = lambda request: [LOGITS if request.adapter == encoder.adapters["moods"] else [0.5]]
    ((only,),) = (await ask(reading, "rating", "new")).json()
    assert only == {"label": "LABEL_0", "score": pytest.approx(1 / (1 + math.exp(-0.5)))}
    ((raw,),) = (await ask(reading, "rating", "new", function_to_apply="none")).json()
    assert raw["score"] == 0.5
    (scores,) = (await ask(reading, "moods", "new", function_to_apply="sigmoid")).json()
    assert [each["score"] for each in scores] == [pytest.approx(1 / (1 + math.exp(-x))) for x in (2.0, 0.5, -1.0)]
    assert (await ask(reading, "moods", "new", function_to_apply="relu")).status_code == 422


async def test_token_heads_answer_entities(reading: httpx.AsyncClient, encoder: World) -> None:
    tags = {"anna": 1, "lives": 0, "new": 3, "york": 3, "an": 1, "##na": 2}
    pieces = encoder.parts.codec.pieces

    def rows(request: Any) -> list[list[float]]:
        return [[3.0 if j == tags.get(piece, 0) else 0.0 for j in range(4)] for piece in pieces(request.prompt)]

    encoder.engine.reads = rows
    text = "Anna lives in New York."
    found = (await ask(reading, "names", text)).json()
    assert [(e["entity"], e["word"], e["start"], e["end"], e["index"]) for e in found] == [
        ("B-PER", "anna", 0, 4, 1),
        ("B-LOC", "new", 14, 17, 4),
        ("B-LOC", "york", 18, 22, 5),
    ]
    assert found[0]["score"] == pytest.approx(softmax([0, 3, 0, 0])[1])
    everything = (await ask(reading, "names", [text], ignore_labels=[])).json()
    assert [len(each) for each in everything] == [6]
    tags["york"] = 2
    (per, loc, odd) = (await ask(reading, "names", text, aggregation_strategy="simple")).json()
    assert (per["entity_group"], per["word"], per["start"], per["end"]) == ("PER", "anna", 0, 4)
    assert (loc["entity_group"], odd["entity_group"]) == ("LOC", "PER")


async def test_questions_are_answered_from_their_context(reading: httpx.AsyncClient, encoder: World) -> None:
    def rows(request: Any) -> list[list[float]]:
        pieces = encoder.parts.codec.pieces(request.prompt)
        return [[6.0 * (p == "on"), 6.0 * (p == "monday")] for p in pieces]

    encoder.engine.reads = rows
    question = {"question": "where is my parcel", "context": "the parcel came on Monday ."}
    (best,) = (await ask(reading, "reader", question)).json()
    assert (best["answer"], best["start"], best["end"]) == ("on Monday", 16, 25)
    assert 0.5 < best["score"] < 1
    several = (await ask(reading, "reader", [question], top_k=3)).json()
    assert [len(each) for each in several] == [3]
    assert several[0][0] == best
    assert several[0][0]["score"] > several[0][1]["score"] >= several[0][2]["score"]
    (short,) = (await ask(reading, "reader", question, max_answer_len=1)).json()
    assert " " not in short["answer"]
    request = encoder.engine.seen[-1]
    assert request.reading is Reading.SPANS
    assert request.segments[-1] == 1
    encoder.publish("typeless", checkpoint("typeless", head=["QUESTION_ANS", 2], ignores_segments=True))
    assert (await ask(reading, "typeless", question)).status_code == 200
    assert encoder.engine.seen[-1].segments == ()
    long = {"question": "what", "context": "monday " * 40}
    refused = await ask(reading, "reader", long)
    assert (refused.status_code, refused.json()["code"]) == (422, "context_length_exceeded")
    assert "maximum context length is 32 tokens" in refused.json()["detail"]
    assert "shorter context" in refused.json()["detail"]
    assert (await ask(reading, "reader", long, truncate=True)).status_code == 422


async def test_inputs_have_the_shape_that_the_head_reads(reading: httpx.AsyncClient, encoder: World) -> None:
    question = {"question": "what", "context": "monday"}
    cases = (("reader", "what"), ("moods", question), ("names", {"text": "new", "text_pair": "york"}))
    for adapter, inputs in cases:
        answer = await ask(reading, adapter, inputs)
        assert (answer.status_code, answer.json()["param"]) == (422, "inputs"), answer.text
        assert "send" in answer.json()["detail"]
    for inputs in ([], 3, {"text": 3}, {"question": "what"}, [["a", "b"]], {"text": "a", "more": "b"}, {}, [None]):
        answer = await ask(reading, "moods", inputs)
        assert answer.status_code == 422, inputs
    assert encoder.engine.seen == []


async def test_long_texts_are_refused_or_cut(reading: httpx.AsyncClient, encoder: World) -> None:
    text = "my order " * 30
    refused = await ask(reading, "moods", text)
    assert (refused.status_code, refused.json()["code"]) == (422, "context_length_exceeded")
    assert "set truncate to true" in refused.json()["detail"]
    assert (await ask(reading, "moods", text, truncate=True)).status_code == 200
    prompt = encoder.parts.codec.pieces(encoder.engine.seen[-1].prompt)
    assert (len(prompt), prompt[0], prompt[-1]) == (32, "[CLS]", "[SEP]")
    pair = {"text": "my order", "text_pair": text}
    assert (await ask(reading, "moods", pair, truncate=True)).status_code == 200
    request = encoder.engine.seen[-1]
    assert len(request.prompt) == len(request.segments) == 32
    assert encoder.parts.codec.pieces(request.prompt)[:4] == ["[CLS]", "my", "order", "[SEP]"]
    assert (await ask(reading, "soft", text, truncate=True)).status_code == 200
    assert len(encoder.engine.seen[-1].prompt) == 24, "eight positions are the adapter's own"


async def test_an_encoder_generates_nothing_and_says_what_works(reading: httpx.AsyncClient, encoder: World) -> None:
    calls = [
        ("/generate", {"inputs": "x"}, 422),
        ("/generate_stream", {"inputs": "x"}, 422),
        ("/v1/completions", {"prompt": "x"}, 400),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, 400),
    ]
    for path, body, status in calls:
        answer = await reading.post(f"{path}?adapter=moods", json=body)
        assert answer.status_code == status
        assert "is a TinyModel and generates no text" in answer.text
        assert "/classify" in answer.text
    nothing = await ask(reading, "plain", "x")
    assert (nothing.status_code, nothing.json()["param"]) == (422, "adapter")
    assert "adapter plain has neither a task head nor choices" in nothing.json()["detail"]
    assert "/embed" in nothing.json()["detail"]
    assert (await reading.post("/classify", json={"inputs": "x"})).status_code == 422
    chosen = await ask(reading, "plain", "x", choices=["a", "b"])
    assert chosen.status_code == 422, "an encoder cannot score what comes next"
    mixed = await ask(reading, "moods", "x", choices=["a", "b"])
    assert (mixed.status_code, mixed.json()["param"]) == (422, "choices")
    assert encoder.engine.seen == []


async def test_choices_answer_where_there_is_no_head(client: httpx.AsyncClient, world: World) -> None:
    generated = await client.post(
        "/generate?adapter=complaints", json={"inputs": "Where is it?", "parameters": {"details": True}}
    )
    answer = await ask(client, "complaints", "Where is it?")
    assert answer.json() == [
        [{"label": each["label"], "score": each["score"]} for each in generated.json()["details"]["choices"]]
    ]
    assert world.parts.codec.decode(world.engine.seen[-1].prompt) == "Tweet text : Where is it? Label :"
    own = await ask(client, "plain", ["a", "b"], choices={"yes": "it is", "no": "it is not"}, top_k=1)
    assert {each["label"] for (each,) in own.json()} <= {"yes", "no"}
    base = await client.post("/classify", json={"inputs": "a", "parameters": {"choices": ["x", "y"]}})
    assert sum(each["score"] for each in base.json()[0]) == pytest.approx(1)
    nothing = await ask(client, "plain", "a")
    assert nothing.status_code == 422
    assert "send parameters.choices" in nothing.json()["detail"]
    off = await ask(client, "complaints", "a", choices=None)
    assert off.status_code == 422
    for inputs, more in (({"text": "a", "text_pair": "b"}, {}), ("a", {"truncate": True})):
        assert (await ask(client, "complaints", inputs, **more)).status_code == 422


async def test_a_head_on_a_generative_base(client: httpx.AsyncClient, world: World) -> None:
    world.publish("mood", checkpoint("mood", head=["SEQ_CLS", 2], profile={"template": "Text: {text}"}))
    world.engine.reads = lambda _: [[1.0, 2.0]]
    answer = await ask(client, "mood", "hello")
    assert [each["label"] for each in answer.json()[0]] == ["LABEL_1", "LABEL_0"]
    request = world.engine.seen[-1]
    assert (world.parts.codec.decode(request.prompt), request.segments) == ("Text: hello", ())
    assert (await client.post("/generate?adapter=mood", json={"inputs": "hello"})).status_code == 200
    await ask(client, "mood", {"text": "hello", "text_pair": "there"})
    assert world.parts.codec.decode(world.engine.seen[-1].prompt) == "hellothere"


async def test_a_base_with_a_head_of_its_own(pair_tokenizer: Any, tmp_path: Path) -> None:
    card = {"head": HeadFacts("SEQ_CLS", 2), "labels": ("no", "yes"), "class_name": "TinyForSequenceClassification"}
    made = make_world(pair_tokenizer, tmp_path, card=card)
    made.publish("plain", checkpoint("plain"))
    made.publish("own", checkpoint("own", head=["SEQ_CLS", 2]))
    made.publish("other", checkpoint("other", head=["SEQ_CLS", 3]))
    with running(made):
        made.engine.reads = lambda r: [[0.0, 1.0] if r.adapter != made.adapters["other"] else LOGITS]
        async with http(made) as client:
            base = await client.post("/classify", json={"inputs": "my order"})
            assert [each["label"] for each in base.json()[0]] == ["yes", "no"]
            assert made.engine.seen[-1].adapter == BASE
            for adapter, label in (("plain", "yes"), ("own", "yes"), ("other", "LABEL_1")):
                assert (await ask(client, adapter, "my order")).json()[0][0]["label"] == label
            assert (
                "is a TinyForSequenceClassification and" in (await client.post("/generate", json={"inputs": "x"})).text
            )
            info = (await client.get("/info")).json()
            assert info["model_pipeline_tag"] == "text-classification"
            assert info["base"]["tasks"] == ["classify", "embed"]
            assert info["base"]["labels"] == ["no", "yes"]


async def test_details_tell_who_answered(reading: httpx.AsyncClient, encoder: World) -> None:
    plain = (await ask(reading, "moods", "my order")).json()
    told = (await ask(reading, "moods", "my order", details=True)).json()
    assert told["answer"] == plain[0]
    assert told["adapter"]["digest"] == encoder.adapters["moods"]
    assert (told["task"], told["prompt_tokens"], told["members"]) == ("SEQ_CLS", 4, None)
    assert len((await ask(reading, "moods", ["my order"], details=True)).json()) == 1


async def test_one_adapter_for_each_input(reading: httpx.AsyncClient) -> None:
    texts, names = ["my name", "my order", "anna"], ["moods", "rating", "names"]
    answer = await reading.post("/classify", json={"inputs": texts, "adapter": names})
    assert answer.status_code == 200, answer.text
    for text, name, one in zip(texts, names, answer.json(), strict=True):
        alone = (await ask(reading, name, text)).json()
        assert one == (alone if name == "names" else alone[0])
    assert answer.headers["x-adapter"] == "moods,rating,names"


async def test_every_adapter_and_the_base_say_what_they_can_do(reading: httpx.AsyncClient) -> None:
    info = (await reading.get("/info")).json()
    assert info["model_pipeline_tag"] == "feature-extraction"
    assert (info["base"]["is_encoder"], info["base"]["tasks"], info["base"]["head"]) == (True, ["embed"], None)
    assert info["max_input_tokens"] == 32
    cards = {card["id"]: card for card in (await reading.get("/v1/models")).json()["data"]}
    assert cards[BASE_NAME]["tasks"] == ["embed"]
    assert cards["names"]["tasks"] == ["classify", "embed"]
    assert cards["names"]["head"] == {"task": "TOKEN_CLS", "num_labels": 4}
    assert cards["plain"]["tasks"] == ["embed"]
    one = (await reading.get("/v1/models/moods")).json()
    assert (one["labels"], one["num_tasks"]) == (["sad", "glad", "mad"], 1)
    listed = (await reading.get("/adapters/moods")).json()
    assert (listed["head"], listed["num_tasks"]) == ({"task": "SEQ_CLS", "num_labels": 3}, 1)


async def test_choices_make_an_adapter_a_classifier(client: httpx.AsyncClient) -> None:
    one = (await client.get("/v1/models/complaints")).json()
    assert (one["tasks"], one["labels"]) == (["generate", "classify", "embed"], ["complaint", "no complaint"])
    assert (await client.get("/v1/models/plain")).json()["tasks"] == ["generate", "embed"]


async def test_a_full_queue_and_a_failure_are_told(reading: httpx.AsyncClient, encoder: World) -> None:
    encoder.engine.max_queue = 0
    full = await ask(reading, "moods", "new")
    assert (full.status_code, full.headers["retry-after"]) == (429, "3")
    encoder.engine.max_queue = 10
    encoder.engine.fails[encoder.adapters["moods"]] = RuntimeError("/secret")
    failed = await ask(reading, "moods", ["new", "new"])
    assert (failed.status_code, "secret" in failed.text) == (500, False)
    encoder.engine.fails.clear()
    for rows in ([[math.nan, 0.0, 0.0]], []):
        encoder.engine.reads = lambda _, rows=rows: rows  # type: ignore[misc]
        broken = await ask(reading, "moods", "new")
        assert broken.status_code == 500, broken.text
    page = (await reading.get("/metrics")).text
    assert 'adapter_requests_total{adapter="moods",method="LORA",outcome="failed"}' in page


async def test_what_is_asked_for_and_not_served_is_refused_by_name(reading: httpx.AsyncClient) -> None:
    for name in ("stride", "doc_stride", "max_seq_len", "is_split_into_words", "temperature", "max_new_tokens"):
        answer = await ask(reading, "moods", "new", **{name: True})
        assert (answer.status_code, answer.json()["param"]) == (422, name)
    many = await ask(reading, "moods", ["new"] * 17)
    assert (many.status_code, many.json()["param"]) == (422, "inputs")
    assert (await ask(reading, "nobody", "new")).status_code == 404


async def test_the_root_answers_what_can_be_answered(reading: httpx.AsyncClient) -> None:
    for adapter, body in (
        ("moods", {"inputs": "new york", "parameters": {"top_k": 1}}),
        ("names", {"inputs": "anna"}),
        ("reader", {"inputs": {"question": "who", "context": "anna"}}),
    ):
        at_root = await reading.post(f"/?adapter={adapter}", json=body)
        assert at_root.status_code == 200, at_root.text
        assert at_root.json() == (await reading.post(f"/classify?adapter={adapter}", json=body)).json()
    for body in ({"inputs": "new"}, {"inputs": "new", "normalize": True}):
        embedded = await reading.post("/?adapter=plain", json=body)
        assert embedded.json() == (await reading.post("/embed?adapter=plain", json=body)).json()
