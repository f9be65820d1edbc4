"""Soaking: traffic that never ends, of everything at once, whose answers are known.

Half of the adapters stay what they are: an answer of one of them, or of the base, to a prompt is the same each time,
in whatever batch and however it is sent. The other half is uploaded, uploaded over, unloaded and deleted all the
while. What is remembered is bounded: counts, and one answer for each pair of an adapter and a prompt.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp

from loadtest.server import RunningServer

PROMPTS = tuple(f" abe {word} ban" * 3 for word in ("dio", "ror", "nea", "bob", "ida", "oro", "ane", "red"))
BASE = "base"
DISCONNECTED, HURRIED, STREAMED = 0.05, 0.10, 0.55
"""Shares of requests, one on top of the other: hung up on, given no time to wait, streamed; the rest is not."""

GONE = 404
BUSY = 429


@dataclass(slots=True)
class Tally:
    """What has happened so far."""

    statuses: Counter[str] = field(default_factory=Counter)
    num_wrong: int = 0  # answers that are not those of before
    num_broken: int = 0  # connections that ended early, of themselves
    first_troubles: list[str] = field(default_factory=list)

    def count(self, what: str, status: int) -> None:
        """An act and its status."""
        self.statuses[f"{what} {status}"] += 1

    def trouble(self, text: str) -> None:
        """Keep the first few for people to read."""
        if len(self.first_troubles) < 20:
            self.first_troubles.append(text[:300])

    @property
    def num_errors(self) -> int:
        """Answers of 500 and above."""
        return sum(count for what, count in self.statuses.items() if what.rpartition(" ")[2] >= "500")


class Soaking:
    """Requests of every kind against one server. `steady` are names that nobody touches, `moving` the others with the
    zips that they take in turn."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        steady: Sequence[str],
        moving: Sequence[str],
        zips: Sequence[bytes],
        seed: int,
    ) -> None:
        self.tally = Tally()
        self._session = session
        self._steady = (BASE, *steady)
        self._moving = moving
        self._zips = zips
        self._random = random.Random(seed)
        self._present: set[str] = set()
        self._known: dict[tuple[str, str], str] = {}

    async def ask(self) -> None:
        """One request, of a kind that chance decides."""
        chance, is_steady = self._random.random(), self._random.random() < 0.5 or not self._present
        name = self._random.choice(self._steady if is_steady else sorted(self._present))
        prompt = self._random.choice(PROMPTS)
        query = {} if name == BASE else {"adapter": name}
        try:
            if chance < DISCONNECTED:
                await self._hang_up(query, prompt)
            elif chance < HURRIED:
                await self._hurry(query, prompt)
            elif chance < STREAMED:
                self._check(name, prompt, await self._stream(query, prompt))
            else:
                self._check(name, prompt, await self._whole(query, prompt))
        except (aiohttp.ClientError, TimeoutError, OSError) as problem:
            self.tally.num_broken += 1
            self.tally.trouble(f"{name}: {problem!r}")

    async def move(self) -> None:
        """One act on the adapters that are not left alone."""
        name = self._random.choice(self._moving)
        if name not in self._present or self._random.random() < 0.5:
            await self._act("upload", "PUT", f"/adapters/{name}", self._random.choice(self._zips))
            self._present.add(name)
        elif self._random.random() < 0.5:
            self._present.discard(name)
            await self._act("delete", "DELETE", f"/adapters/{name}")
        else:
            await self._act("unload", "POST", f"/adapters/{self._random.choice(self._steady[1:])}/unload")

    async def leave(self) -> None:
        """Delete every adapter, so that nothing is left that somebody could still use."""
        for name in (*self._steady[1:], *sorted(self._present)):
            await self._act("delete", "DELETE", f"/adapters/{name}")

    async def _act(self, what: str, method: str, path: str, body: bytes | None = None) -> None:
        headers = {"Content-Type": "application/zip"} if body is not None else {}
        try:
            async with self._session.request(method, path, data=body, headers=headers) as answer:
                self._note(what, answer.status, await answer.text())
        except (aiohttp.ClientError, TimeoutError, OSError) as problem:
            self.tally.num_broken += 1
            self.tally.trouble(f"{what}: {problem!r}")

    def _note(self, what: str, status: int, text: str) -> None:
        self.tally.count(what, status)
        if status >= 400 and status not in (GONE, BUSY):
            self.tally.trouble(f"{what} {status}: {text}")

    async def _whole(self, query: dict[str, str], prompt: str) -> str | None:
        async with self._session.post("/generate", params=query, json=_body(prompt)) as answer:
            text = await answer.text()
            self._note("generate", answer.status, text)
            return str(json.loads(text)["generated_text"]) if answer.status == 200 else None

    async def _stream(self, query: dict[str, str], prompt: str) -> str | None:
        async with self._session.post("/generate_stream", params=query, json=_body(prompt)) as answer:
            text = await answer.text()
            self._note("stream", answer.status, text)
        if answer.status != 200:
            return None
        events = [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data:")]
        if not events or events[-1].get("generated_text") is None:
            self.tally.num_broken += 1
            self.tally.trouble(f"a stream of {query} ended without its last event: {text[-200:]}")
            return None
        return str(events[-1]["generated_text"])

    async def _hang_up(self, query: dict[str, str], prompt: str) -> None:
        async with self._session.post("/generate_stream", params=query, json=_body(prompt, tokens=64)) as answer:
            self._note("hang up", answer.status, "")
            await answer.content.readany()
            answer.close()

    async def _hurry(self, query: dict[str, str], prompt: str) -> None:
        hurry = {"X-Max-Wait": "0.001"}
        async with self._session.post("/generate", params=query, json=_body(prompt), headers=hurry) as answer:
            self._note("hurry", answer.status, await answer.text())

    def _check(self, name: str, prompt: str, text: str | None) -> None:
        if text is None or name not in self._steady:
            return
        known = self._known.setdefault((name, prompt), text)
        if text != known:
            self.tally.num_wrong += 1
            self.tally.trouble(f"{name} said {text!r}, and before {known!r}")


def _body(prompt: str, *, tokens: int = 12) -> dict[str, object]:
    return {"inputs": prompt, "parameters": {"max_new_tokens": tokens, "ignore_eos": True}}


async def until(soaking: Soaking, stopped: asyncio.Event, *, concurrency: int, move_every_s: float) -> None:
    """Ask from `concurrency` places at once, and move adapters all the while, until stopped."""

    async def asker() -> None:
        while not stopped.is_set():
            await soaking.ask()

    async def mover() -> None:
        while not stopped.is_set():
            await soaking.move()
            await asyncio.sleep(move_every_s)

    await asyncio.gather(mover(), *(asker() for _ in range(concurrency)))


def session_of(server: RunningServer) -> aiohttp.ClientSession:
    """Connections to the server, as many as are asked for."""
    headers = {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(
        base_url=server.url, connector=connector, headers=headers, timeout=aiohttp.ClientTimeout(total=120)
    )
