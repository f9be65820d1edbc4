"""Prefix and prompt tuning as AdapterHub saves them: where they stand, their tensors, and what these make.

Prefixes: the library keeps all prefixes of a model in one pool below the body, a group of tensors for each kind of
attention, and every attention module holds the pool as well: a file that was saved from its `state_dict` has each
tensor once for the pool and once more for each module, under keys with `.pool.`. Copies must agree; one will do.

Sources: arXiv:2101.00190; `PrefixTuning` and `FlatPrefixTuning` of `methods/prefix_tuning.py`, adapters 1.3.0. The
keys and values stand in front of those of the tokens, take part in no rotation and count for no position.

Prompts (arXiv:2104.08691; `PromptTuningLayer` of `methods/prompt_tuning.py`): the library puts them behind the module
that embeds the tokens, so that they have no position, type or norm of it. It can do so in encoders of BERT's kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from peft_serve.adapters.adapterhub.config import HubConfig
from peft_serve.adapters.adapterhub.places import Attends, stacks_of
from peft_serve.adapters.adapterhub.schemas import place_of
from peft_serve.adapters.base import Base, BaseShape
from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.primitives import KVPrefix, Prefixes, SoftPrompt
from peft_serve.adapters.registry import Shape
from peft_serve.errors import AdapterInvalid, Refusal

POOLS: Final = (".prefix_tuning.prefix_tunings.", ".prefix_tuning.pool.prefix_tunings.")
"""What stands between a module's path and the adapter's name in a key."""

PROMPTS: Final = (".prompt_tuning.prompt_tunings.",)
PROMPT: Final = "prompt_embedding.weight"

FLAGS: Final[Mapping[Attends, str]] = MappingProxyType(
    {Attends.SOURCE: "encoder_prefix", Attends.CROSS: "cross_prefix"}
)
"""Fields that say whether there is a prefix; a model's own attention always has one."""

ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = MappingProxyType(
    {
        "relu": functional.relu,
        "gelu": functional.gelu,
        "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
        "gelu_fast": lambda x: functional.gelu(x, approximate="tanh"),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "swish": functional.silu,
        "silu": functional.silu,
        "tanh": torch.tanh,
        "leakyrelu": functional.leaky_relu,
        "sigmoid": torch.sigmoid,
        "relu6": functional.relu6,
        "mish": functional.mish,
        "linear": lambda x: x,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The attention modules of one stack whose prefixes are made by the same tensors."""

    attends: Attends
    num_layers: int  # of the stack
    layers: tuple[int, ...]  # those with a prefix, counted within the stack


def groups_in(base: Base, config: Config) -> dict[str, Group]:
    """The groups that the config asks for, by the name that their tensors carry; raises `AdapterInvalid`."""
    left_out = config.fields["leave_out"]
    groups: dict[str, Group] = {}
    for stack, numbers in stacks_of(base):
        layers = tuple(at for at, number in enumerate(numbers) if number not in left_out)
        for key, attends in stack.prefixes.items():
            if not layers or (attends in FLAGS and not config.flag(FLAGS[attends])):
                continue
            if stack.counts_distances and attends is not Attends.CROSS and len(layers) < len(numbers):
                reason = (
                    f"leaves out some layers of one stack of a {base.family} model, where adapters then drops the "
                    "bias of all distances; leave out none of them or all"
                )
                raise AdapterInvalid([Refusal(place_of("leave_out"), reason)])
            groups[key] = Group(attends=attends, num_layers=len(numbers), layers=layers)
    if not groups:
        reason = f"names no attention of a {base.family} model that a prefix can be put in front of"
        raise AdapterInvalid([Refusal(place_of("architecture"), reason)])
    return groups


def shapes_of(group: Group, config: Config, base: BaseShape) -> Mapping[str, Shape]:
    """The tensors of a group by suffix: the numbers themselves, or embeddings and the network they go through."""
    size = 2 * len(group.layers) * base.num_kv_heads * base.head_dim
    length = config.integer("prefix_length")
    if config.flag("flat"):
        return {"control_trans": (length * size,)}
    width, inner = base.state_size, config.integer("bottleneck_size")
    return {
        "wte.weight": (length, width),
        "control_trans.0.weight": (inner, width),
        "control_trans.0.bias": (inner,),
        "control_trans.2.weight": (size, inner),
        "control_trans.2.bias": (size,),
    }


def in_front(hub: HubConfig, base: Base) -> InFront:
    """What the config puts in front of a sequence; raises `AdapterInvalid`."""
    if hub.prompt is not None and not any(stack.takes_prompt for stack, _ in stacks_of(base)):
        reason = (
            f"is prompt tuning, which is not served on {base.family} models: adapters itself runs it in encoders of "
            "BERT's kind alone, and of these DeBERTa's layers take no rows without positions; train it with peft"
        )
        raise AdapterInvalid([Refusal(place_of("architecture"), reason)])
    if hub.prompt is not None and hub.reft is not None:
        reason = "holds prompt tuning and ReFT, whose first positions would be the prompt's; save two adapters"
        raise AdapterInvalid([Refusal(place_of("configs"), reason)])
    return InFront(
        name=hub.name,
        prefix=hub.prefix,
        groups={} if hub.prefix is None else groups_in(base, hub.prefix),
        prompt=hub.prompt,
        shape=base.shape,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class InFront:
    """What one checkpoint puts in front of a sequence, maybe nothing. Tensors are named by group and suffix."""

    name: str  # of the adapter
    prefix: Config | None
    groups: Mapping[str, Group]  # of the prefix
    prompt: Config | None
    shape: BaseShape

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Every tensor that must be there."""
        shapes: dict[str, Shape] = {}
        for key, group in self.groups.items():
            assert self.prefix is not None, "a prefix makes groups"
            shapes |= {f"{key}.{suffix}": shape for suffix, shape in shapes_of(group, self.prefix, self.shape).items()}
        if self.prompt is not None:
            shapes[PROMPT] = (self.prompt.integer("prompt_length"), self.shape.hidden_size)
        return shapes

    def key_of(self, name: str) -> str | None:
        """The group and suffix, `self_prefix.control_trans`, that a stored name means; None if it is nothing here."""
        for pool in (*(POOLS if self.prefix is not None else ()), *(PROMPTS if self.prompt is not None else ())):
            _, found, key = f".{name}".partition(f"{pool}{self.name}.")
            if found:
                return key
        return None

    def __call__(self, tensors: Mapping[str, Tensor]) -> Prefixes:
        """`tensors` are float32, by group and suffix."""
        made = {group.attends: self._prefix(key, group, tensors) for key, group in self.groups.items()}
        return Prefixes(
            prompt=None if self.prompt is None else SoftPrompt(tensors[PROMPT], is_bare=True),
            own=made.get(Attends.OWN),
            source=made.get(Attends.SOURCE),
            cross=made.get(Attends.CROSS),
        )

    def _prefix(self, key: str, group: Group, tensors: Mapping[str, Tensor]) -> KVPrefix:
        assert self.prefix is not None, "a prefix makes groups"
        length, shape = self.prefix.integer("prefix_length"), self.shape
        kv = self._values(self.prefix, key, tensors).view(
            length, 2 * len(group.layers), shape.num_kv_heads, shape.head_dim
        )
        kv_NHPD = kv.permute(1, 2, 0, 3)
        keys_LHPD = kv.new_zeros(group.num_layers, *kv_NHPD.shape[1:])
        values_LHPD = keys_LHPD.clone()
        keys_LHPD[list(group.layers)] = kv_NHPD[0::2]
        values_LHPD[list(group.layers)] = kv_NHPD[1::2]
        absent = frozenset(range(group.num_layers)) - frozenset(group.layers)
        return KVPrefix(keys_LHPD, values_LHPD, advances_positions=False, absent=absent)

    @staticmethod
    def _values(config: Config, key: str, tensors: Mapping[str, Tensor]) -> Tensor:
        if config.flag("flat"):
            return tensors[f"{key}.control_trans"]
        activation = ACTIVATIONS[config.text("non_linearity").lower()]
        first, second = (
            (tensors[f"{key}.control_trans.{at}.weight"], tensors[f"{key}.control_trans.{at}.bias"]) for at in (0, 2)
        )
        return functional.linear(activation(functional.linear(tensors[f"{key}.wte.weight"], *first)), *second)
