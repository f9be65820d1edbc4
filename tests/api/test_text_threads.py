"""Giant texts: refused before they are tokenised, and where that cannot be told, in nobody else's way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from peft_serve.api.key_watch import watched_keys
from peft_serve.api.keyring import open_keyring
from peft_serve.api.prompts import LONG_TEXT_CHARS
from peft_serve.api.text_threads import GIANT_CHARS, TextThreads
from peft_serve.errors import QueueFull
from peft_serve.text import TextCodec
from tests.api.api_fakes import MAX_CONTEXT, World, make_world
from tests.api.conftest import http, running
from tests.api.keyed import bearer, entry, keyed_world, write_keys

GIANT = "giant " * 1000
LONG = "x" * (LONG_TEXT_CHARS + 1)
SIZES = (GIANT_CHARS, GIANT_CHARS + 1)
OPS = entry("ops", "ops", "admin")
TIMEOUT_S = 10.0  # of what would wait for ever


class SlowCodec(TextCodec):
    """Takes its time over giants, until `opened`; what a text has at least it cannot tell if `is_blind`."""

    def __init__(self, tokenizer: Any, *, is_blind: bool) -> None:
        super().__init__(tokenizer, is_encoder_decoder=False)
        self.opened = threading.Event()
        self.num_begun = 0
        self._is_blind = is_blind

    def fewest_tokens(self, text: str) -> int:
        return 0 if self._is_blind else super().fewest_tokens(text)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        if text.startswith("giant"):
            self.num_begun += 1
            assert self.opened.wait(60), "the test is over"
        return super().encode(text, add_special_tokens=add_special_tokens)


@dataclass(frozen=True)
class Slow:
    world: World
    codec: SlowCodec
    keys: Path


def slow(tokenizer: Any, root: Path, *, is_blind: bool) -> Slow:
    world = keyed_world(tokenizer, root, [entry("a"), entry("b", "other"), entry("c", "third"), entry("gone"), OPS])
    codec = SlowCodec(tokenizer, is_blind=is_blind)
    return Slow(replace(world, parts=replace(world.parts, codec=codec)), codec, root / "keys.yaml")


@pytest.fixture
def blind(tiny_tokenizer: Any, tmp_path: Path) -> Iterator[Slow]:
    made = slow(tiny_tokenizer, tmp_path, is_blind=True)
    with running(made.world):
        yield made
        made.codec.opened.set()


@pytest.fixture
async def client(blind: Slow) -> AsyncIterator[httpx.AsyncClient]:
    async with http(blind.world) as made:
        yield made


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not is_true():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("path", ["/generate", "/tokenize"])
async def test_giants_of_one_tenant_are_in_nobody_elses_way(blind: Slow, client: httpx.AsyncClient, path: str) -> None:
    giants = [asyncio.create_task(client.post(path, json={"inputs": GIANT}, headers=bearer("a"))) for _ in range(12)]
    try:
        await until(lambda: blind.codec.num_begun > 0)
        async with asyncio.timeout(TIMEOUT_S):
            body = {"inputs": LONG, "parameters": {"truncate": 4, "max_new_tokens": 1}}
            assert (await client.post("/generate", json=body, headers=bearer("b"))).status_code == 200
            told = await client.post("/tokenize", json={"inputs": LONG}, headers=bearer("b"))
            assert len(told.json()) == len(LONG)
            assert (await client.get("/metrics", headers=bearer("ops"))).status_code == 200
            short = {"inputs": "x", "parameters": {"max_new_tokens": 1}}
            assert (await client.post("/generate", json=short, headers=bearer("a"))).status_code == 200
        keyring = open_keyring(blind.world.parts.settings)
        withdrawn = bearer("gone")["authorization"].removeprefix("Bearer ")
        assert keyring.find(withdrawn) is not None
        async with watched_keys(keyring, every_s=0.01):
            write_keys(blind.keys, [entry("a"), entry("b", "other"), OPS])
            await until(lambda: keyring.find(withdrawn) is None)
        assert blind.codec.num_begun == 1, "a tenant's giants go one by one"
        assert not any(giant.done() for giant in giants)
    finally:
        blind.codec.opened.set()
    answers = await asyncio.gather(*giants)
    assert {answer.status_code for answer in answers} == {422 if path == "/generate" else 200}


async def test_giants_of_two_tenants_are_not_in_the_way_of_a_third(blind: Slow, client: httpx.AsyncClient) -> None:
    giant = {"inputs": GIANT * 11}
    assert len(giant["inputs"]) > GIANT_CHARS
    giants = [asyncio.create_task(client.post("/generate", json=giant, headers=bearer(name))) for name in "aabb"]
    try:
        await until(lambda: blind.codec.num_begun > 0)
        async with asyncio.timeout(TIMEOUT_S):
            body = {"inputs": LONG, "parameters": {"truncate": 4, "max_new_tokens": 1}}
            for name in "cab":
                assert (await client.post("/generate", json=body, headers=bearer(name))).status_code == 200, name
        assert blind.codec.num_begun == 1, "one giant has a thread"
        assert not any(giant.done() for giant in giants)
    finally:
        blind.codec.opened.set()
    assert {answer.status_code for answer in await asyncio.gather(*giants)} == {422}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": GIANT}),
        ("/tokenize", {"inputs": "giant " * 100_000}),
        ("/v1/completions", {"model": "base", "prompt": GIANT}),
        ("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": GIANT}]}),
    ],
)
async def test_what_cannot_fit_is_refused_untokenised(
    tiny_tokenizer: Any, tmp_path: Path, path: str, body: dict[str, Any]
) -> None:
    made = slow(tiny_tokenizer, tmp_path, is_blind=False)
    with running(made.world):
        async with http(made.world) as client, asyncio.timeout(TIMEOUT_S):
            answer = await client.post(path, json=body, headers=bearer("a"))
    assert answer.status_code == (400 if path.startswith("/v1") else 422), answer.text
    if path != "/tokenize":
        assert f"maximum context length is {MAX_CONTEXT} tokens" in answer.text
        assert "context_length_exceeded" in answer.text
    assert "at least" in answer.text
    assert made.codec.num_begun == 0


async def test_a_prompt_that_is_cut_may_be_longer(tiny_tokenizer: Any, tmp_path: Path) -> None:
    made = slow(tiny_tokenizer, tmp_path, is_blind=False)
    made.codec.opened.set()
    with running(made.world):
        async with http(made.world) as client:
            body = {"inputs": GIANT, "parameters": {"truncate": 4, "max_new_tokens": 1, "details": True}}
            answer = await client.post("/generate", json=body, headers=bearer("a"))
    assert answer.status_code == 200, answer.text
    assert made.codec.num_begun == 1


async def test_texts_of_one_call_are_tokenised_in_turns_of_the_loop(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Each is short; 256 of them in a row are not."""
    turns: list[int] = []
    turn = 0

    class Noting(TextCodec):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
            turns.append(turn)
            return super().encode(text, add_special_tokens=add_special_tokens)

    async def count() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    world = make_world(tiny_tokenizer, tmp_path)
    codec = Noting(tiny_tokenizer, is_encoder_decoder=False)
    world = replace(world, parts=replace(world.parts, codec=codec))
    counting = asyncio.create_task(count())
    with running(world):
        async with http(world) as client:
            body = {"inputs": ["x"] * 8, "parameters": {"max_new_tokens": 1}}
            assert (await client.post("/generate", json=body)).status_code == 200
    counting.cancel()
    assert len(set(turns)) == len(turns) == 8


