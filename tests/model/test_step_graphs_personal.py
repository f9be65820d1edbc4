"""Parts that are computed for an adapter by itself, in captured decode steps: of every kind, in any mix, and whoever
comes into a slot."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from peft_serve.adapters.primitives import Adapter, Affine, ExpertFactors, Experts, LowRank
from peft_serve.core import BASE, AdapterId
from peft_serve.kernels.mixing import Blocks
from peft_serve.model.static_route import MOST_PERSONAL
from peft_serve.model.terms.term import OtherKernels
from tests.model.driver import Resident
from tests.model.personal_edits import KINDS, STACKED, intervening, made_of, personal, rows
from tests.model.tape import TapeRecorder, TapeReplay
from tests.model.test_step_graphs import EMBEDDING, IS_INTERPRETED, LORA, SCALES, Bench, Q, adapter, llama, t5
from tests.model.tiny_more import tiny_more

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="the tiny models are on a CPU")

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@EVERY_KIND
def test_parts_of_single_adapters_are_captured_in_any_mix(kind: str) -> None:
    bench = Bench(llama)
    its, other = personal(bench, "p", kind), personal(bench, "q", kind)
    low_rank, scaled = adapter(bench.base, "c", LORA), adapter(bench.base, "d", SCALES)
    bench.install(its, low_rank, scaled, other)
    bench.answers(its.id)
    bench.answers(its.id, BASE, low_rank.id, scaled.id)
    bench.answers(its.id, BASE, low_rank.id, scaled.id)
    bench.answers(other.id, its.id, BASE, its.id, low_rank.id)
    bench.answers(BASE, other.id, other.id, its.id, low_rank.id)
    assert bench.num_recorded == bench.outcomes["captured"] == 3
    assert bench.outcomes["eager"] == 0
    assert bench.outcomes["replayed"] > 0


@EVERY_KIND
def test_whoever_comes_into_the_slot_gets_nothing_of_who_was_there(kind: str) -> None:
    bench = Bench(llama)
    first, next_one = personal(bench, "p", kind), personal(bench, "r", kind)
    low_rank, another = adapter(bench.base, "c", LORA), adapter(bench.base, "d", LORA, rank=7)
    bench.install(first, low_rank)
    bench.answers(first.id, BASE, low_rank.id)
    bench.put(1, next_one, instead_of=first)
    assert not len(bench.graphs), "it is let go of at once"
    bench.answers(next_one.id, low_rank.id, BASE)
    assert bench.num_recorded == 2
    bench.put(1, another, instead_of=next_one)
    bench.answers(another.id, low_rank.id, BASE)
    assert bench.num_recorded == 3
    bench.put(1, first, instead_of=another)
    bench.answers(low_rank.id, first.id, BASE)
    assert bench.num_recorded == 4
    bench.answers(low_rank.id, BASE, BASE)
    assert bench.num_recorded == 4, "a graph that reads nothing of who came and went has stayed"
    assert bench.outcomes["eager"] == 0


@pytest.mark.parametrize("who", ["the one", "one beside it"])
def test_a_graph_knows_its_adapters_by_who_they_are_and_not_by_their_slots(who: str) -> None:
    """Nobody tells the graphs that somebody left."""
    bench = Bench(llama)
    first, beside, next_one = (personal(bench, name, "kronecker") for name in "pqr")
    bench.install(first, beside)
    bench.answers(first.id, beside.id, BASE)
    slot = 1 if who == "the one" else 2
    bench.base.adapted.remove(slot)
    bench.base.adapted.install(slot, next_one)
    bench.driver.adapters[next_one.id] = next_one
    bench.driver._resident[next_one.id] = Resident(slot, (), 0, 0)
    bench.answers(next_one.id if slot == 1 else first.id, BASE, BASE)
    assert bench.num_recorded == 2


@EVERY_KIND
def test_others_come_and_go_beside_a_part_of_its_own(kind: str) -> None:
    bench = Bench(llama)
    its, low_rank = personal(bench, "p", kind), adapter(bench.base, "c", LORA)
    bench.install(its, low_rank)
    bench.answers(its.id, low_rank.id, BASE)
    another = adapter(bench.base, "d", LORA, rank=20)
    bench.put(2, another, instead_of=low_rank)
    bench.answers(another.id, its.id, BASE)
    bench.answers(BASE, its.id, BASE)
    assert bench.num_recorded == 1
    assert bench.outcomes["eager"] == 0


@EVERY_KIND
def test_one_of_its_kind_in_a_far_slot_moves_tables_and_neither_reads_where_they_were(kind: str) -> None:
    bench = Bench(llama)
    its, far = personal(bench, "p", kind), personal(bench, "q", kind)
    bench.install(its)
    bench.answers(its.id, BASE, BASE)
    bench.put(20, far)
    bench.answers(its.id, BASE, BASE)
    bench.answers(far.id, its.id, BASE)
    assert bench.outcomes["eager"] == 0


def test_a_graph_serves_some_of_its_adapters_but_none_who_has_no_part_of_its_own() -> None:
    bench = Bench(llama)
    its = [personal(bench, name, kind) for name, kind in (("p", "kronecker"), ("q", "own layers"), ("r", "kronecker"))]
    low_rank = adapter(bench.base, "c", LORA)
    bench.install(*its, low_rank)
    names = [each.id for each in its]
    bench.answers(names[0], names[1], low_rank.id, BASE)
    for name in names[:2]:
        bench.answers(name, low_rank.id, BASE, BASE)
    assert bench.num_recorded == 1, "an idle part beside one that acts"
    bench.answers(*names, low_rank.id)
    bench.answers(names[0], BASE, BASE, low_rank.id)
    assert bench.num_recorded == 2, "the first graph has fewer idle parts, and the second has all"
    bench.answers(names[2], BASE, BASE, BASE)
    assert bench.num_recorded == 3, "two idle parts are too many for one"
    bench.answers(low_rank.id, BASE, BASE, BASE)
    assert bench.num_recorded == 4, "who has no part of its own pays for none"
    assert bench.outcomes["eager"] == 0


def test_parts_of_single_adapters_are_captured_now_and_then_and_recipes_whenever_they_come() -> None:
    bench = Bench(llama, rest=8)
    its = [personal(bench, name, "kronecker") for name in "pq"]
    low_rank = adapter(bench.base, "c", LORA)
    bench.install(*its, low_rank)
    for each in its:
        bench.answers(each.id, BASE, BASE)
    assert bench.outcomes == {"captured": 1, "replayed": 2, "eager": 3}
    bench.answers(low_rank.id, BASE, BASE)
    assert bench.outcomes == {"captured": 2, "replayed": 4, "eager": 3}
    bench.answers(its[1].id, BASE, BASE)
    assert bench.outcomes["captured"] == 3


class Counting(TapeRecorder):
    """Counts what it was asked to record, whatever became of it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_asked = 0

    def record(self, act: Callable[[], None]) -> TapeReplay:
        self.num_asked += 1
        return super().record(act)


