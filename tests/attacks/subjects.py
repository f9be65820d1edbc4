"""One honest checkpoint for each served type: what the attacks start from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

METHOD_OF: Final[Mapping[str, str]] = MappingProxyType(
    {
        "ADAMSS": "adamss",
        "C3A": "c3a",
        "DEFT": "deft",
        "FOURIERFT": "fourierft",
        "FROD": "frod",
        "GLORA": "glora",
        "HIRA": "hira",
        "LOKR": "lokr",
        "OSF": "osf",
        "PEANUT": "peanut",
        "PSOFT": "psoft",
        "RANDLORA": "randlora",
        "SHIRA": "shira",
        "SUPERTUNING": "supertuning_supra",
        "WAVEFT": "waveft_patterns",
        "ADALORA": "adalora",
        "DELORA": "delora",
        "GRALORA": "gralora_hybrid",
        "HRA": "hra",
        "LOHA": "loha",
        "MISS": "miss",
        "POLY": "poly",
        "PVERA": "pvera",
        "TINYLORA": "tinylora",
        "UNILORA": "unilora",
        "VBLORA": "vblora_topk",
        "VERA": "vera",
        "ADAPTION_PROMPT": "adaption_prompt",
        "BEFT": "beft",
        "BOFT": "boft",
        "CARTRIDGE": "cartridge",
        "CPT": "cpt",
        "MULTITASK_PROMPT_TUNING": "multitask_prompt_tuning",
        "OFT": "oft",
        "ROAD": "road_4",
        "TRAINABLE_TOKENS": "trainable_tokens",
        "LORA": "lora",
        "IA3": "ia3",
        "LN_TUNING": "ln_tuning",
        "PROMPT_TUNING": "prompt_tuning",
        "P_TUNING": "p_tuning",
        "PREFIX_TUNING": "prefix_tuning",
    }
)
"""The id of a checkpoint in `tests.adapters.checkpoints`, by peft type."""

_UNCONTRADICTED: Final[Mapping[str, tuple[str, ...]]] = {
    "ADALORA": ("lora_alpha",),
    "DEFT": ("alpha", "decomposition_method"),
    "FOURIERFT": ("random_loc_seed", "scaling"),
    "GRALORA": ("alpha",),
    "HRA": ("apply_GS",),
    "LOHA": ("alpha", "alpha_pattern"),
    "LOKR": ("alpha", "alpha_pattern"),
    "LORA": ("alora_invocation_tokens", "alpha_pattern", "init_lora_weights", "lora_alpha", "use_rslora"),
    "OFT": ("coft", "eps", "num_cayley_neumann_terms", "use_cayley_neumann"),
    "PEANUT": ("act_fn", "scaling"),
    "PSOFT": ("ab_svd_init", "cayley_neumann_eps", "num_cayley_neumann_terms", "use_cayley_neumann"),
    "RANDLORA": ("randlora_alpha",),
    "ROAD": ("group_size",),
    "SUPERTUNING": ("lora_alpha",),
    "TRAINABLE_TOKENS": ("token_indices",),
    "UNILORA": ("layers_to_transform", "proj_seed", "r", "target_modules"),  # it saves one vector
    "WAVEFT": ("random_loc_seed", "scaling", "use_idwt", "wavelet_family"),
}
UNCONTRADICTED: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {peft_type: frozenset(_UNCONTRADICTED.get(peft_type, ())) for peft_type in METHOD_OF}
)
"""Fields of a config that no tensor of these checkpoints can contradict: another value is another adapter, and as good
a one. Whatever else is let in must compile to the very bits of the honest one."""
