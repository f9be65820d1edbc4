"""This engine and peft on one shape, over a hundred adapters: peft one request at a time, and in its own batches.

Everybody has all adapters resident, greedy answers of equal lengths, and the same shape with random weights. peft's
clock leaves out loading and switching adapters; ours has the scheduler, copies to the device and prefills in it.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch

from loadtest.gpu.ground import Ground
from loadtest.gpu.many_bench import host_cache
from loadtest.gpu.random_adapters import ATTENTION
from loadtest.gpu.results import Figures, Found, Value
from loadtest.gpu.shapes import decoder, make
from loadtest.gpu.timing import Spread, spread
from loadtest.gpu.traffic import ClosedLoop, Lengths, forever, serving_for

NUM_ADAPTERS: Final = 100
RANK: Final = 16
LENGTHS: Final = Lengths(prompt=32, answer=32)
BATCH: Final = 32
TARGET: Final = 40.0
_LOADING_SHARE: Final = 0.5  # of the time that is left, for peft to load its adapters
_ROUNDS: Final = 3


def peft(ground: Ground) -> Found:
    """Ours first, then a base of peft's own, since it replaces the layers of the model it is given."""
    quick = ground.is_quick
    count, lengths = (3, Lengths(prompt=6, answer=4)) if quick else (NUM_ADAPTERS, LENGTHS)
    batch, rank = (3, 4) if quick else (BATCH, RANK)
    ours, how = _ours(ground, count, lengths, batch, rank)
    ground.bases.drop()
    single, mixed, loaded = _peft(ground, count, rank, batch, lengths)
    rows: tuple[tuple[Value, ...], ...] = (
        ("this engine", batch, count, ours, None, 1.0),
        ("peft, one request at a time", 1, loaded, single.median_s, single.words, ours / single.median_s),
        ("peft, adapter_names", batch, loaded, mixed.median_s, mixed.words, ours / mixed.median_s),
    )
    notes = [
        f"{lengths.prompt} tokens in, {lengths.answer} out; the target is {TARGET:g} times peft's one at a time",
        f"peft's rate for {count} adapters is extrapolated from {single.count} requests (one at a time) and "
        f"{mixed.count} batches, with {loaded} adapters loaded",
        how,
    ]
    title = f"Beside peft: {count} adapters, rank {rank} at attention, {decoder(is_quick=quick).name}"
    columns = ("who", "requests at once", "adapters", "tokens/s", "spread", "this engine over it")
    return Found(figures=(Figures(title=title, columns=columns, rows=rows, notes=tuple(notes)),))


def _peft(ground: Ground, count: int, rank: int, batch: int, lengths: Lengths) -> tuple[Spread, Spread, int]:
    """Tokens a second one request at a time and in batches, and how many adapters there were."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, loaded = _loaded(ground, count, rank)

        def answer(rows: int, first: int) -> float:
            return _answer(ground, model, [f"a{(first + row) % loaded}" for row in range(rows)], lengths)

        single, mixed = (_rate(ground, partial(answer, rows), rows, lengths) for rows in (1, batch))
    return single, mixed, loaded


def _ours(ground: Ground, count: int, lengths: Lengths, batch: int, rank: int) -> tuple[float, str]:
    """Tokens a second, and how steps were run."""
    base = ground.bases.get(decoder(is_quick=ground.is_quick))
    adapters = host_cache(base, count, rank=rank)
    by_id = {adapter.id: adapter for adapter in adapters}
    served = serving_for(ground, base, by_id.__getitem__, num_rows=batch, lengths=lengths)
    loop = ClosedLoop(ground, served, num_rows=batch, num_slots=count, lengths=lengths)
    most_s = 0.0 if ground.is_quick else min(8.0, ground.left_s / 4)
    found = loop.run(forever(list(by_id), list(range(count))), most_s=most_s)
    loop.close()
    replayed = f"{found.replayed:.0%} of this engine's steps were replayed" if served.has_graphs else served.how
    return found.tokens_per_s, replayed


def _loaded(ground: Ground, count: int, rank: int) -> tuple[Any, int]:
    """A model with peft's layers, and how many adapters it had time to load; all of them hold random numbers."""
    from peft import LoraConfig, get_peft_model

    base = make(decoder(is_quick=ground.is_quick), ground.device)
    targets = [name for name in ATTENTION if name.endswith("_proj")]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False)
    until_s = ground.clock() + _LOADING_SHARE * ground.left_s
    model: Any = get_peft_model(base, config, adapter_name="a0")
    loaded = 1
    while loaded < count and ground.clock() < until_s:
        model.add_adapter(f"a{loaded}", config)
        loaded += 1
    return model.to(device=ground.device, dtype=base.dtype).eval(), loaded


@torch.no_grad()
def _answer(ground: Ground, model: Any, names: list[str], lengths: Lengths) -> float:
    """The seconds of one call of `generate`, the switch of adapters left out."""
    ids = torch.randint(5, 50, (len(names), lengths.prompt), device=ground.device)
    more: dict[str, Any] = {}
    if len(names) == 1:
        model.set_adapter(names[0])
    else:
        more["adapter_names"] = names
    ground.settle()
    began_s = ground.clock()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=lengths.answer,
        max_new_tokens=lengths.answer,
        pad_token_id=0,
        **more,
    )
    ground.settle()
    return ground.clock() - began_s


def _rate(ground: Ground, answer: Callable[[int], float], num_rows: int, lengths: Lengths) -> Spread:
    """Tokens a second, in place of seconds."""
    answer(0)
    tokens = num_rows * lengths.answer
    found = [tokens / answer(1)]
    for number in range(2, 2 + _ROUNDS):
        if ground.is_quick or ground.left_s < 1.0:
            break
        found.append(tokens / answer(number))
    return spread(found)
