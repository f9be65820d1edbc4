"""Bottlenecks in Triton inside a tiny model: every form, and what each row gets is what it gets in plain torch."""

from __future__ import annotations

import pytest
import torch

from peft_serve.adapters.primitives import Edit
from peft_serve.adapters.sublayer_primitives import Bottleneck
from peft_serve.model.sites import AdaptedSites
from tests.adapters.adapterhub.bases import VOCAB, base_model
from tests.kernels.triton.interpreter import IS_INTERPRETED
from tests.model.test_sublayers import FORMS, adapter, bottleneck, everywhere, run, sites_of, with_norms

pytest.importorskip("triton", reason="Triton is not installed")

from peft_serve.kernels.triton.bottleneck import BottleneckKernel
from peft_serve.kernels.triton.memory import DeviceMemory
from peft_serve.kernels.triton.mixing import MixingKernel
from peft_serve.model.terms.term import OtherKernels

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="the tiny models are on a CPU")


def _edits() -> dict[int, Bottleneck]:
    make = torch.Generator().manual_seed(4)
    named = [{**more, "width": width} for width, more in enumerate(FORMS.values(), start=2)]
    named += [with_norms(make, width=2, is_final=n == 1) for n in range(3)]
    return {slot: bottleneck(make, **more) for slot, more in enumerate(named, start=1)}  # type: ignore[arg-type]


def _in_first_layer(sites: AdaptedSites, edit: Bottleneck) -> dict[str, Edit]:
    return {path: edit for path, edit in everywhere(sites, edit).items() if "layer.0." in path}


def test_every_form_beside_the_others() -> None:
    answers = []
    ids = torch.randint(5, VOCAB, (1, 2), generator=torch.Generator().manual_seed(5))
    for uses_kernel in (False, True):
        model = base_model("bert")
        sites: AdaptedSites = sites_of(model, "bert")
        memory = DeviceMemory(torch.device("cpu"))
        if uses_kernel:
            sites.run_others_by(OtherKernels(mixing=MixingKernel(memory), bottlenecks=BottleneckKernel(memory)))
        edits = _edits()
        for slot, edit in edits.items():
            sites.install(slot, adapter(str(slot), _in_first_layer(sites, edit)))
        slots = [0, *edits, 2]
        sites.remove(3)
        sites.install(3, adapter("again", _in_first_layer(sites, edits[1])))
        answers.append(run(sites, model, ids, slots, "bert"))
        assert bool(memory.slabs.num_used) == uses_kernel
        for slot in edits:
            sites.remove(slot)
        assert memory.slabs.num_held == 0
    torch.testing.assert_close(answers[1], answers[0], rtol=2e-5, atol=2e-5)
    assert torch.equal(answers[1][0], answers[0][0])