def test_more_parts_than_a_graph_has_run_call_by_call_and_fewer_of_them_do_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder = Counting()
    bench = Bench(llama, recorder)
    its = [personal(bench, name, "kronecker") for name in "pqrstu"]
    bench.install(*its)
    names = [each.id for each in its]
    few = names[:MOST_PERSONAL]
    with caplog.at_level(logging.INFO, "peft_serve.model.step_graphs"):
        bench.answers(*names)
        bench.answers(*names[1:])
        assert bench.num_recorded == 0
        assert bench.outcomes["eager"] == sum(bench.outcomes.values())
    told = [record.getMessage() for record in caplog.records]
    assert recorder.num_asked == 1, "of what is known to have too many no capture is tried"
    assert len(told) == 1, "once, not for each mix of them"
    assert f"more than {MOST_PERSONAL} adapters" in told[0]
    bench.outcomes.clear()
    bench.answers(*few, *few[:1])
    assert bench.num_recorded == bench.outcomes["captured"] == 1
    assert bench.outcomes["eager"] == 0


@EVERY_KIND
def test_what_an_adapter_brought_leaves_memory_with_it(kind: str) -> None:
    bench = Bench(llama)
    its, low_rank = personal(bench, "p", kind), adapter(bench.base, "c", LORA)
    bench.install(its, low_rank)
    tensors = [tensor for tensor in its.tensors() if tensor.is_floating_point()]
    bench.answers(its.id, low_rank.id, BASE)
    bench.driver.run(removes=(1,))
    assert not len(bench.graphs), "what was made for a graph alone is let go of too"
    del bench.driver.adapters[its.id]
    gone = [weakref.ref(tensor) for tensor in tensors]
    adapter_gone = weakref.ref(its)
    del its, tensors
    gc.collect()
    assert adapter_gone() is None
    assert [one() for one in gone] == [None] * len(gone)


