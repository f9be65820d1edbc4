"""replicas: two replicas of the demo here, one of them killed under load, and their number scaled under load.

Starts ``peft-serve serve-ray`` as a user does. Each fault has requests under way, of the base and of several adapters,
and holds every answer against the one given in peace. A request counts as lost when it is not answered 200 with that
answer. The verdict is the exit status.
"""

import random
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Final

import httpx
from rich.console import Console

from loadtest.progress import bar
from loadtest.ray_server import RayServer, serving

ADAPTERS: Final = ("", "?adapter=sms-spam", "?adapter=sst2", "?adapter=trec", "?adapter=subj")
NUM_INPUTS: Final = 4
SCALE_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Ask:
    """One of the requests whose answer is known."""

    path: str
    text: str
    num_tokens: int

    def send(self, server: RayServer) -> httpx.Response:
        """Ask the server."""
        parameters = {
            "max_new_tokens": self.num_tokens,
            "ignore_eos_token": True,
            "choices": None,
            "template": "{text}",
        }
        return server.post(f"/generate{self.path}", {"inputs": self.text, "parameters": parameters})


def add(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--requests", type=int, default=120, help="requests under way at each fault")
    parser.add_argument("--kills", type=int, default=5, help="times that a replica is killed with -9")
    parser.add_argument("--tokens", type=int, default=40, help="new tokens of a request")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which replicas are killed")
    parser.add_argument("--no-scaling", action="store_true", help="kill alone")
    parser.add_argument("--quick", action="store_true", help="one kill under 24 requests")


def run(parsed: Namespace, console: Console) -> int:
    """0 where nothing was lost."""
    num_requests, kills = (24, 1) if parsed.quick else (parsed.requests, parsed.kills)
    asks = [Ask(path, f"number {i}", parsed.tokens) for path in ADAPTERS for i in range(NUM_INPUTS)]
    load = [asks[i % len(asks)] for i in range(num_requests)]
    verdicts: list[Counter[str]] = []
    with tempfile.TemporaryDirectory() as store:
        if kills:
            verdicts += _killing(Path(store), load, kills, random.Random(parsed.seed), console)
        if not parsed.no_scaling:
            verdicts.append(_scaled(Path(store), load, console))
            console.print(f"1 -> 2 -> 1: {dict(verdicts[-1])}")
    lost = sum(number for outcome in verdicts for what, number in outcome.items() if what != "as in peace")
    console.print(f"{sum(each.total() for each in verdicts)} requests, {lost} lost")
    console.print("[green]nothing was lost[/green]" if not lost else "[red]requests were lost[/red]")
    return 1 if lost else 0


def _killing(store: Path, load: Sequence[Ask], kills: int, rng: random.Random, console: Console) -> list[Counter[str]]:
    verdicts = []
    console.print("starting two replicas")
    with serving(store, "--max-ongoing", str(len(load))) as server, bar(console, "kill -9", count=kills) as tick:
        expected = _in_peace(server, load)
        for number in range(1, kills + 1):
            server.await_replicas(2)
            verdicts.append(_killed(server, load, expected, rng))
            console.print(f"kill {number}: {dict(verdicts[-1])}")
            tick()
        console.print(f"{server.placed()['again']:.0f} requests were given to the other replica")
    return verdicts


def _in_peace(server: RayServer, load: Sequence[Ask]) -> dict[Ask, str]:
    """What each is answered while nothing happens."""
    return {ask: ask.send(server).raise_for_status().json()["generated_text"] for ask in dict.fromkeys(load)}


def _killed(server: RayServer, load: Sequence[Ask], expected: dict[Ask, str], rng: random.Random) -> Counter[str]:
    victim = rng.choice(server.replicas())
    with ThreadPoolExecutor(len(load)) as pool:
        running = [pool.submit(ask.send, server) for ask in load]
        timer = Timer(rng.uniform(0.2, 2.0), victim.kill)
        timer.start()
        outcome = Counter(_outcome(each, expected[ask]) for each, ask in zip(running, load, strict=True))
        timer.join()
    return outcome


def _scaled(store: Path, load: Sequence[Ask], console: Console) -> Counter[str]:
    """Load until there are two replicas, and a little until there is one again."""
    console.print("starting one replica, to be scaled")
    scaling = ("--min-replicas", "1", "--max-replicas", "2", "--upscale-s", "1", "--downscale-s", "5")
    outcome: Counter[str] = Counter()
    with serving(store, *scaling, "--max-ongoing", "16") as server, ThreadPoolExecutor(32) as pool:
        expected = _in_peace(server, load)
        for number, width in ((2, 32), (1, 1)):
            until = time.monotonic() + SCALE_S
            while server.figures().get("peft_serve_replicas") != number:
                if time.monotonic() > until:
                    outcome[f"not scaled to {number}"] += 1
                    return outcome
                running = [(ask, pool.submit(ask.send, server)) for ask in load[:width]]
                outcome.update(_outcome(answer, expected[ask]) for ask, answer in running)
            console.print(f"replicas: {number}")
    return outcome


def _outcome(answer: "Future[httpx.Response]", expected: str) -> str:
    try:
        found = answer.result()
    except httpx.HTTPError as error:
        return type(error).__name__
    if found.status_code != 200:
        return f"{found.status_code} {found.text[:120]}"
    return "as in peace" if found.json()["generated_text"] == expected else "another answer"
