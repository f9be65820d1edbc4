"""A layer in parts gives the bits of the layer spelled out for every kind of term; only what needs it cuts a layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.primitives import Adapter, Affine, Edit, GatedPrompt, Replace
from peft_serve.adapters.sublayer_primitives import Bottleneck, Reads
from peft_serve.config import Settings
from peft_serve.core import AdapterId
from peft_serve.engine.cpu_kernels import speed_up
from peft_serve.kernels.layer import Stage
from peft_serve.kernels.native import find_compiler
from peft_serve.model.attention import Kind, Work
from peft_serve.model.base import ResidentBase
from peft_serve.model.pools import KVPool, KVShape
from peft_serve.model.ragged import Span, plan_self
from peft_serve.model.routing import Stream
from peft_serve.model.whole_layer import WholeLayer
from tests.model.dense_algebra import Dice, edit_of
from tests.model.tiny_models import tiny

pytestmark = pytest.mark.skipif(find_compiler(os.environ) is None, reason="this machine has no C++ compiler")

IN_KERNEL = ("delta", "in_scale", "out_scale", "shift", "in_blocks", "out_blocks", "norms")
MAPS = ("rescaled", "bases", "dense", "kronecker", "sparse", "circulant", "spectrum")
BEHIND_PRODUCTS = ("out_pairs", *MAPS, "all but rows")
ELSEWHERE = ("rows", "replace", "all")
AROUND = ("bottleneck", "gated prompt", "late prompt")
NUM_CALLS = dict.fromkeys(IN_KERNEL, 1) | dict.fromkeys((*BEHIND_PRODUCTS, *ELSEWHERE), 5) | dict.fromkeys(AROUND, 3)
"""Of the kernel in a layer, for rows that decode: cut behind queries, keys and values, the output projection, the gate,
and the last projection; or around attention and behind its projection; or behind both sublayers."""
DECODING = ((0, 1), (1, 1), (2, 1), (2, 1), (3, 1))  # (slot, tokens), each a row
READING = ((1, 3), (2, 4), (3, 1))


@dataclass(frozen=True)
class Bench:
    """The first layer of a base, and a memory for a few rows of one block each."""

    base: ResidentBase
    layer: WholeLayer
    pool: KVPool
    spelled_out: Callable[..., Tensor]

    def install(self, slot: int, term: str) -> None:
        sites = {p: e for p, spec in self.base.sites.items() if ".layers.0." in p and (e := _edit(term, spec, slot))}
        self.base.adapted.install(slot, Adapter(id=AdapterId(f"sha256:{slot}"), method="TEST", sites=sites))

    @torch.inference_mode()
    def run(
        self, forward: Callable[..., Tensor], rows: tuple[tuple[int, int], ...], *, acts: bool = True
    ) -> list[tuple[Tensor, ...]]:
        """What each row gets, and the keys and values behind it: a row's numbers follow from its slot and tokens."""
        base, rotary, pool = self.base, self.layer._inside.attention, self.pool
        seen: list[Tensor] = []
        for number, (slot, tokens) in enumerate(rows, start=1):
            dice = Dice(slot + 10 * tokens)
            seen.append(dice.normal(tokens, base.shape.hidden_size + 2 * rotary.head, scale=1.0).to(base.dtype))
            for kept in pool.layer(0):
                kept[8 * number : 8 * number + 8] = dice.normal(8, *kept.shape[1:]).to(base.dtype)
        sizes = (base.shape.hidden_size, rotary.head, rotary.head)
        x_1TI, *angles = (part.contiguous() for part in torch.cat(seen)[None].split(sizes, dim=-1))
        spans = [Span(num_tokens=t, start=3, blocks=(n,)) for n, (_, t) in enumerate(rows, start=1)]
        work = Work(plan=plan_self(spans, block_size=8, device=base.device), pool=pool)
        base.adapted.route(Stream.TARGET, [(slot if acts else 0, tokens) for slot, tokens in rows])
        with base.runs.attention.running({Kind.SELF: work}):
            out = forward(x_1TI, attention_mask=None, position_embeddings=tuple(angles), past_key_values=None)[0]
        each = out.split([tokens for _, tokens in rows])
        kept = [k[8 * n : 8 * n + 8].clone() for n in range(1, len(rows) + 1) for k in pool.layer(0)]
        return [(row, *kept[2 * n : 2 * n + 2]) for n, row in enumerate(each)]


def _bench(name: str, dtype: torch.dtype) -> Bench:
    base = ResidentBase(tiny(name).to(dtype), name=name)
    speed_up(Settings(prepack="on", cpu_kernels="on"), base, os.environ, lambda _: None)
    layer = base.model.get_submodule("model.layers.0").__dict__["forward"].__self__
    assert isinstance(layer, WholeLayer)
    spelled_out = layer._own
    layer._own = _never  # type: ignore[method-assign]
    shape = KVShape(num_layers=1, num_heads=layer._layer.num_kv_heads, head_dim=layer._inside.attention.head)
    pool = KVPool(shape, num_blocks=8, block_size=8, dtype=dtype, device=base.device)
    return Bench(base, layer, pool, spelled_out)


def _never(*_: object, **__: object) -> Tensor:
    raise AssertionError("the layer runs spelled out")