@pytest.mark.parametrize("places", [(1, 1), (2, 0), (1, 2)])
def test_interventions_edit_generated_tokens_in_captured_steps_and_prompts_in_others(places: tuple[int, int]) -> None:
    bench = Bench(llama)
    first, next_one = (intervening(bench, name, places) for name in "pq")
    low_rank = adapter(bench.base, "c", LORA)
    bench.install(first, low_rank)
    bench.answers(first.id, BASE, low_rank.id)
    assert bench.outcomes == {"eager": 1, "captured": 1, "replayed": 1}, "its prompt is one token, and it gives three"
    bench.put(1, next_one, instead_of=first)
    bench.answers(next_one.id, low_rank.id, BASE)
    bench.answers(next_one.id, low_rank.id, BASE)
    assert bench.outcomes == {"eager": 3, "captured": 2, "replayed": 4}


def mixture() -> PreTrainedModel:
    model = tiny_more("mixtral")
    model.config._experts_implementation = "grouped_mm"
    return model


class NoMixing:
    """Makes none, and serves nobody."""

    def serves(self, _like: Tensor) -> bool:
        return False

    def layer(self, num_features: int, dtype: torch.dtype) -> Blocks:
        raise AssertionError(f"asked for {num_features} features of {dtype}")


@pytest.mark.parametrize("kind", STACKED)
def test_what_no_kernel_of_ours_computes_is_a_part_of_single_adapters(kind: str) -> None:
    bench = Bench(llama, others=lambda _: OtherKernels(mixing=NoMixing()))
    first, other, next_one = (made_of(bench, name, STACKED[kind]) for name in "pqr")
    low_rank = adapter(bench.base, "c", LORA)
    bench.install(first, other, low_rank)
    bench.answers(first.id, BASE, other.id, low_rank.id)
    bench.answers(other.id, BASE, first.id, first.id)
    bench.put(1, next_one, instead_of=first)
    bench.answers(BASE, next_one.id, other.id, low_rank.id)
    assert bench.num_recorded == 2
    assert bench.outcomes["eager"] == 0


def test_an_encoder_decoder_s_steps_have_parts_of_single_adapters() -> None:
    bench = Bench(t5)
    attention = "decoder.block.0.layer.1.EncDecAttention"
    kinds = {f"{attention}.q": KINDS["kronecker"][Q], f"{attention}.o": KINDS["own layers"][Q]}
    first, next_one = (made_of(bench, name, kinds) for name in "pq")
    bench.install(first)
    bench.answers(first.id, BASE, first.id)
    bench.put(1, next_one, instead_of=first)
    bench.answers(BASE, next_one.id, BASE)
    bench.answers(next_one.id, BASE, BASE)
    assert bench.outcomes["captured"] >= 2
    assert bench.outcomes["replayed"] >= 2
    assert bench.outcomes["eager"] == 0


def test_routers_of_single_adapters_choose_for_their_own_tokens() -> None:
    bench = Bench(mixture)
    path = next(path for path in bench.base.sites if path.endswith("gate"))
    spec = bench.base.sites[path]

    def routing(name: str) -> Adapter:
        drawn = torch.Generator().manual_seed(sum(map(ord, name)))
        factors = (torch.randn(size, generator=drawn) for size in ((3, spec.in_features), (spec.out_features, 3)))
        return Adapter(id=AdapterId(name), method="TEST", sites={path: Affine(delta=LowRank(*factors))})

    first, next_one = routing("p"), routing("q")
    low_rank = adapter(bench.base, "c", {Q: "lora"})
    bench.install(first, low_rank)
    bench.answers(first.id, BASE, low_rank.id)
    bench.answers(BASE, low_rank.id, first.id)
    bench.put(1, next_one, instead_of=first)
    bench.answers(BASE, next_one.id, low_rank.id)
    assert bench.num_recorded == 2
    assert bench.outcomes["eager"] == 0


def test_experts_are_not_captured_and_the_log_has_the_reason_once_for_all_of_their_kind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder = Counting()
    bench = Bench(mixture, recorder)
    path = next(path for path in bench.base.sites if path.endswith("experts"))
    num, num_out, num_in = bench.base.sites[path].parameters["down_proj"]

    def expert(name: str) -> Adapter:
        factors = ExpertFactors(torch.randn(num, 2, num_in), torch.randn(num, num_out, 2))
        sites = {path: Experts({"down_proj": factors}), EMBEDDING: rows(bench.base.sites[EMBEDDING], torch.randn)}
        return Adapter(id=AdapterId(name), method="TEST", sites=sites)

    first, other = expert("p"), expert("q")
    bench.install(first, other)
    with caplog.at_level(logging.INFO, "peft_serve.model.step_graphs"):
        bench.answers(first.id, BASE, BASE)
        bench.answers(other.id, BASE, BASE)
    assert bench.outcomes == {"eager": 6}
    assert recorder.num_asked == 1
    (told,) = [record.getMessage() for record in caplog.records]
    assert "experts are gone through one by one" in told
