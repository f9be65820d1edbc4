"""Bottlenecks in captured decode steps: of every form and size, in any mix, and whoever comes into a slot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_serve.adapters.primitives import Adapter, Edit
from peft_serve.adapters.sublayer_primitives import Bottleneck, LearnedNorm, Reads
from peft_serve.core import BASE, AdapterId
from peft_serve.model.terms import lifted
from tests.model.test_step_graphs import IS_INTERPRETED, LORA, Bench, adapter, llama

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="the tiny models are on a CPU")

ATTENTION, OUTPUT = "model.layers.0.attention_adapters", "model.layers.0.output_adapters"
PLAIN: dict[str, object] = {"activation": "relu"}
OTHERS: dict[str, dict[str, object]] = {
    "parallel": {"reads": Reads.RESIDUAL, "activation": "gelu"},
    "final": {"reads": Reads.SUMMED, "keeps": Reads.SUMMED, "is_final": True},
    "normed": {"norms": ("before", "after"), "norms_kept": True},
    "normed behind": {"norms": ("after",)},
}


def bottleneck(bench: Bench, name: str, width: int, more: dict[str, object], paths: tuple[str, ...]) -> Adapter:
    make, size = torch.Generator().manual_seed(sum(map(ord, name))), bench.base.sites[OUTPUT].out_features

    def drawn(*shape: int) -> Tensor:
        return 0.4 * torch.randn(shape, generator=make)

    def norm() -> LearnedNorm:
        return LearnedNorm(1 + drawn(size), drawn(size))

    def edit() -> Edit:
        its = {**more}
        norms = its.pop("norms", ())
        assert isinstance(norms, tuple)
        given: dict[str, object] = {
            "down_BD": drawn(width, size),
            "down_bias_B": drawn(width),
            "up_DB": drawn(size, width),
            "up_bias_D": drawn(size),
            "activation": "tanh",
            "scale": torch.tensor([1.5]),
            "reads": Reads.SUBLAYER,
            **{f"norm_{where}": norm() for where in norms},
        }
        return Bottleneck(**{**given, **its})  # type: ignore[arg-type]

    return Adapter(id=AdapterId(name), method="ADAPTERHUB", sites={path: edit() for path in paths})


def test_any_bottlenecks_of_a_form_are_served_by_what_was_captured_for_others() -> None:
    bench = Bench(llama)
    first, wide = (bottleneck(bench, name, width, PLAIN, (ATTENTION, OUTPUT)) for name, width in (("a", 3), ("b", 40)))
    low_rank = adapter(bench.base, "c", LORA)
    bench.install(first, wide, low_rank)
    bench.answers(first.id, wide.id, BASE)
    assert bench.num_recorded == bench.outcomes["captured"] == 1
    assert bench.outcomes["eager"] == 0
    third = bottleneck(bench, "d", 17, PLAIN, (ATTENTION, OUTPUT))
    bench.put(1, third, instead_of=first)
    bench.answers(wide.id, third.id, third.id)
    assert bench.num_recorded == 1, "neither numbers nor sizes are part of what was captured"
    bench.answers(third.id, BASE, low_rank.id)
    assert bench.num_recorded == 2
    bench.answers(BASE, wide.id, wide.id)
    assert bench.num_recorded == 2
    assert bench.outcomes["eager"] == 0


def test_forms_side_by_side_and_each_for_itself() -> None:
    bench = Bench(llama)
    paths = {"normed behind": (OUTPUT,)}
    others = [
        bottleneck(bench, name, 2 + place, more, paths.get(name, (ATTENTION, OUTPUT)))
        for place, (name, more) in enumerate(OTHERS.items())
    ]
    plain = bottleneck(bench, "a", 3, PLAIN, (OUTPUT,))
    bench.install(plain, *others)
    bench.answers(plain.id, BASE, *(each.id for each in others))
    assert bench.num_recorded == 1
    for each in (plain, *others):
        bench.answers(each.id, BASE, plain.id, *[BASE] * 3)
    assert bench.num_recorded == 1, "a graph of all forms serves each of them"
    assert bench.outcomes["eager"] == 0


def test_a_bottleneck_wider_than_all_before_has_its_step_captured_anew() -> None:
    bench = Bench(llama)
    first, wider = (bottleneck(bench, name, width, PLAIN, (OUTPUT,)) for name, width in (("a", 3), ("b", 70)))
    bench.install(first)
    bench.answers(BASE, BASE, BASE)
    bench.answers(first.id, BASE, BASE)
    assert bench.num_recorded == 2
    bench.put(1, wider, instead_of=first)
    bench.answers(wider.id, BASE, BASE)
    assert bench.num_recorded == 3
    bench.answers(BASE, BASE, BASE)
    assert bench.num_recorded == 3, "what the base does reads nothing of adapters"


def test_a_form_that_made_room_and_came_back_is_not_read_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifted, "_MOST_FORMS", 1)
    bench = Bench(llama)
    first, back = (bottleneck(bench, name, 3, PLAIN, (OUTPUT,)) for name in "ac")
    between = bottleneck(bench, "b", 3, OTHERS["parallel"], (OUTPUT,))
    bench.install(first)
    bench.answers(first.id, BASE, BASE)
    bench.put(1, between, instead_of=first)
    bench.answers(between.id, BASE, BASE)
    bench.put(1, back, instead_of=between)
    bench.answers(back.id, BASE, BASE)
    assert bench.num_recorded == 3
    assert bench.outcomes["eager"] == 0


def test_forms_that_differ_in_a_word_are_told_apart() -> None:
    bench = Bench(llama)
    first, other = (
        bottleneck(bench, name, 3, {"activation": activation}, (OUTPUT,))
        for name, activation in (("a", "relu"), ("b", "sigmoid"))
    )
    bench.install(first, other)
    bench.answers(first.id, BASE, BASE)
    bench.answers(other.id, BASE, BASE)
    assert bench.num_recorded == 2
    assert bench.outcomes["eager"] == 0