class Works:
    """Works that end when they are told to, and the order in which they began."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ends: dict[str, threading.Event] = {}

    def of(self, name: str) -> Callable[[], str]:
        self.ends[name] = threading.Event()

        def work() -> str:
            self.begun.append(name)
            assert self.ends[name].wait(60), "the test is over"
            return name

        return work


@pytest.fixture
def works() -> Iterator[Works]:
    made = Works()
    yield made
    for end in made.ends.values():
        end.set()


async def queued(threads: TextThreads, works: Works, *names: str) -> dict[str, asyncio.Task[str]]:
    """A tenant is the first letter of a name, a large one of a giant."""
    tasks = {}
    for name in names:
        tasks[name] = asyncio.create_task(threads.run(name[0].lower(), SIZES[name[0].isupper()], works.of(name)))
        await asyncio.sleep(0)
    return tasks


async def test_tenants_take_turns(works: Works) -> None:
    threads = TextThreads(max_waiting=4, num_threads=1)
    tasks = await queued(threads, works, "a1", "a2", "a3", "b1", "b2")
    for end in works.ends.values():
        end.set()
    async with asyncio.timeout(TIMEOUT_S):
        assert await asyncio.gather(*tasks.values()) == list(tasks)
    assert works.begun == ["a1", "b1", "a2", "b2", "a3"]


async def test_a_full_line_is_one_tenants_own(works: Works) -> None:
    threads = TextThreads(max_waiting=1)
    tasks = await queued(threads, works, "a1", "a2")
    with pytest.raises(QueueFull, match="1 long texts wait") as refused:
        await threads.run("a", 1, works.of("a3"))
    assert refused.value.retry_after_s
    tasks |= await queued(threads, works, "b1")
    works.ends["b1"].set()
    async with asyncio.timeout(TIMEOUT_S):
        assert await tasks["b1"] == "b1"
        assert works.begun in (["a1", "b1"], ["b1", "a1"])
        works.ends["a1"].set()
        works.ends["a2"].set()
        await asyncio.gather(tasks["a1"], tasks["a2"])


async def test_giants_leave_a_thread_to_what_is_none(works: Works) -> None:
    threads = TextThreads(max_waiting=1, num_threads=3)
    tasks = await queued(threads, works, "A1", "B1", "C1", "a1")
    await until(lambda: {*works.begun} == {"A1", "B1", "a1"})
    tasks |= await queued(threads, works, "c1")
    with pytest.raises(QueueFull):
        await threads.run("c", GIANT_CHARS + 1, works.of("C2"))
    works.ends["a1"].set()
    await until(lambda: "c1" in works.begun)
    assert "C1" not in works.begun, "two giants at most"
    works.ends["A1"].set()
    await until(lambda: "C1" in works.begun)
    for end in works.ends.values():
        end.set()
    async with asyncio.timeout(TIMEOUT_S):
        assert await asyncio.gather(*tasks.values()) == list(tasks)


async def test_without_a_line_a_free_thread_is_had(works: Works) -> None:
    threads = TextThreads(max_waiting=0)
    tasks = await queued(threads, works, "a1")
    with pytest.raises(QueueFull):
        await threads.run("a", 1, works.of("a2"))
    works.ends["a1"].set()
    assert await tasks["a1"] == "a1"


async def test_who_is_cancelled_waits_no_longer_and_what_runs_keeps_its_thread(works: Works) -> None:
    threads = TextThreads(max_waiting=4, num_threads=1)
    tasks = await queued(threads, works, "a1", "b1", "c1")
    await until(lambda: works.begun == ["a1"])
    tasks["b1"].cancel()
    tasks["a1"].cancel()
    await asyncio.sleep(0.02)
    assert works.begun == ["a1"], "its work goes on, on the only thread"
    works.ends["a1"].set()
    works.ends["c1"].set()
    async with asyncio.timeout(TIMEOUT_S):
        assert await tasks["c1"] == "c1"
    assert works.begun == ["a1", "c1"]


async def test_a_work_that_fails_gives_its_thread_back(works: Works) -> None:
    threads = TextThreads(max_waiting=4, num_threads=1)
    with pytest.raises(ZeroDivisionError):
        await threads.run("a", 1, lambda: 1 // 0)
    (await queued(threads, works, "a1"))["a1"].cancel()
    tasks = await queued(threads, works, "a2")
    for end in works.ends.values():
        end.set()
    async with asyncio.timeout(TIMEOUT_S):
        assert await tasks["a2"] == "a2"
