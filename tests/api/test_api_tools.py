"""Tools of chats: rendered, called freely or because they must be, whole and in streams."""

from __future__ import annotations

import copy
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.api.api_fakes import World, make_world
from tests.api.conftest import http, populate, running, served

TEMPLATE = (
    "{% if tools %}[{% for tool in tools %}{{ tool.function.name }};{% endfor %}]<tool_call>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}({{ call.function.name }} {{ call.function.arguments.city }}){% endfor %}"
    "{% if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %}{% endfor %}<assistant>"
)
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
CITY["additionalProperties"] = False
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": CITY}},
    {"type": "function", "function": {"name": "time"}},
]
ASKED = [{"role": "user", "content": "How is Rome?"}]
PROMPT = "[weather;time;]<tool_call><user>How is Rome?<assistant>"
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'


@pytest.fixture
def tooled(tiny_tokenizer: Any, tmp_path: Path) -> Iterator[World]:
    """A base whose chat template knows tools."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    made = make_world(tokenizer, tmp_path)
    populate(made)
    with running(made):
        yield made


@pytest.fixture
async def tool_client(tooled: World) -> AsyncIterator[httpx.AsyncClient]:
    async with http(tooled) as made:
        yield made


async def chat(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post("/v1/chat/completions", json={"messages": ASKED, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["choices"][0])


async def test_a_call_that_the_model_makes_is_told(tool_client: httpx.AsyncClient, tooled: World) -> None:
    tooled.engine.says[PROMPT] = f"Let me see. {CALL}"
    choice = await chat(tool_client, tools=TOOLS)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    (call,) = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    assert call == {
        "id": call["id"],
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
    }


async def test_words_stay_words(tool_client: httpx.AsyncClient, tooled: World) -> None:
    tooled.engine.says[PROMPT] = "It is raining."
    choice = await chat(tool_client, tools=TOOLS, tool_choice="auto")
    assert choice["finish_reason"] == "stop"
    assert choice["message"] == {"role": "assistant", "content": "It is raining.", "refusal": None}


async def test_a_call_is_streamed(tool_client: httpx.AsyncClient, tooled: World) -> None:
    tooled.engine.says[PROMPT] = f"Hm. {CALL}\n{CALL}"
    stream = await tool_client.post(
        "/v1/chat/completions", json={"messages": ASKED, "temperature": 0, "tools": TOOLS, "stream": True, "n": 2}
    )
    chunks = [json.loads(line[6:]) for line in stream.text.split("\n\n") if line.startswith("data: {")]
    for index in (0, 1):
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content") or "" for choice in mine) == "Hm."
        calls = [call for choice in mine for call in choice["delta"].get("tool_calls", ())]
        assert [call["index"] for call in calls] == [0, 1]
        assert {call["function"]["arguments"] for call in calls} == {'{"city": "Rome"}'}
        assert len({call["id"] for call in calls}) == 2
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["tool_calls"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_must_come_comes(tooled: World, stream: bool) -> None:
    with served(tooled) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-") as client:
            asked: dict[str, Any] = {"model": "plain", "messages": ASKED, "tools": TOOLS[:1], "max_tokens": 200}
            asked |= {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 0}
            if stream:
                async with client.chat.completions.stream(**asked) as events:
                    answer: Any = await events.get_final_completion()
            else:
                answer = await client.chat.completions.create(**asked)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")


async def test_a_named_function_gets_its_arguments(tool_client: httpx.AsyncClient, tooled: World) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    choice = await chat(tool_client, tools=TOOLS, tool_choice=named, max_tokens=100)
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "stop"
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")
    body = {"messages": ASKED, "tools": TOOLS, "tool_choice": named, "stream": True, "temperature": 0}
    stream = await tool_client.post("/v1/chat/completions", json=body)
    chunks = [json.loads(line[6:]) for line in stream.text.split("\n\n") if line.startswith("data: {")]
    calls = [one for chunk in chunks for one in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert len(calls) > 3
    assert calls[0]["function"]["name"] == "weather"
    assert "".join(one["function"]["arguments"] for one in calls) == call["function"]["arguments"]


async def test_earlier_calls_and_their_results_are_put_into_the_prompt(
    tool_client: httpx.AsyncClient, tooled: World
) -> None:
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    messages = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    await chat(tool_client, messages=messages, tools=TOOLS)
    prompt = tooled.parts.codec.decode(tooled.engine.seen[-1].prompt)
    assert prompt == f"{PROMPT.removesuffix('<assistant>')}<assistant>(weather Rome)<tool>rain#c1<assistant>"


async def test_no_tools_without_a_choice_of_them(tool_client: httpx.AsyncClient, tooled: World) -> None:
    tooled.engine.says["<user>How is Rome?<assistant>"] = CALL
    choice = await chat(tool_client, tools=TOOLS, tool_choice="none")
    assert choice["message"]["content"] == CALL


@pytest.mark.parametrize(
    ("said", "param", "reason"),
    [
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "no tool is called 'x'",
        ),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "same name"),
        ({"tools": TOOLS * 100}, "tools", "at most 128"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name", "pattern"),
        (
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
            "already",
        ),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
    ],
)
async def test_what_cannot_be_is_refused(
    tool_client: httpx.AsyncClient, said: dict[str, Any], param: str, reason: str
) -> None:
    answer = await tool_client.post("/v1/chat/completions", json={"messages": ASKED, **said})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert reason in answer.json()["error"]["message"]


async def test_a_base_that_cannot_be_told_of_tools_says_so(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json={"messages": ASKED, "tools": TOOLS})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
    assert "no chat template" in answer.json()["error"]["message"]


async def test_a_syntax_that_is_not_known_is_the_operators_to_tell(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE.replace("<tool_call>", "")
    world = make_world(tokenizer, tmp_path)
    with running(world):
        async with http(world) as client:
            answer = await client.post("/v1/chat/completions", json={"messages": ASKED, "tools": TOOLS})
            assert "--tool-call-parser" in answer.json()["error"]["message"]
            choice = await chat(client, tools=TOOLS[:1], tool_choice="required", max_tokens=200)
            assert choice["message"]["tool_calls"]
    told = make_world(tokenizer, tmp_path / "told", tool_call_parser="llama3_json")
    with running(told):
        told.engine.says[PROMPT.replace("<tool_call>", "")] = '{"name": "time", "parameters": {}}'
        async with http(told) as client:
            choice = await chat(client, tools=TOOLS)
            assert choice["message"]["tool_calls"][0]["function"] == {"name": "time", "arguments": "{}"}


MISTRAL = (
    "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{% if call.id | length != 9 %}{{ raise_exception('Tool call IDs should have length 9!') }}{% endif %}"
    "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}"
    "{% endfor %}{% endfor %}<assistant>"
)


@pytest.mark.parametrize("stream", [False, True])
async def test_mistrals_newer_calls_are_read_and_can_be_sent_back(
    tiny_tokenizer: Any, tmp_path: Path, stream: bool
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = MISTRAL
    world = make_world(tokenizer, tmp_path)
    with running(world):
        world.engine.says["weather;time;<user>How is Rome?<assistant>"] = (
            'Hm.[TOOL_CALLS]weather[ARGS]{"city": "Rome"}[TOOL_CALLS]time[ARGS]{}'
        )
        with served(world) as url:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-") as client:
                asked: dict[str, Any] = {"model": "base", "messages": ASKED, "tools": TOOLS, "temperature": 0}
                if stream:
                    async with client.chat.completions.stream(**asked) as events:
                        answer: Any = await events.get_final_completion()
                else:
                    answer = await client.chat.completions.create(**asked)
                (choice,) = answer.choices
                assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Hm.")
                calls = choice.message.tool_calls
                told = [(call.function.name, json.loads(call.function.arguments)) for call in calls]
                assert told == [("weather", {"city": "Rome"}), ("time", {})]
                assert len({call.id for call in calls}) == 2
                assert all(len(call.id) == 9 and call.id.isalnum() for call in calls)
                results = [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in calls]
                said = {"role": "assistant", "content": "Hm.", "tool_calls": [call.model_dump() for call in calls]}
                again = await client.chat.completions.create(**asked | {"messages": [*ASKED, said, *results]})
                assert again.choices
