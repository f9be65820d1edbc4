"""Random models, ranks, seeds and mixes against a server over HTTP, beyond what the tests hold fixed.

    python -m tests.parity.holdout --seed 7 --rounds 3

Each round makes a base of random sizes, a random mix of methods with random ranks, uploads all of them and asks every
one several prompts at the same time; each token must be peft's. Prints what differs and ends with 1 if anything does.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import random
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import peft
import torch
from transformers import PreTrainedModel

from tests.adapters.checkpoints import (
    SEQ2SEQ,
    VOCAB,
    base_config,
    base_of_config,
    first_task,
    make_checkpoint,
    methods_for,
)
from tests.parity.bases import enliven, save_base, word_codec
from tests.parity.greedy_oracle import greedy
from tests.parity.served import ServedModel
from tests.parity.test_parity_http import NUM_NEW, as_zip, ask_all

KINDS: Final = ("llama", "gpt2", "t5", "qwen2", "neox", "opt", "bart", "mistral", "gemma", "phi", "bloom")
SIZES: Final = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")
WIDE: Final = ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner")
DEPTHS: Final = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")
RANKED: Final = (peft.LoraConfig, peft.LoHaConfig, peft.VeraConfig, peft.HiraConfig, peft.MissConfig, peft.DeftConfig)


def random_base(kind: str, draw: random.Random) -> PreTrainedModel:
    """A base of the kind with other sizes than the tests'."""
    config = base_config(kind)
    width, wide, depth = draw.choice((48, 64, 96)), draw.choice((64, 96, 160)), draw.randint(1, 4)
    for names, value in ((SIZES, width), (WIDE, wide), (DEPTHS, depth)):
        for name in names:
            if getattr(config, name, None) is not None:
                setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * depth
    return enliven(base_of_config(kind, config, seed=draw.randrange(1 << 30)), seed=draw.randrange(1 << 30))


def random_rank(config: peft.PeftConfig, draw: random.Random) -> None:
    """Another rank, where a rank is all there is to the method's shape."""
    if isinstance(config, RANKED) and not getattr(config, "rank_pattern", None):
        config.r = draw.choice((1, 2, 3, 5, 8, 12))


def one_round(kind: str, draw: random.Random, num_adapters: int) -> list[str]:
    """What differs from peft."""
    problems: list[str] = []
    base = random_base(kind, draw)
    prompts = [[draw.randrange(4, VOCAB) for _ in range(draw.randint(1, 20))] for _ in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        save_base(base, Path(folder) / "base")
        methods = draw.sample(methods_for(kind), min(num_adapters, len(methods_for(kind))))
        settings = {"max_rows": draw.choice((3, 16, 64)), "max_step_tokens": draw.choice((16, 64, 256))}
        codec, tasks = word_codec(is_encoder_decoder=kind in SEQ2SEQ), set()
        with ServedModel(Path(folder) / "base", Path(folder) / "store", codec=codec, **settings) as served:
            models: dict[str, Any] = {"base": base}
            for method in methods:
                name = method.replace("_", "-")
                try:
                    files, model = _checkpoint(method, kind, base, draw)
                except (ValueError, RuntimeError, AssertionError) as error:  # peft cannot make it at this size
                    print(f"  {method}: peft does not make it here: {str(error)[:80]}", file=sys.stderr)
                    continue
                answer = served.client.put(f"/adapters/{name}", content=as_zip(files))
                if answer.status_code != 201:
                    problems.append(f"{kind} {method}: refused: {answer.text[:300]}")
                    continue
                if first_task(model):
                    tasks.add(name)
                models[name] = model
            calls = [(name, i) for name in models for i in range(len(prompts))]
            draw.shuffle(calls)
            given = asyncio.run(ask_all(served.url, [(n, prompts[i]) for n, i in calls], frozenset(tasks)))
    wrong = {
        name
        for (name, i), tokens in zip(calls, given, strict=True)
        if tokens != greedy(models[name], [prompts[i]], [tokens], num_new=NUM_NEW)[0]
    }
    print(f"{kind}: {len(models)} adapters, {len(calls)} answers, wrong: {sorted(wrong)}")
    return problems + [f"{kind} {name}: other tokens than peft's" for name in sorted(wrong)]


def _checkpoint(method: str, kind: str, base: PreTrainedModel, draw: random.Random) -> tuple[Any, Any]:
    return make_checkpoint(
        method,
        kind,
        seed=draw.randrange(1 << 20),
        base=copy.deepcopy(base),
        change=lambda config: random_rank(config, draw),
    )


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=len(KINDS))
    parser.add_argument("--adapters", type=int, default=24)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    problems = [p for i in range(given.rounds) for p in one_round(KINDS[i % len(KINDS)], draw, given.adapters)]
    print("\n".join(problems) or "every token equals peft's")
    return 1 if problems else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
