"""LLaMA-Adapter: learned prompts that the top attention layers look at beside their own keys and values."""

from __future__ import annotations

from typing import Final, NamedTuple

from torch import Tensor

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import Base, SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.methods.fields import contradiction
from peft_serve.adapters.primitives import GatedPrompt
from peft_serve.adapters.registry import SharedLayout, Site, SiteLayout, Stored, compiles
from peft_serve.adapters.targets import Named

PROMPT: Final = "adaption_prompt"
GATE: Final = "adaption_gate"


class Family(NamedTuple):
    """Where a family of models keeps what the method needs (peft `TRANSFORMERS_MODEL_CONFIG`)."""

    attention: str
    projections: tuple[str, ...]  # key and value; one name: the last two thirds of its outputs
    is_projected: bool  # whether the addition goes through the output projection


FAMILIES: Final = {
    "llama": Family("self_attn", ("k_proj", "v_proj"), is_projected=True),
    "mistral": Family("self_attn", ("k_proj", "v_proj"), is_projected=True),
    "gpt2": Family("attn", ("c_attn",), is_projected=False),
}

ADAPTION_PROMPT: Final = ConfigSchema(
    required={"adapter_len": rules.integer(1, 1 << 20), "adapter_layers": rules.integer(1, 1 << 16)},
    optional={"target_modules": rules.text},
)


def _check(config: Config, base: Base, stored: Stored) -> SharedLayout:  # noqa: ARG001 - one signature for every method
    family = FAMILIES.get(base.family)
    if family is None:
        reason = f"is ADAPTION_PROMPT, which peft defines for {', '.join(FAMILIES)}; the served base is {base.family}"
        raise contradiction("peft_type", f"{reason}; train another method")
    if config.text("target_modules", family.attention) != family.attention:
        raise contradiction("target_modules", f"is not {family.attention}, the attention of {base.family} models")
    num_layers = len(_attentions(base, family))
    if config.integer("adapter_layers") > num_layers:
        raise contradiction("adapter_layers", f"is more than the {num_layers} layers of the served base")
    _check_projections(base, family)
    return SharedLayout()


def _check_projections(base: Base, family: Family) -> None:
    """peft adds the output projection's bias once more, and cuts keys as if heads filled the hidden size."""
    if family.is_projected and any(base.bias(f"{path}.o_proj") is not None for path in _attentions(base, family)):
        reason = "is ADAPTION_PROMPT, which is not served on a base whose output projection has a bias"
        raise contradiction("peft_type", f"{reason}; train another method")
    if base.shape.num_heads * base.shape.head_dim != base.shape.hidden_size:
        reason = "is ADAPTION_PROMPT, which peft defines where all heads together are as wide as the hidden state"
        raise contradiction("peft_type", f"{reason}; train another method")


def _attentions(base: Base, family: Family) -> list[str]:
    suffix = f".{family.attention}"
    return [path for path, spec in base.sites.items() if spec.kind is SiteKind.ATTENTION and path.endswith(suffix)]


def _named(config: Config, base: Base) -> Named:
    """The top layers, as many as the config says."""
    family = FAMILIES.get(base.family)
    paths = [] if family is None else _attentions(base, family)
    return Named(must=frozenset(paths[-config.integer("adapter_layers", 1) :]))


def _layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    prompt = (1, config.integer("adapter_len"), spec.in_features)
    return SiteLayout(tensors={PROMPT: (prompt,), GATE: ((1,),)})


@compiles(
    "ADAPTION_PROMPT",
    schema=ADAPTION_PROMPT,
    layout=_layout,
    kinds=frozenset({SiteKind.ATTENTION}),
    shared=_check,
    named=_named,
)
def adaption_prompt(site: Site) -> GatedPrompt:
    """The base's own keys and values of a learned prompt, behind a gate (arXiv:2303.16199, peft `AdaptedAttention`)."""
    family = FAMILIES[site.base.family]
    projected = [_project(site, name) for name in family.projections]
    keys_PO, values_PO = projected if len(projected) > 1 else projected[0].chunk(3, dim=-1)[1:]
    return GatedPrompt(_by_head(site, keys_PO), _by_head(site, values_PO), site.tensors[GATE], family.is_projected)


def _project(site: Site, name: str) -> Tensor:
    path = f"{site.spec.path}.{name}"
    output_PO = site.tensors[PROMPT][0] @ site.base.weight(path).cpu().T
    bias_O = site.base.bias(path)
    return output_PO if bias_O is None else output_PO + bias_O.cpu()


def _by_head(site: Site, output_PO: Tensor) -> Tensor:
    return output_PO.reshape(len(output_PO), -1, site.base.shape.head_dim).transpose(0, 1)