@pytest.fixture(scope="module")
def benches() -> Callable[[str, torch.dtype], Bench]:
    made: dict[tuple[str, torch.dtype], Bench] = {}

    def bench(name: str, dtype: torch.dtype) -> Bench:
        if (name, dtype) not in made:
            made[name, dtype] = _bench(name, dtype)
        return made[name, dtype]

    return bench


def _edit(term: str, spec: SiteSpec, seed: int) -> Edit | None:
    dice = Dice(seed)
    if spec.kind is SiteKind.NORM and term == "norms":
        return Replace({"weight": dice.gain(spec.out_features)})
    if spec.kind is SiteKind.ATTENTION and term in ("gated prompt", "late prompt"):
        return GatedPrompt(dice.normal(2, 3, 8), dice.normal(2, 3, 8), dice.gain(1), is_projected=term != "late prompt")
    if spec.kind is SiteKind.SUBLAYER and term == "bottleneck" and "invertible" not in spec.path:
        return _bottleneck(spec.out_features, seed, dice)
    if spec.kind is not SiteKind.LINEAR or term in ("norms", *AROUND):
        return None
    edit = edit_of(term.removesuffix(" but rows"), spec, seed)
    return replace(edit, rows=None) if isinstance(edit, Affine) and term == "all but rows" else edit


def _bottleneck(size: int, seed: int, dice: Dice) -> Bottleneck:
    return Bottleneck(
        down_BD=dice.normal(5, size),
        down_bias_B=dice.normal(5),
        up_DB=dice.normal(size, 5),
        up_bias_D=dice.normal(size),
        activation="tanh",
        scale=dice.gain(1),
        reads=(Reads.SUBLAYER, Reads.RESIDUAL, Reads.SUMMED)[seed % 3],
        is_final=seed % 2 == 0,
    )


@pytest.fixture
def worn(request: pytest.FixtureRequest, benches: Callable[[str, torch.dtype], Bench]) -> Iterator[tuple[Bench, str]]:
    """A base with low-rank terms in slot 1, and one term in slots 2 and 3."""
    name, dtype, term = request.param
    bench = benches(name, dtype)
    for slot, each in ((1, "delta"), (2, term), (3, term)):
        bench.install(slot, each)
    yield bench, term
    for slot in (1, 2, 3):
        bench.base.adapted.remove(slot)


CASES = [
    *(("llama", torch.float32, term) for term in NUM_CALLS),
    *(("llama", torch.bfloat16, term) for term in ("in_blocks", "out_blocks", "norms", "rescaled", "bottleneck")),
    *(("qwen3", dtype, "norms") for dtype in (torch.float32, torch.bfloat16)),
    ("qwen2", torch.float32, "all but rows"),
]


@pytest.mark.parametrize("worn", CASES, indirect=True)
def test_the_bits_are_those_spelled_out_and_other_rows_keep_theirs(worn: tuple[Bench, str]) -> None:
    bench, _ = worn
    for rows in (DECODING, READING):
        spelled_out, ours = (bench.run(f, rows) for f in (bench.spelled_out, bench.layer.forward))
        plain = [bench.run(bench.layer.forward, (row,))[0] for row in rows]
        for (slot, _), expected, given, alone in zip(rows, spelled_out, ours, plain, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, given, strict=True)), slot
            if slot < 2:  # terms in torch may sum in another order in another batch
                assert all(torch.equal(a, b) for a, b in zip(alone, given, strict=True)), slot
    bench.base.adapted.clear()


@pytest.mark.parametrize("worn", [case for case in CASES if case[0] == "llama"], indirect=True)
def test_only_what_no_kernel_knows_cuts_the_layer(worn: tuple[Bench, str], monkeypatch: pytest.MonkeyPatch) -> None:
    bench, term = worn
    calls = list[Any]()
    kernel = bench.layer._layer.kernel
    inner = kernel.run
    monkeypatch.setattr(kernel, "run", lambda *told: (calls.append(told[-2:]), inner(*told)))
    with_term, without = (bench.run(bench.layer.forward, DECODING, acts=acts) for acts in (True, False))
    assert calls[-1] == (Stage.NORM_BEFORE, Stage.END), "nobody's terms cut nothing"
    assert len(calls[:-1]) == NUM_CALLS[term]
    assert all(first < last for first, last in calls)
    changed = [not torch.equal(a, b) for (a, *_), (b, *_) in zip(with_term, without, strict=True)]
    assert changed == [slot > 0 for slot, _ in DECODING]
    bench.base.adapted.clear()


def test_adapters_that_differ_in_the_kind_of_a_map_or_mixer_act_in_manners_of_their_own(
    benches: Callable[[str, torch.dtype], Bench],
) -> None:
    bench = benches("llama", torch.float32)
    terms = ("rescaled", "kronecker", "bases", "out_blocks", "out_pairs")
    for slot, term in enumerate(terms, start=1):
        bench.install(slot, term)
    for slots in ((1,), (2,), (3,), (4,), (5,), (1, 2), (4, 5)):
        rows = tuple((slot, 1) for slot in slots)
        for again in (rows, (*rows, (0, 1))):  # another division, the same manner
            expected, given = (bench.run(f, again) for f in (bench.spelled_out, bench.layer.forward))
            assert all(torch.equal(a[0], b[0]) for a, b in zip(expected, given, strict=True)), slots
    for slot in range(1, len(terms) + 1):
        bench.base.adapted.remove(slot)
