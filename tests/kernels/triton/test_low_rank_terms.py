"""A dense site whose low-rank terms and mixers run in Triton: what the normal form says, whatever is beside them."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton.interpreter import IS_INTERPRETED
from tests.model.dense_algebra import edit_of
from tests.model.test_terms_dense import BETWEEN, Bench

pytest.importorskip("triton", reason="Triton is not installed")

from peft_serve.adapters.primitives import Affine, LowRank
from peft_serve.kernels.triton.bottleneck import BottleneckKernel
from peft_serve.kernels.triton.low_rank import LowRankKernel
from peft_serve.kernels.triton.mixing import MixingKernel
from peft_serve.model.routing import Stream
from peft_serve.model.sites_forward import DenseSite
from peft_serve.model.terms.term import OtherKernels

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="the tiny models are on a CPU")


def _bench(kind: str) -> Bench:
    bench = Bench(kind)
    kernel = LowRankKernel(torch.device("cpu"), num_slots=4)
    bench.sites.run_low_rank_by(kernel)
    others = OtherKernels(mixing=MixingKernel(kernel.memory), bottlenecks=BottleneckKernel(kernel.memory))
    bench.sites.run_others_by(others)
    return bench


@pytest.mark.parametrize(
    ("kind", "term"), [("conv1d", "out_blocks"), ("narrow", "all"), ("embedding", "delta"), ("scaled", "all")]
)
def test_one_term(kind: str, term: str) -> None:
    bench = _bench(kind)
    for slot in (1, 2, 3, 6):
        bench.install(slot, edit_of(term, bench.spec, slot))
    bench.install(5, Affine())
    bench.check(BETWEEN)
    bench.remove(2)
    bench.install(2, edit_of(term, bench.spec, 9))
    bench.check([(0, 1), (2, 2), (5, 1)])


def test_vectors_go_with_the_low_rank_term_unless_something_acts_between() -> None:
    bench = _bench("linear")
    scale, shift = torch.rand(12), torch.rand(12)
    bench.install(1, Affine(delta=LowRank(torch.rand(3, 8), torch.rand(12, 3)), out_scale=scale))
    bench.install(2, Affine(shift=shift))
    bench.install(3, Affine(delta=LowRank(torch.rand(5, 8), torch.rand(12, 5))))
    bench.install(4, edit_of("out_blocks", bench.spec, 4))
    site = bench.sites.at["site"]
    assert isinstance(site, DenseSite)
    for division, num_ops in (
        (((1, 2), (0, 1), (2, 1), (3, 2)), 1),
        (((3, 2), (0, 1)), 1),
        (((2, 2), (0, 1)), 1),
        (((1, 2), (2, 2), (4, 1)), 4),
    ):
        bench.check(division)
        bench.sites.route(Stream.TARGET, division)
        route = site.lane.route
        assert route is not None
        assert len(site.dense.ops_after(route)) == num_ops
