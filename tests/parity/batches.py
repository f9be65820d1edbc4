"""Random batches of mixed methods against each of their rows alone: the greedy tokens are the same.

    python -m tests.parity.batches --batches 200 --seed 1

On each family of bases a server gets adapters of random methods. Every one is first asked its prompts by itself, one
call at a time; then random batches of such calls come together, some of the calls later than the others. Prints what
differs and ends with 1 if anything does. The prefix cache is off: an answer is not helped by one before it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path
from typing import Final

import torch

from tests.adapters.checkpoints import SEQ2SEQ, VOCAB, first_task, make_checkpoint, methods_for
from tests.parity.asking import generate, ids_of
from tests.parity.bases import lively_base, save_tiny_base, word_codec, words
from tests.parity.served import ServedModel
from tests.parity.test_parity_http import as_zip

FAMILIES: Final = ("llama", "gpt2", "t5")
NUM_PROMPTS: Final = 4
MOST_ROWS: Final = 24
NUM_NEW: Final = 8

Ask = tuple[str, int]
"""An adapter's name, and which of the prompts."""


async def ask_together(
    url: str, asks: list[Ask], prompts: list[list[int]], tasks: frozenset[str], draw: random.Random
) -> list[list[int]]:
    """The generated ids of each; some come a few steps after the others."""
    delays = [draw.choice((0.0, 0.0, 0.0, 0.01, 0.03)) for _ in asks]

    async def ask(name: str, prompt: list[int], delay_s: float) -> list[int]:
        await asyncio.sleep(delay_s)
        task = {"task_id": 0} if name in tasks else {}
        body = {"inputs": words(prompt), "parameters": {"max_new_tokens": NUM_NEW, "details": True, **task}}
        return ids_of(await generate(url, name, body))

    given = [ask(name, prompts[i], delay) for (name, i), delay in zip(asks, delays, strict=True)]
    return list(await asyncio.gather(*given))


def compare(kind: str, draw: random.Random, *, num_batches: int, num_adapters: int) -> list[str]:
    """What a batch changes, in so many random batches on one base."""
    prompts = [[draw.randrange(4, VOCAB) for _ in range(draw.randint(1, 20))] for _ in range(NUM_PROMPTS)]
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_base(kind, Path(folder) / "base")
        codec = word_codec(is_encoder_decoder=kind in SEQ2SEQ)
        settings = {"max_rows": draw.choice((4, 16)), "max_step_tokens": draw.choice((16, 32, 128)), "block_size": 4}
        settings |= {"max_resident_adapters": draw.choice((4, 32)), "enable_prefix_caching": False}
        with ServedModel(Path(folder) / "base", Path(folder) / "store", codec=codec, **settings) as served:
            names, tasks = ["base"], set()
            for method in draw.sample(methods_for(kind), num_adapters):
                files, model = make_checkpoint(method, kind, seed=draw.randrange(1 << 20), base=lively_base(kind))
                name = method.replace("_", "-")
                answer = served.client.put(f"/adapters/{name}", content=as_zip(files))
                assert answer.status_code == 201, (method, answer.text)
                names.append(name)
                tasks |= {name} if first_task(model) else set()
            pool = [(name, i) for name in names for i in range(NUM_PROMPTS)]
            told = frozenset(tasks)
            alone = {ask: asyncio.run(ask_together(served.url, [ask], prompts, told, draw))[0] for ask in pool}
            assert len({tuple(tokens) for tokens in alone.values()}) > NUM_PROMPTS, "the adapters do something"
            for number in range(num_batches):
                asks = draw.choices(pool, k=draw.randint(2, MOST_ROWS))
                given = asyncio.run(ask_together(served.url, asks, prompts, told, draw))
                wrong += [
                    f"{kind}, batch {number}: {ask[0]} says {tokens} and alone {alone[ask]}"
                    for ask, tokens in zip(asks, given, strict=True)
                    if tokens != alone[ask]
                ]
    return wrong


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description="Random batches against their rows alone.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batches", type=int, default=200, help="in all, shared among the families")
    parser.add_argument("--adapters", type=int, default=12, help="of each server")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    wrong: list[str] = []
    for i, kind in enumerate(FAMILIES):
        num_batches = (given.batches + i) // len(FAMILIES)
        found = compare(kind, draw, num_batches=num_batches, num_adapters=given.adapters)
        print(f"{kind}: {num_batches} batches, {len(found)} answers differ")
        wrong += found
    print("\n".join(wrong) or "every answer is what it is alone")
    return 1 if wrong else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
