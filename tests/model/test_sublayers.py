"""Sublayer sites: found by family, wrapped only while they are used, exact for any division of the tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from peft_serve.adapters.base import SiteKind
from peft_serve.adapters.primitives import Adapter, Edit
from peft_serve.adapters.sublayer_primitives import Bottleneck, Coupling, LearnedNorm, Reads, TwoLayers
from peft_serve.core import AdapterId
from peft_serve.model.routing import Stream
from peft_serve.model.sites import AdaptedSites
from peft_serve.model.sublayer_places import sublayers_of
from tests.adapters.adapterhub.bases import ENCODERS, FAMILIES, HIDDEN, SEQ2SEQ, VOCAB, base_model
from tests.adapters.adapterhub.served import resident
from tests.model.tiny_models import tiny


def bottleneck(make: torch.Generator, width: int = 3, **more: object) -> Bottleneck:
    def random_of(*shape: int) -> Tensor:
        return 0.4 * torch.randn(shape, generator=make)

    given: dict[str, object] = {
        "down_BD": random_of(width, HIDDEN),
        "down_bias_B": random_of(width),
        "up_DB": random_of(HIDDEN, width),
        "up_bias_D": random_of(HIDDEN),
        "activation": "tanh",
        "scale": torch.tensor([1.5]),
        "reads": Reads.SUBLAYER,
    }
    return Bottleneck(**{**given, **more})  # type: ignore[arg-type]


def norm(make: torch.Generator) -> LearnedNorm:
    return LearnedNorm(1 + 0.2 * torch.randn(HIDDEN, generator=make), 0.2 * torch.randn(HIDDEN, generator=make))


def coupling(make: torch.Generator) -> Coupling:
    def net() -> TwoLayers:
        half = HIDDEN // 2
        shapes = ((4, half), (4,), (half, 4), (half,))
        return TwoLayers(*(0.4 * torch.randn(shape, generator=make) for shape in shapes))

    return Coupling(net(), net(), "relu")


def adapter(name: str, edits: dict[str, Edit]) -> Adapter:
    return Adapter(id=AdapterId(name), method="ADAPTERHUB", sites=edits)


def everywhere(sites: AdaptedSites, edit: Edit, *, is_coupling: bool = False) -> dict[str, Edit]:
    paths = (path for path, spec in sites.specs.items() if spec.kind is SiteKind.SUBLAYER)
    return {path: edit for path in paths if path.endswith("invertible_adapters") is is_coupling}


def sites_of(model: nn.Module, family: str) -> AdaptedSites:
    return AdaptedSites(model, stream_of=resident(family).runs.stream_of)


def forwards(model: nn.Module) -> dict[str, object]:
    return {path: module.__dict__.get("forward") for path, module in model.named_modules()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_sublayer_of_a_known_family_is_a_site(family: str) -> None:
    model = base_model(family)
    found = sublayers_of(model)
    num_couplings = sum(around.output is None for around in found.values())
    num_layers, per_layer = (4, 2.5) if family in SEQ2SEQ else (2, 2)
    assert sum(around.spec.kind is SiteKind.LAYER for around in found.values()) == num_layers
    assert len(found) - num_couplings - num_layers == num_layers * per_layer
    assert num_couplings == (0 if family == "electra" else 1)  # its embeddings are narrower than its layers
    assert all(around.spec.out_features == HIDDEN and not around.spec.parameters for around in found.values())
    assert sites_of(model, family).specs.keys() >= found.keys()


def test_a_model_of_another_family_has_none() -> None:
    assert not sublayers_of(tiny("gpt_neox"))


@pytest.mark.parametrize("family", ["bert", "llama", "bart", "distilbert"])
def test_modules_are_wrapped_only_while_an_adapter_is_there(family: str) -> None:
    make = torch.Generator().manual_seed(1)
    model = base_model(family)
    sites = sites_of(model, family)
    before = forwards(model)
    edits = everywhere(sites, bottleneck(make)) | everywhere(sites, coupling(make), is_coupling=True)
    sites.install(1, adapter("a", edits))
    sites.install(2, adapter("b", edits))
    while_there = forwards(model)
    assert while_there != before
    sites.remove(1)
    assert forwards(model) == while_there
    sites.remove(2)
    assert forwards(model) == before
    sites.install(1, adapter("a", edits))
    sites.close()
    assert not any(forwards(model).values())


def test_a_failed_install_leaves_no_wrapping() -> None:
    make = torch.Generator().manual_seed(2)
    model = base_model("llama")
    sites = sites_of(model, "llama")
    before = forwards(model)
    good, bad = bottleneck(make), bottleneck(make, up_DB=torch.zeros(HIDDEN, 5))
    path = "model.layers.0.output_adapters"
    with pytest.raises(ValueError, match=r"up has shape \[16, 5\]"):
        sites.install(1, adapter("a", {"model.layers.0.attention_adapters": good, path: bad}))
    with pytest.raises(ValueError, match="no place for Bottleneck"):
        sites.install(1, adapter("a", {"model.layers.0.mlp.up_proj": good}))
    with pytest.raises(ValueError, match="not finite"):
        sites.install(1, adapter("a", {path: bottleneck(make, scale=torch.tensor([float("nan")]))}))
    assert forwards(model) == before


FORMS: dict[str, dict[str, object]] = {
    "h": {},
    "h_wide": {"scale": torch.linspace(0.5, 2.0, HIDDEN)},
    "t": {"reads": Reads.RESIDUAL},
    "post": {"reads": Reads.NORMED, "activation": "leakyrelu"},
    "post_kept": {"reads": Reads.NORMED, "keeps": Reads.NORMED},
    "final": {"reads": Reads.NORMED, "keeps": Reads.NORMED, "is_final": True},
    "final_t": {"reads": Reads.RESIDUAL, "keeps": Reads.SUBLAYER, "is_final": True},
    "sum": {"reads": Reads.NORMED, "keeps": Reads.SUMMED},
}


def with_norms(make: torch.Generator, **more: object) -> dict[str, object]:
    return {"norm_before": norm(make), "norm_after": norm(make), "norms_kept": True, **more}


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_any_division_of_the_tokens_gives_each_row_what_it_gets_alone(family: str) -> None:
    """Many adapters of the same and of different forms, several widths, one and several rows each, slots reused."""
    make = torch.Generator().manual_seed(4)
    model = base_model(family)
    sites = sites_of(model, family)
    named = {f"{form}{width}": {**more, "width": width} for form, more in FORMS.items() for width in (2, 3)}
    named |= {f"normed{n}": with_norms(make, width=2, is_final=n == 1) for n in range(3)}
    edits = {name: bottleneck(make, **more) for name, more in named.items()}  # type: ignore[arg-type]
    for slot, edit in enumerate(edits.values(), start=1):
        sites.install(slot, adapter(str(slot), everywhere(sites, edit)))
    ids = torch.randint(5, VOCAB, (1, 6), generator=make)
    alone = [run(sites, model, ids, [slot], family)[0] for slot in range(len(edits) + 1)]
    assert all(not torch.allclose(one, alone[0], atol=1e-3) for one in alone[1:])
    chance = random.Random(5)
    for _ in range(4):
        slots = sorted(chance.choices(range(len(edits) + 1), k=14))
        for slot, row in zip(slots, run(sites, model, ids, slots, family), strict=True):
            torch.testing.assert_close(row, alone[slot], rtol=2e-5, atol=2e-5)
    sites.remove(1)
    sites.install(1, adapter("again", everywhere(sites, coupling(make), is_coupling=True)))
    mixed = run(sites, model, ids, [0, 1, 2], family)
    torch.testing.assert_close(mixed[2], alone[2], rtol=2e-5, atol=2e-5)
    assert torch.equal(mixed[0], run(sites, model, ids, [0, 0, 0], family)[0])
    torch.testing.assert_close(mixed[1], run(sites, model, ids, [1], family)[0], rtol=2e-5, atol=2e-5)


@torch.inference_mode()
def run(sites: AdaptedSites, model: nn.Module, ids: Tensor, slots: Sequence[int], family: str) -> Tensor:
    """Answers [R, T, .] of the same tokens under each slot."""
    for stream in Stream:
        sites.route(stream, [(slot, ids.shape[1]) for slot in slots])
    out = model(input_ids=ids.repeat(len(slots), 1))
    sites.clear()
    states: Tensor = out.last_hidden_state if family in ENCODERS else out.logits
    return states


def test_a_pass_of_another_length_than_was_routed_is_refused() -> None:
    make = torch.Generator().manual_seed(6)
    model = base_model("bert")
    sites = sites_of(model, "bert")
    sites.install(1, adapter("a", everywhere(sites, bottleneck(make))))
    sites.route(Stream.SOURCE, [(1, 5)])
    with torch.inference_mode(), pytest.raises(ValueError, match=r"attention\.output' got 6 tokens"):
        model(input_ids=torch.ones(1, 6, dtype=torch.long))


def test_a_pass_that_broke_off_leaves_nothing_for_the_next() -> None:
    make = torch.Generator().manual_seed(7)
    model = base_model("bert")
    sites = sites_of(model, "bert")
    ids = torch.randint(5, VOCAB, (1, 6), generator=make)
    before = run(sites, model, ids, [0], "bert")
    edit = bottleneck(make, reads=Reads.NORMED, keeps=Reads.NORMED, is_final=True)
    sites.install(1, adapter("a", everywhere(sites, edit)))
    sites.route(Stream.SOURCE, [(1, 6)])
    layer = model.encoder.layer[0]
    with torch.inference_mode():
        inner = layer.intermediate(torch.ones(1, 6, HIDDEN))
        layer.output.dense(inner)  # and never the norm behind it
    sites.clear()
    assert torch.equal(run(sites, model, ids, [0], "bert"), before)
