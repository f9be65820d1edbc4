"""Adapters that weigh shared random bases, side by side: token for token what peft generates, the bases held once."""

from __future__ import annotations

import random
from typing import Any

import peft
import pytest
import torch

from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.methods import random_bases
from peft_serve.adapters.primitives import Adapter, Affine
from peft_serve.adapters.shared_primitives import SharedBases
from peft_serve.core import BASE, AdapterId
from peft_serve.errors import AdapterInvalid
from peft_serve.model.base import ResidentBase
from tests.adapters.checkpoints import randomise, save
from tests.model.driver import Driver, random_jobs
from tests.model.test_generation import assert_alone
from tests.model.tiny_models import VOCAB, tiny

ONE, SAME, OTHER = (AdapterId(f"sha256:{name}") for name in ("one", "same", "other"))
DRAWN = {ONE: 7, SAME: 7, OTHER: 8}
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not save"),
]
TARGETS = {
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],  # square, narrower, wider
    "gpt2": ["c_attn", "mlp.c_proj"],
    "t5": ["q", "v", "wi", "wo"],
}


def trained(family: str, seed: int, **fields: Any) -> Any:
    """A peft model whose adapter says something."""
    config = peft.RandLoraConfig(
        **{
            "r": 5,
            "randlora_alpha": 4,
            "target_modules": TARGETS[family],
            "fan_in_fan_out": family == "gpt2",
            **fields,
        },
        task_type="SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM",
    )
    model = peft.get_peft_model(tiny(family), config)
    randomise(model, seed)
    return model.eval()


def compiled(model: Any, base: ResidentBase) -> Adapter:
    return compile_adapter(inspect(save(model), base, GateLimits()), base, GateLimits())


def maps_of(adapter: Adapter) -> list[SharedBases]:
    edits = [edit for edit in adapter.sites.values() if isinstance(edit, Affine)]
    return [one for edit in edits for one in edit.maps if isinstance(one, SharedBases)]


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("saves", [True, False])
def test_tokens_are_those_of_peft_and_bases_are_held_once(family: str, saves: bool) -> None:
    models = {
        name: trained(family, seed, projection_prng_key=key, save_projection=saves)
        for seed, (name, key) in enumerate(DRAWN.items())
    }
    base = ResidentBase(tiny(family), name=family)
    adapters = {name: compiled(model, base) for name, model in models.items()}
    assert all(len(maps_of(adapter)) == len(adapter.sites) for adapter in adapters.values())
    driver = Driver(base, adapters)
    assert driver.install(*adapters).failed_installs == ()
    assert len(base.adapted._factors) == 2
    names = [*adapters, BASE]
    is_seq2seq = base.shape.is_encoder_decoder
    jobs = random_jobs(
        random.Random(5),
        count=12,
        vocab=VOCAB,
        start=base.decoder_start_ids if is_seq2seq else (),
        has_source=is_seq2seq,
        adapter=lambda i: names[i % len(names)],
    )
    driver.finish(jobs, max_chunk=9)
    plain = tiny(family)
    for name in names:
        assert_alone(models.get(name, plain), [job for job in jobs if job.adapter == name])
    outputs = {name: [job.output for job in jobs if job.adapter == name] for name in names}
    assert all(outputs[name] != outputs[BASE] for name in adapters)


def test_what_adapters_of_a_seed_share() -> None:
    """Saved or drawn again, of one adapter or another: equal values under equal keys, in one tensor for all sites."""
    base = ResidentBase(tiny("llama"), name="llama")
    saved, other, drawn, elsewhere = (
        compiled(trained("llama", seed, projection_prng_key=key, save_projection=saves), base)
        for seed, key, saves in ((1, 7, True), (2, 7, True), (1, 7, False), (1, 8, True))
    )
    first = maps_of(saved)[0]
    assert all(one.a_RS is first.a_RS and one.b_LC is first.b_LC for one in maps_of(saved))
    assert {one.key for adapter in (saved, other, drawn) for one in maps_of(adapter)} == {first.key}
    assert first.key not in {one.key for one in maps_of(elsewhere)}
    for mine, again in zip(first.factors, maps_of(drawn)[0].factors, strict=True):
        assert torch.equal(mine, again)
    assert not torch.equal(first.gains_QS, maps_of(other)[0].gains_QS)
    own = sum(one.weights_RQ.numel() + one.gains_QS.numel() for one in maps_of(saved))
    matrices = sum(base.sites[path].out_features * base.sites[path].in_features for path in saved.sites)
    assert own < matrices / 3, "5 ranks: a fifth of a matrix, but for what does not divide"


def test_bases_are_cut_to_what_the_sites_read() -> None:
    """peft makes them for the largest sides of all sites together, which no site may have at once."""
    base = ResidentBase(tiny("llama"), name="llama")
    model = trained("llama", 1, target_modules=["up_proj", "down_proj"])
    uncut = model.base_model.randlora_B["default"]
    adapter = compiled(model, base)
    up = base.sites["model.layers.0.mlp.up_proj"]
    hidden, inner = up.in_features, up.out_features
    assert uncut.flatten(1).shape == (inner, -(-inner // 5) * 5)
    assert {one.a_RS.shape for one in maps_of(adapter)} == {(5, hidden)}
    assert {one.b_LC.shape for one in maps_of(adapter)} == {(inner, -(-hidden // 5) * 5)}


def test_a_seed_stands_for_so_many_numbers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    base = ResidentBase(tiny("llama"), name="llama")
    model = trained("llama", 1, save_projection=False)
    monkeypatch.setattr(random_bases, "MAX_DRAWN", 48 * 48)
    with pytest.raises(AdapterInvalid, match=r"too many numbers to draw for \[48, 48\]; save them"):
        compiled(model, base)


def test_in_bfloat16_a_batch_is_as_close_as_peft() -> None:
    """Weights, products and sums are rounded at other places than peft's, and no further off than those."""
    exact, rounded = trained("llama", 1), trained("llama", 1).bfloat16()
    base = ResidentBase(tiny("llama").bfloat16(), name="llama")
    adapters = {ONE: compiled(exact, base), OTHER: compiled(trained("llama", 2, projection_prng_key=3), base)}
    driver = Driver(base, adapters)
    assert driver.install(*adapters).failed_installs == ()
    names = [ONE, OTHER, BASE]
    jobs = random_jobs(random.Random(5), count=24, vocab=VOCAB, adapter=lambda i: names[i % 3])
    for job in jobs:
        job.num_new = 1
    driver.finish(jobs, max_chunk=9)
    mine, of_peft = 0.0, 0.0
    for job in jobs[::3]:
        with torch.no_grad():
            want, given = (model(torch.tensor([job.prompt])).logits[0, -1].float() for model in (exact, rounded))
        want = want.log_softmax(-1)
        mine = max(mine, abs(job.logprobs[0] - float(want[job.output[0]])))
        of_peft = max(of_peft, float((given.log_softmax(-1) - want).abs().max()))
    assert mine <= of_peft
