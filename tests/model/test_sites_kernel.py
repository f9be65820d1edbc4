"""Low-rank terms by our own kernel inside tiny models: what each row gets in a batch is what it gets alone."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn

from peft_serve.kernels.low_rank import LowRankKernel
from peft_serve.kernels.native import NativeCode, cache_folder, find_compiler
from peft_serve.model.routing import Stream
from peft_serve.model.sites import AdaptedSites
from tests.model.test_sites import (
    DECODERS,
    adapter,
    alone,
    assert_rows_alone,
    build,
    mixed,
    rows_for,
    stream_of,
    t5_logits,
)

pytestmark = pytest.mark.skipif(find_compiler(os.environ) is None, reason="this machine has no C++ compiler")


@pytest.fixture(scope="module")
def kernel() -> LowRankKernel:
    return LowRankKernel(NativeCode(find_compiler(os.environ), cache_folder(os.environ)))


def sites_of(model: nn.Module, kernel: LowRankKernel) -> AdaptedSites:
    sites = AdaptedSites(model, stream_of=stream_of)
    sites.run_low_rank_by(kernel)
    return sites


@pytest.mark.parametrize("family", DECODERS)
def test_every_kind_in_one_batch(family: str, kernel: LowRankKernel) -> None:
    plain = build(family)
    model = copy.deepcopy(plain)
    sites = sites_of(model, kernel)
    kinds = ["lora", "scales", "own", "norm", "all", "lora", "all", "lora"]
    worn = {
        slot: adapter(sites.specs, kind, slot, rank=3 * slot, every=1 + slot % 3) for slot, kind in enumerate(kinds, 1)
    }
    for slot, it in worn.items():
        sites.install(slot, it)
    assert_rows_alone(model, plain, sites, worn, rows_for(range(9), seed=2))
    assert_rows_alone(model, plain, sites, worn, rows_for([1, 1, 5, 7, 8], seed=3, lengths=(1,)))
    assert_rows_alone(model, plain, sites, worn, rows_for([1, 8], seed=4, lengths=(50, 1)))


def test_slots_change_hands(kernel: LowRankKernel) -> None:
    """Also beyond the slots there were at first, and with adapters that touch other sites than those before them."""
    plain = build("llama")
    model = copy.deepcopy(plain)
    sites = sites_of(model, kernel)
    worn = {slot: adapter(sites.specs, "lora", slot, rank=slot) for slot in (1, 2)}
    for slot, it in worn.items():
        sites.install(slot, it)
    assert_rows_alone(model, plain, sites, worn, rows_for([0, 1, 2], seed=6))
    sites.remove(1)
    worn |= {1: adapter(sites.specs, "lora", 7, rank=9, every=2), 40: adapter(sites.specs, "lora", 8, rank=5, every=3)}
    for slot in (1, 40):
        sites.install(slot, worn[slot])
    assert_rows_alone(model, plain, sites, worn, rows_for([0, 1, 2, 40], seed=7))


def test_streams_of_an_encoder_decoder(kernel: LowRankKernel) -> None:
    plain = build("t5")
    model = copy.deepcopy(plain)
    sites = sites_of(model, kernel)
    worn = adapter(sites.specs, "lora", 3)
    sites.install(2, worn)
    source, target = [5, 6, 7, 8, 9], [0, 11, 12]
    for stream, count in ((Stream.SOURCE, 5), (Stream.TARGET, 3), (Stream.HEAD, 3)):
        sites.route(stream, [(2, count)])
    own = t5_logits(alone(plain, sites.specs, worn), source, target)
    torch.testing.assert_close(t5_logits(model, source, target), own, rtol=0, atol=2e-5 * float(own.abs().max()))


def test_a_pass_of_other_tokens_than_those_routed_is_refused(kernel: LowRankKernel) -> None:
    model = build("llama")
    sites = sites_of(model, kernel)
    sites.install(1, adapter(sites.specs, "lora", 1, head=False))
    sites.route(Stream.TARGET, [(1, 2)])
    with pytest.raises(ValueError, match=r"got 3 tokens and its stream was routed for 2"):
        model(input_ids=torch.tensor([[1, 2, 3]]))


def test_the_kernel_and_the_stacks_agree(kernel: LowRankKernel) -> None:
    rows = rows_for([0, 1, 1, 2, 3], seed=8)
    logits = []
    for uses_kernel in (False, True):
        model = build("llama")
        sites = sites_of(model, kernel) if uses_kernel else AdaptedSites(model, stream_of=stream_of)
        for slot in (1, 2, 3):
            sites.install(slot, adapter(sites.specs, "lora", slot, rank=4 * slot))
        logits.append(torch.cat(mixed(model, sites, rows)))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5 * float(logits[0].abs().max()))
