"""peft configs of variants of LoRA, rotations, token rows, and what stands in front of the sequence.

`METHODS` maps a method id to a function from the kind of base to the config; `ONLY` the base kinds of those that
do not fit every kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import peft

from tests.adapters.places import embedding, head, targets

TOKENS: Final = [17, 22, 5, 40, 63]
INVOCATION: Final = [30, 12]
DECODERS: Final = ("llama", "llama_tied", "qwen2", "mistral", "gemma", "gpt2", "opt", "neox")
WITH_LINEAR: Final = ("llama", "llama_tied", "qwen2", "mistral", "gemma", "opt", "neox", "t5", "bart", "bart_scaled")


def _lora(kind: str, **more: Any) -> peft.PeftConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets(kind), **more})


def _block_diagonal(kind: str) -> peft.PeftConfig:
    first, second = targets(kind)[:2]
    blocks = peft.tuners.lora.BdLoraConfig(
        target_modules_bd_a=[first], target_modules_bd_b=[second], nblocks=2, match_strict=False
    )
    return _lora(kind, use_bdlora=blocks)


def _kasa(kind: str) -> peft.PeftConfig:
    return _lora(kind, kasa_config=peft.tuners.lora.KasaConfig())


def _oft(kind: str, **more: Any) -> peft.PeftConfig:
    return peft.OFTConfig(**{"oft_block_size": 8, "target_modules": targets(kind), **more})


def _boft(kind: str, **more: Any) -> peft.PeftConfig:
    return peft.BOFTConfig(**{"boft_block_size": 8, "target_modules": targets(kind), **more})


def _road(kind: str, variant: str) -> peft.PeftConfig:
    return peft.RoadConfig(variant=variant, group_size=8, target_modules=targets(kind))


def _experts(_: str, **more: Any) -> peft.PeftConfig:
    fields = {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    return peft.LoraConfig(**{**fields, **more})


METHODS: Final[dict[str, Callable[[str], peft.PeftConfig]]] = {
    "lora_pissa": lambda kind: _lora(kind, init_lora_weights="pissa"),
    "lora_pissa_dora": lambda kind: _lora(kind, init_lora_weights="pissa", use_dora=True),
    "lora_olora": lambda kind: _lora(kind, init_lora_weights="olora", use_rslora=True),
    "lora_kasa": _kasa,
    "lora_blocks": _block_diagonal,
    "lora_mica": lambda kind: _lora(kind, init_lora_weights="mica"),
    "lora_orthogonal": lambda kind: _lora(kind, init_lora_weights="orthogonal"),
    "lora_activated": lambda kind: _lora(kind, alora_invocation_tokens=INVOCATION),
    "lora_tokens": lambda kind: _lora(kind, trainable_token_indices=TOKENS),
    "lora_tokens_by_module": lambda kind: _lora(
        kind, trainable_token_indices={embedding(kind): TOKENS, head(kind): TOKENS[1:3]}
    ),
    "lora_tokens_under_head": lambda kind: _lora(
        kind, trainable_token_indices=TOKENS, target_modules=[head(kind), targets(kind)[0]]
    ),
    "lora_parameter": lambda kind: _lora(
        kind,
        target_modules=[targets(kind)[1]],
        target_parameters=[f"{targets(kind)[0]}.weight"],
        rank_pattern={f"{targets(kind)[0]}.weight": 2},
    ),
    "lora_experts": _experts,
    "lora_experts_both": lambda kind: _experts(
        kind,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={"experts.down_proj": 2},
        alpha_pattern={"experts.gate_up_proj": 5},
    ),
    "lora_router": lambda kind: _experts(
        kind,
        target_parameters=["gate.weight" if kind == "mixtral" else "router.weight", "experts.down_proj"],
        rank_pattern={"router.weight": 2, "gate.weight": 2},
        alpha_pattern={"router.weight": 40, "gate.weight": 40},
    ),
    "lora_mixture": lambda kind: _experts(kind, target_modules="all-linear", target_parameters=None),
    "trainable_tokens": lambda _: peft.TrainableTokensConfig(token_indices=TOKENS),
    "trainable_tokens_named": lambda kind: peft.TrainableTokensConfig(
        token_indices=TOKENS, target_modules=[embedding(kind), head(kind)]
    ),
    "oft": _oft,
    "oft_cayley": lambda kind: _oft(kind, use_cayley_neumann=False),
    "oft_constrained": lambda kind: _oft(kind, coft=True, eps=0.8, num_cayley_neumann_terms=3),
    "oft_shared": lambda kind: _oft(kind, oft_block_size=0, r=3, block_share=True, num_cayley_neumann_terms=7),
    "oft_embedding": lambda kind: _oft(kind, target_modules=[embedding(kind), targets(kind)[0]]),
    "oft_bias_only": lambda kind: _oft(kind, bias="oft_only"),
    "boft": _boft,
    "boft_by_number": lambda kind: _boft(kind, boft_block_size=0, boft_block_num=2, bias="all"),
    "road_1": lambda kind: _road(kind, "road_1"),
    "road_2": lambda kind: _road(kind, "road_2"),
    "road_4": lambda kind: _road(kind, "road_4"),
    "beft": lambda kind: peft.BeftConfig(target_modules=targets(kind)),
    "adaption_prompt": lambda _: peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=1),
    "adaption_prompt_everywhere": lambda _: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2),
    "multitask_prompt_tuning": lambda _: peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=4, num_tasks=3, num_ranks=2
    ),
    "cpt": lambda _: peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[9, 30, 12], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]
    ),
    "cartridge": lambda _: peft.CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=1),
}
ONLY: Final[dict[str, tuple[str, ...]]] = {
    "lora_pissa_dora": ("llama", "gpt2", "t5"),
    "lora_olora": WITH_LINEAR,  # of a Conv1D, peft takes the wrong side
    "lora_kasa": WITH_LINEAR,
    "lora_blocks": WITH_LINEAR,
    "lora_mica": ("llama", "gpt2", "t5"),
    "lora_orthogonal": ("llama", "t5"),
    "lora_activated": tuple(kind for kind in DECODERS if kind != "opt"),  # peft takes its flat inputs for one token
    "lora_tokens_by_module": ("llama", "llama_tied", "gpt2", "gemma"),
    "lora_tokens_under_head": ("llama", "llama_tied"),
    "lora_parameter": ("llama", "t5"),
    "lora_experts": ("mixtral", "gpt_oss"),
    "lora_experts_both": ("mixtral", "gpt_oss"),
    "lora_router": ("mixtral", "gpt_oss"),
    "lora_mixture": ("mixtral",),  # peft knows which parameters were linear layers once
    "trainable_tokens_named": ("llama", "neox"),  # where the head shares the weight, peft cannot run it
    **{name: WITH_LINEAR for name in METHODS if name.startswith(("oft", "boft", "road", "beft"))},
    "oft_bias_only": ("opt", "neox", "bart"),
    "boft_by_number": ("opt", "neox", "llama"),
    "adaption_prompt": ("llama", "llama_tied", "mistral", "gpt2"),
    "adaption_prompt_everywhere": ("llama", "mistral", "gpt2"),
    "cpt": DECODERS,
}
