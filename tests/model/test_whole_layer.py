"""A decoder layer in one call gives the bits of the layer spelled out, for every batch, and only where it is one."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_serve.adapters.base import SiteKind
from peft_serve.adapters.primitives import Adapter, Affine
from peft_serve.adapters.sublayer_primitives import Intervention, SubspaceEdit
from peft_serve.config import Settings
from peft_serve.core import BASE, AdapterId
from peft_serve.engine.cpu_kernels import speed_up
from peft_serve.kernels.layer import Stage
from peft_serve.kernels.native import find_compiler
from peft_serve.model import known_layers
from peft_serve.model.base import ResidentBase
from peft_serve.model.ragged import Span
from peft_serve.model.routing import Stream
from peft_serve.model.whole_layer import WholeLayer
from tests.model.driver import Driver, Job, random_jobs
from tests.model.test_sites import adapter as worn
from tests.model.tiny_models import VOCAB, tiny

pytestmark = pytest.mark.skipif(find_compiler(os.environ) is None, reason="this machine has no C++ compiler")

KNOWN = ("llama", "llama-mha", "qwen2", "qwen3", "mistral")
COVERED = ("llama", "qwen2", "mistral")  # those whose heads have a size that the attention kernel takes


def _base(name: str, dtype: torch.dtype = torch.float32, model: Any = None) -> ResidentBase:
    base = ResidentBase((tiny(name) if model is None else model).to(dtype), name=name)
    speed_up(Settings(prepack="on", cpu_kernels="on"), base, os.environ, lambda _: None)
    return base


def _whole(base: ResidentBase) -> list[WholeLayer]:
    forwards = [module.__dict__.get("forward") for module in base.model.modules()]
    owners = [getattr(forward, "__self__", None) for forward in forwards]
    return [owner for owner in owners if isinstance(owner, WholeLayer)]


class _Seen:
    """How often the layers of a base run whole, from their beginning to somewhere, and spelled out."""

    def __init__(self, base: ResidentBase) -> None:
        self.counts = {"whole": 0, "begun": 0, "own": 0}
        for layer in _whole(base):
            layer._own = self._counted(layer._own)  # type: ignore[method-assign]
        kernel = _whole(base)[0]._layer.kernel
        self._run, kernel.run = kernel.run, self._ran
        self._run_each, kernel.run_each = kernel.run_each, self._ran_each
        self.rows = 0  # calls with several layers

    def _counted(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.counts["own"] += 1
            return inner(*args, **kwargs)

        return call

    def _ran(self, *told: Any) -> None:
        first, last = told[-2:]
        if first == Stage.NORM_BEFORE:
            self.counts["whole" if last == Stage.END else "begun"] += 1
        self._run(*told)

    def _ran_each(self, *told: Any) -> None:
        self.rows += 1
        self.counts["whole"] += told[2]
        self._run_each(*told)


def _spelled_out(base: ResidentBase) -> None:
    for module in base.model.modules():
        if isinstance(getattr(module.__dict__.get("forward"), "__self__", None), WholeLayer):
            del module.__dict__["forward"]


def _adapters(base: ResidentBase, *kinds: str) -> dict[AdapterId, Adapter]:
    """By kind; `affine` is `all` at dense sites alone."""
    made = {}
    for number, kind in enumerate(kinds, 1):
        source = "all" if kind == "affine" else kind
        adapter = worn(base.adapted.specs, source, number, rank=2 + 3 * number, head=False)
        sites = {p: edit for p, edit in adapter.sites.items() if kind != "affine" or isinstance(edit, Affine)}
        made[adapter.id] = replace(adapter, sites=sites)
    return made


def _served(base: ResidentBase, adapters: dict[AdapterId, Adapter], jobs: list[Job]) -> list[Job]:
    ids = [BASE, *adapters]
    driver = Driver(base, adapters, seed=4)
    driver.install(*adapters)
    for i, job in enumerate(jobs):
        job.adapter = ids[i % len(ids)]
    driver.finish(jobs)
    driver.run(removes=tuple(range(1, len(ids))))
    return jobs


def _jobs(count: int = 7) -> list[Job]:
    return random_jobs(random.Random(5), count=count, vocab=VOCAB, start=(), has_source=False)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_llamas_kind_are_known(name: str, dtype: torch.dtype) -> None:
    assert len(_whole(_base(name, dtype))) == 2


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gpt2", "t5", "bart"])
def test_other_layers_stay_what_they_are(name: str) -> None:
    assert not _whole(_base(name))


@pytest.mark.parametrize("name", KNOWN)
def test_low_rank_adapters_run_inside_and_the_bits_are_those_spelled_out(name: str) -> None:
    bases = (_base(name), _base(name))
    _spelled_out(bases[1])
    seen = _Seen(bases[0])
    jobs = [_served(base, _adapters(base, "lora", "lora", "lora"), _jobs()) for base in bases]
    assert (seen.counts["whole"] > 0) == (name in COVERED)
    assert seen.counts["begun"] > 0
    assert seen.counts["own"] == 0
    assert [job.logprobs for job in jobs[0]] == [job.logprobs for job in jobs[1]]  # equal, not nearly equal


def test_scales_and_shifts_run_inside_too() -> None:
    bases = (_base("qwen2"), _base("qwen2"))
    _spelled_out(bases[1])
    seen = _Seen(bases[0])
    jobs = [_served(base, _adapters(base, "scales", "lora", "affine"), _jobs()) for base in bases]
    assert seen.counts["whole"] > 0
    assert seen.counts["own"] == 0
    assert [job.logprobs for job in jobs[0]] == [job.logprobs for job in jobs[1]]


@pytest.mark.parametrize("kind", ["own", "all"])
def test_an_adapter_that_does_more_runs_in_parts_with_the_same_bits(kind: str) -> None:
    bases = (_base("llama"), _base("llama"))
    _spelled_out(bases[1])
    seen = _Seen(bases[0])
    jobs = [_served(base, _adapters(base, "lora", kind), _jobs()) for base in bases]
    assert seen.counts["own"] == 0
    assert seen.counts["whole"] > 0
    assert seen.counts["begun"] > 0
    assert [job.logprobs for job in jobs[0]] == [job.logprobs for job in jobs[1]]


def test_what_a_layer_is_told_of_adapters_holds_for_all_that_act_alike() -> None:
    bases = (_base("qwen2"), _base("qwen2"))
    _spelled_out(bases[1])
    made = [0, 0]
    for number, layer in enumerate(_whole(bases[0])):
        layer._made = _counting(layer._made, made, number)  # type: ignore[method-assign]
    jobs = [_first_few_then_all(base) for base in bases]
    # nobody; low-rank terms; scales; both: whoever's they are, and whichever slots a step uses
    assert all(0 < count <= 4 for count in made), made
    assert [job.logprobs for job in jobs[0]] == [job.logprobs for job in jobs[1]]


def _first_few_then_all(base: ResidentBase) -> list[Job]:
    """Steps with the first slots, and then with ones that tables made for those alone would not reach."""
    adapters = _adapters(base, "scales", *["lora"] * 17)
    driver = Driver(base, adapters, seed=4)
    driver.install(*adapters)
    ids, done = list(adapters), list[Job]()
    for among in (ids[:2], ids):
        jobs = _jobs(len(among))
        for job, adapter in zip(jobs, among, strict=True):
            job.adapter = adapter
        driver.finish(jobs)
        done += jobs
    return done


def _counting(inner: Callable[..., Any], counts: list[int], at: int) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        counts[at] += 1
        return inner(*args)

    return call


def test_adapters_that_change_hands_are_seen() -> None:
    base, plain = _base("llama"), _base("llama")
    _spelled_out(plain)
    for rounds in (("lora",), ("lora", "scales"), ("scales",), ("lora", "all", "lora"), ("norm",)):
        given = [_served(b, _adapters(b, *rounds), _jobs(4)) for b in (base, plain)]
        assert [job.logprobs for job in given[0]] == [job.logprobs for job in given[1]]


def test_bits_are_the_same_in_bfloat16() -> None:
    bases = [_base("qwen3", torch.bfloat16) for _ in range(2)]
    _spelled_out(bases[1])
    jobs = [_served(base, _adapters(base, "lora", "lora"), _jobs()) for base in bases]
    assert [job.logprobs for job in jobs[0]] == [job.logprobs for job in jobs[1]]


def test_layers_that_run_whole_run_in_one_call() -> None:
    base = _base("qwen2")
    _served(base, {}, _jobs(2))  # a pass shows which layer follows which
    first, second = _whole(base)
    assert (first.follower, second.follower) == (second, None)
    seen = _Seen(base)
    _served(base, _adapters(base, "lora"), _jobs(4))
    assert seen.rows > 0
    assert seen.counts["whole"] == 2 * seen.rows, "no decoding layer was called alone"


def test_what_acts_behind_a_layer_comes_between() -> None:
    """Layers that wear nothing inside run whole; what leaves the first one is changed before the second reads it."""
    bases = (_base("llama"), _base("llama"))
    _spelled_out(bases[1])
    seen = _Seen(bases[0])
    given = []
    for base in bases:
        _served(base, {}, _jobs(2))
        given.append(_served(base, {AdapterId("sha256:" + "1" * 64): _intervening(base)}, _jobs(4)))
    assert [job.logprobs for job in given[0]] == [job.logprobs for job in given[1]]
    assert seen.counts["whole"] > 2 * seen.rows > 0, "some layers ran whole and alone"
    alone = _served(_base("llama"), {}, _jobs(4))
    assert given[0][1].logprobs != pytest.approx(alone[1].logprobs, rel=1e-3), "the edit does something"


def _intervening(base: ResidentBase) -> Adapter:
    (path,) = (p for p, spec in base.adapted.specs.items() if spec.kind is SiteKind.LAYER and ".0." in p)
    size, generator = base.shape.hidden_size, torch.Generator().manual_seed(3)
    edit = SubspaceEdit(
        source_RD=torch.randn(2, size, generator=generator),
        source_bias_R=torch.randn(2, generator=generator),
        projection_RD=torch.randn(2, size, generator=generator) / size,
    )
    sites = {path: Intervention(first=edit, last=edit, num_first=2, num_last=2, activation=None, subtracts=True)}
    return Adapter(id=AdapterId("sha256:" + "1" * 64), method="TEST", sites=sites)


def test_layers_with_something_between_them_run_one_by_one() -> None:
    bases = (_base("llama"), _base("llama"))
    _spelled_out(bases[1])
    for base in bases:
        base.model.get_submodule("model.layers.0").register_forward_hook(lambda _, __, y: 2 * y)
    seen = _Seen(bases[0])
    given = [_served(base, {}, _jobs(4)) for base in bases]
    assert [job.logprobs for job in given[0]] == [job.logprobs for job in given[1]]
    assert [layer.follower for layer in _whole(bases[0])] == [None, None]
    assert seen.counts["whole"] > 0 == seen.rows


class Doubled(LlamaDecoderLayer):
    """The same names, another formula."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        residual = 2 * hidden_states
        hidden_states, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = residual + hidden_states
        out: Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return out


def test_a_trial_tells_another_formula_of_the_same_names() -> None:
    model = tiny("llama")
    for module in model.modules():
        if type(module) is LlamaDecoderLayer:
            module.__class__ = Doubled
    assert not _whole(_base("llama", model=model))


def test_a_pass_of_other_tokens_than_those_routed_is_refused() -> None:
    base = _base("llama")
    layer, module = _whole(base)[0], base.model.get_submodule("model.layers.0")
    adapter = next(iter(_adapters(base, "lora").values()))
    base.adapted.install(1, adapter)
    base.adapted.route(Stream.TARGET, [(1, 5)])
    spans = [Span(num_tokens=1, start=3, blocks=(1,))]
    with pytest.raises(ValueError, match=r"got 1 tokens and its stream was routed for 5"):
        known_layers._tried(layer.forward, spans, module, layer._inside.attention, base.runs.attention)
