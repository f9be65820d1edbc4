"""Mixers and maps of shared factors in captured decode steps: in any mix, and whoever comes into a slot."""

from __future__ import annotations

import pytest
import torch

from peft_serve.adapters.primitives import Adapter, Affine, BlockDiagonal, Edit, Paired
from peft_serve.adapters.shared_primitives import Rescaled
from peft_serve.core import BASE, AdapterId
from tests.model.test_step_graphs import DOWN, IS_INTERPRETED, LORA, Bench, Q, adapter, llama

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="the tiny models are on a CPU")


def mixed(bench: Bench, name: str, sides: tuple[int, int]) -> Adapter:
    """What goes into a site is mixed in blocks of one size, what comes out of another in blocks of another."""
    make, specs = torch.Generator().manual_seed(sum(map(ord, name))), bench.base.sites

    def blocks(num_features: int, side: int) -> BlockDiagonal:
        return BlockDiagonal(torch.randn(num_features // side, side, side, generator=make) * side**-0.5)

    sites = {
        Q: Affine(in_mix=blocks(specs[Q].in_features, sides[0])),
        DOWN: Affine(out_mix=blocks(specs[DOWN].out_features, sides[1])),
    }
    return Adapter(id=AdapterId(name), method="OFT", sites=dict(sites))


def test_blocks_of_any_size_are_served_by_what_was_captured_for_others() -> None:
    bench = Bench(llama)
    first, other = mixed(bench, "a", (4, 2)), mixed(bench, "b", (32, 16))
    low_rank = adapter(bench.base, "c", LORA)
    bench.install(first, other, low_rank)
    bench.answers(first.id, BASE, other.id)
    assert bench.num_recorded == 1
    third = mixed(bench, "d", (8, 32))
    bench.put(1, third, instead_of=first)
    bench.answers(third.id, other.id, BASE)
    assert bench.num_recorded == 1
    bench.answers(third.id, low_rank.id, BASE)
    assert bench.num_recorded == 2
    assert bench.outcomes["eager"] == 0


def test_more_blocks_than_any_before_have_a_step_captured_anew() -> None:
    bench = Bench(llama)
    first, more = mixed(bench, "a", (32, 32)), mixed(bench, "b", (2, 32))
    bench.install(first)
    bench.answers(first.id, BASE, BASE)
    bench.put(1, more, instead_of=first)
    bench.answers(more.id, BASE, BASE)
    assert bench.num_recorded == 2


def of_kind(bench: Bench, name: str, kind: str, form: int) -> Adapter:
    """A map of shared factors, by the key `form`, or features mixed in pairs, in groups of so many; at two sites."""
    make, specs = torch.Generator().manual_seed(sum(map(ord, name))), bench.base.sites

    def drawn(*shape: int) -> torch.Tensor:
        return 0.5 * torch.randn(shape, generator=make)

    def edit(path: str) -> Edit:
        spec, key = specs[path], torch.Generator().manual_seed(form)
        if kind == "paired":
            return Affine(out_mix=Paired(1 + drawn(spec.out_features), drawn(spec.out_features), form))
        factors = torch.randn(6, 64, generator=key), torch.randn(64, 6, generator=key)
        return Affine(maps=(Rescaled(str(form), *factors, drawn(6), drawn(spec.out_features)),))

    return Adapter(id=AdapterId(name), method="TEST", sites={path: edit(path) for path in (Q, DOWN)})


@pytest.mark.parametrize("kind", ["paired", "rescaled"])
def test_tokens_are_chosen_by_slot(kind: str) -> None:
    bench = Bench(llama)
    first, second = (of_kind(bench, name, kind, 4) for name in "ab")
    other, low_rank = of_kind(bench, "c", kind, 8), adapter(bench.base, "d", LORA)
    bench.install(first, second, other, low_rank)
    bench.answers(first.id, BASE, second.id)
    assert bench.num_recorded == 1
    third = of_kind(bench, "e", kind, 4)
    bench.put(1, third, instead_of=first)
    bench.answers(third.id, second.id, BASE)
    assert bench.num_recorded == 1
    bench.answers(other.id, BASE, BASE)
    assert bench.num_recorded == 2, "another key, or groups of another size, are other acts"
    bench.answers(other.id, low_rank.id, third.id)
    assert bench.num_recorded == 3
    assert bench.outcomes["eager"] == 0


@pytest.mark.parametrize("kind", ["paired", "rescaled"])
def test_what_the_last_of_a_form_left_is_not_read_when_it_comes_back(kind: str) -> None:
    bench = Bench(llama)
    first, back = (of_kind(bench, name, kind, 4) for name in "ab")
    between = adapter(bench.base, "d", LORA)
    bench.install(first)
    bench.answers(first.id, BASE, BASE)
    bench.put(1, between, instead_of=first)
    bench.put(1, back, instead_of=between)
    bench.answers(back.id, BASE, BASE)
    assert bench.num_recorded == 2
    assert bench.outcomes["eager"] == 0
