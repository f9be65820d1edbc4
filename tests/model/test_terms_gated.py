"""Gated prompts in mixed batches, token for token what peft's wrapped attention gives."""

from __future__ import annotations

import random

import pytest
import torch
from peft import AdaptionPromptConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from peft_serve.adapters.base import SiteKind
from peft_serve.adapters.primitives import Adapter, Affine, GatedPrompt, LowRank
from peft_serve.core import AdapterId
from peft_serve.model.base import ResidentBase
from tests.model.driver import Driver, Job, random_jobs
from tests.model.tiny_models import VOCAB, tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

FAMILIES = ["llama", "mistral", "gpt2"]
SHORT, LONG = AdapterId("sha256:short"), AdapterId("sha256:long")


def peft_model(family: str, num_tokens: int) -> PeftModel:
    """A tiny model with a prompt of so many tokens in its last layer, or in both."""
    torch.manual_seed(num_tokens)
    config = AdaptionPromptConfig(adapter_len=num_tokens, adapter_layers=1 + num_tokens % 2, task_type="CAUSAL_LM")
    model = get_peft_model(tiny(family), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adaption_gate"):
                parameter.fill_(0.5 + 0.3 * num_tokens)
    return model.eval()


def compiled(model: PeftModel, adapter: AdapterId) -> Adapter:
    """The adapter of a peft model: keys and values of its prompt, by the base's own projections."""
    sites = {}
    for path, module in model.base_model.model.named_modules():
        if not hasattr(module, "adaption_prompt"):
            continue
        attention, prompt = module.model, module.adaption_prompt.detach()[0]
        if hasattr(attention, "c_attn"):
            _, keys, values = attention.c_attn(prompt).chunk(3, dim=-1)
        else:
            keys, values = attention.k_proj(prompt), attention.v_proj(prompt)
        heads = (t.detach().view(len(prompt), -1, attention.head_dim).transpose(0, 1) for t in (keys, values))
        is_projected = hasattr(attention, "o_proj")
        sites[path] = GatedPrompt(*heads, module.adaption_gate.detach(), is_projected)
    return Adapter(id=adapter, method="ADAPTION_PROMPT", sites=sites)


def generated(model: PreTrainedModel | PeftModel, job: Job) -> list[int]:
    with torch.no_grad():
        ids = model.generate(
            input_ids=torch.tensor([job.prompt]), max_new_tokens=job.num_new, do_sample=False, use_cache=True
        )
    return ids[0, len(job.prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_peft(family: str) -> None:
    models = {SHORT: peft_model(family, 3), LONG: peft_model(family, 6)}
    adapters = {id_: compiled(model, id_) for id_, model in models.items()}
    assert all(adapters[id_].sites for id_ in models)
    base = ResidentBase(tiny(family), name=family)
    driver = Driver(base, adapters)
    assert driver.install(*adapters).failed_installs == ()
    names = [SHORT, LONG, AdapterId("base")]
    jobs = random_jobs(random.Random(1), count=12, vocab=VOCAB, adapter=lambda i: names[i % 3])
    driver.finish(jobs)
    plain = tiny(family)
    differing = 0
    for job in jobs:
        assert job.output == generated(models.get(job.adapter, plain), job)
        differing += job.output != generated(plain, job)
    assert differing > 3, "the prompts matter"


def test_a_prompt_stands_beside_other_terms() -> None:
    """One batch with a gated prompt and a low-rank term: each gets its own."""
    model = peft_model("llama", 4)
    base = ResidentBase(tiny("llama"), name="llama")
    lora = AdapterId("sha256:lora")
    path = "model.layers.1.self_attn"
    delta = LowRank(torch.randn(2, 32), torch.randn(32, 2))
    other = Adapter(id=lora, method="LORA", sites={f"{path}.q_proj": Affine(delta=delta)})
    adapters = {SHORT: compiled(model, SHORT), lora: other}
    assert base.sites[path].kind is SiteKind.ATTENTION
    assert dict(base.sites[path].parameters) == {}
    driver = Driver(base, adapters)
    assert driver.install(*adapters).failed_installs == ()
    names = [SHORT, lora, AdapterId("base")]
    jobs = random_jobs(random.Random(2), count=9, vocab=VOCAB, adapter=lambda i: names[i % 3])
    driver.finish(jobs)
    merged = tiny("llama")
    merged.get_submodule(f"{path}.q_proj").weight += delta.b_OR @ delta.a_RI
    models = {SHORT: model, lora: merged}
    for job in jobs:
        assert job.output == generated(models.get(job.adapter, tiny("llama")), job)


@pytest.mark.parametrize(
    ("keys", "values", "reason"),
    [
        ((2, 3, 8), (2, 4, 8), "values has shape"),
        ((2, 3, 4), (2, 3, 4), "cannot read"),
        ((3, 3, 8), (3, 3, 8), "cannot read"),
    ],
)
def test_keys_that_do_not_fit_the_heads_are_refused(
    keys: tuple[int, ...], values: tuple[int, ...], reason: str
) -> None:
    base = ResidentBase(tiny("llama"), name="llama")
    path = "model.layers.0.self_attn"
    bad = GatedPrompt(torch.ones(keys), torch.ones(values), torch.ones(1), is_projected=True)
    with pytest.raises(ValueError, match=reason):
        base.adapted.install(1, Adapter(id=SHORT, method="TEST", sites={path: bad}))
    good = GatedPrompt(torch.ones(2, 3, 8), torch.ones(2, 3, 8), torch.ones(1), is_projected=True)
    base.adapted.install(1, Adapter(id=SHORT, method="TEST", sites={path: good}))
