"""Low-rank terms in Triton inside tiny models: what each row gets in a batch is what it gets alone."""

from __future__ import annotations

import copy

import pytest
import torch

from peft_serve.model.sites import AdaptedSites
from tests.kernels.triton.interpreter import DEVICE, IS_INTERPRETED
from tests.model.test_sites import adapter, assert_rows_alone, build, rows_for, stream_of

pytest.importorskip("triton", reason="Triton is not installed")

from peft_serve.kernels.triton.low_rank import LowRankKernel

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="the tiny models are on a CPU")


def test_every_kind_in_one_batch() -> None:
    plain = build("llama")
    model = copy.deepcopy(plain)
    sites = AdaptedSites(model, stream_of=stream_of)
    sites.run_low_rank_by(LowRankKernel(torch.device(DEVICE)))
    worn = {
        slot: adapter(sites.specs, kind, slot, rank=7 * slot, every=1 + slot % 3)
        for slot, kind in enumerate(["lora", "all", "scales"], 1)
    }
    for slot, it in worn.items():
        sites.install(slot, it)
    assert_rows_alone(model, plain, sites, worn, rows_for([0, 1, 2, 3], seed=2))
    sites.remove(1)
    worn[1] = adapter(sites.specs, "lora", 7, rank=9, every=2)
    sites.install(1, worn[1])
    assert_rows_alone(model, plain, sites, worn, rows_for([1, 0, 2], seed=3, lengths=(1,)))
