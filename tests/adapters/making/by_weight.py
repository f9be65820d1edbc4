"""peft configs of methods that change the weight itself: by its own values, by a matrix, by single entries.

`METHODS` maps a method id to a function from the kind of base to the config; `ONLY` the base kinds of those that
do not fit every kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import peft

from tests.adapters.places import embedding, head, targets


def _maker(config: Callable[..., peft.PeftConfig], **fields: Any) -> Callable[[str], peft.PeftConfig]:
    return lambda kind: config(**{"target_modules": targets(kind), **fields})


def _hira_everywhere(kind: str) -> peft.PeftConfig:
    return peft.HiraConfig(r=3, target_modules=[embedding(kind), head(kind), targets(kind)[0]])


def _lokr_patterns(kind: str) -> peft.PeftConfig:
    first, second = targets(kind)[:2]
    return peft.LoKrConfig(
        r=2, alpha=6, target_modules=targets(kind), rank_pattern={first: 1}, alpha_pattern={second: 3}
    )


def _c3a_patterns(kind: str) -> peft.PeftConfig:
    return peft.C3AConfig(block_size=8, target_modules=targets(kind), block_size_pattern={targets(kind)[0]: 4})


def _waveft_patterns(kind: str) -> peft.PeftConfig:
    return peft.WaveFTConfig(
        n_frequency=40, target_modules=targets(kind), n_frequency_pattern={targets(kind)[1]: 25}, scaling=5.0
    )


def _osf_patterns(kind: str) -> peft.PeftConfig:
    return peft.OSFConfig(
        effective_rank=0.25, target_modules=targets(kind), rank_pattern={targets(kind)[0]: 12, "no_such_module": 1}
    )


_EVERYWHERE: Final[dict[str, Callable[[str], peft.PeftConfig]]] = {
    "deft": _maker(peft.DeftConfig, r=4),
    "fourierft": _maker(peft.FourierFTConfig, n_frequency=50, scaling=60.0),
    "waveft": _maker(peft.WaveFTConfig, n_frequency=60, wavelet_family="sym4", scaling=5.0),
    "randlora": _maker(peft.RandLoraConfig, r=5, randlora_alpha=1),
    "hira": _maker(peft.HiraConfig, r=4),
    "frod": _maker(peft.FrodConfig, sparse_rate=0.05, progressbar=False),
}
_VARIANTS: Final[dict[str, Callable[[str], peft.PeftConfig]]] = {
    "deft_qr": _maker(peft.DeftConfig, r=4, decomposition_method="qr", alpha=6),
    "deft_para": _maker(peft.DeftConfig, r=4, decomposition_method="qr", para=True),
    "deft_bias_all": _maker(peft.DeftConfig, r=4, bias="all"),
    "fourierft_bias_only": _maker(peft.FourierFTConfig, n_frequency=50, scaling=60.0, bias="fourier_only"),
    "waveft_proportional": _maker(peft.WaveFTConfig, n_frequency=60, proportional_parameters=True, scaling=5.0),
    "waveft_sparse": _maker(peft.WaveFTConfig, n_frequency=60, use_idwt=False, scaling=5.0),
    "waveft_patterns": _waveft_patterns,
    "randlora_unsaved": _maker(peft.RandLoraConfig, r=5, randlora_alpha=1, save_projection=False),
    "randlora_sparse": _maker(peft.RandLoraConfig, r=4, randlora_alpha=1, save_projection=False, sparse=True),
    "randlora_very_sparse": _maker(peft.RandLoraConfig, r=4, randlora_alpha=1, save_projection=False, very_sparse=True),
    "hira_everywhere": _hira_everywhere,
    "frod_diagonal": _maker(peft.FrodConfig, sparse_rate=0.0, progressbar=False),
}
_LINEAR: Final[dict[str, Callable[[str], peft.PeftConfig]]] = {
    "psoft": _maker(peft.PsoftConfig, r=4, psoft_alpha=8),
    "osf": _maker(peft.OSFConfig),
    "peanut": _maker(peft.PeanutConfig, r=4),
    "adamss": _maker(peft.AdamssConfig, r=8, num_subspaces=3, subspace_rank=2, random_seed=5),
    "lokr": _maker(peft.LoKrConfig, r=3, alpha=6),
    "shira": _maker(peft.ShiraConfig, r=2, random_seed=3),
    "supertuning": _maker(peft.SupertuningConfig, sparsity=0.9),
    "c3a": _maker(peft.C3AConfig, block_size=8),
    "glora": _maker(peft.GloraConfig, r=3),
}
_LINEAR_VARIANTS: Final[dict[str, Callable[[str], peft.PeftConfig]]] = {
    "psoft_pissa": _maker(peft.PsoftConfig, r=4, ab_svd_init="pissa_init", psoft_mag_a=False),
    "psoft_plain": _maker(peft.PsoftConfig, r=4, psoft_orth=False, psoft_mag_b=False),
    "psoft_neumann": _maker(peft.PsoftConfig, r=4, use_cayley_neumann=True, cayley_neumann_eps=0.4),
    "psoft_single": _maker(peft.PsoftConfig, r=1),
    "osf_patterns": _osf_patterns,
    "osf_nothing_left": _maker(peft.OSFConfig, effective_rank=16),  # v_proj of Llama keeps all it has
    "peanut_deep": _maker(peft.PeanutConfig, r=4, depth=2, act_fn="gelu_new", scaling=1.5),
    "adamss_dynamic": _maker(peft.AdamssConfig, r=8, num_subspaces=4, subspace_rank=4, use_dynamic_rank=True),
    "lokr_both": _maker(peft.LoKrConfig, r=1, alpha=2, decompose_both=True, decompose_factor=8),
    "lokr_whole": _maker(peft.LoKrConfig, r=16, alpha=8),
    "lokr_patterns": _lokr_patterns,
    "supertuning_bottom": _maker(
        peft.SupertuningConfig, sparsity=0.9, select_top=False, save_precomputed_indices=False
    ),
    "supertuning_supra": _maker(peft.SupertuningConfig, sparsity=0.95, r=3, lora_alpha=5),
    "c3a_patterns": _c3a_patterns,
    "glora_vector": _maker(peft.GloraConfig, r=3, config_A_B="vector", config_C="vector", config_D_E="vector"),
    "glora_constant": _maker(peft.GloraConfig, r=3, config_A_B="constant", config_C="none", config_D_E="constant"),
}
_BIASED: Final[dict[str, Callable[[str], peft.PeftConfig]]] = {
    "adamss_biased": _LINEAR["adamss"],
    "glora_biased": _LINEAR["glora"],
    "glora_biased_vector": _LINEAR_VARIANTS["glora_vector"],
    "glora_biased_constant": _LINEAR_VARIANTS["glora_constant"],
    "glora_biased_only": _maker(peft.GloraConfig, r=3, config_A_B="none", config_D_E="vector"),
}

METHODS: Final[dict[str, Callable[[str], peft.PeftConfig]]] = {
    **_EVERYWHERE,
    **_VARIANTS,
    **_LINEAR,
    **_LINEAR_VARIANTS,
    **_BIASED,
}
# peft wraps no Conv1D in these, so none of GPT-2.
_WITHOUT_CONV1D: Final = (
    "llama",
    "llama_tied",
    "qwen2",
    "mistral",
    "gemma",
    "opt",
    "neox",
    "t5",
    "bart",
    "bart_scaled",
)
ONLY: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(_VARIANTS, ("llama", "gpt2", "t5")),
    **dict.fromkeys(_LINEAR, _WITHOUT_CONV1D),
    **dict.fromkeys(_LINEAR_VARIANTS, ("llama", "t5")),
    **dict.fromkeys(_BIASED, ("opt", "neox")),  # where every linear layer has a bias
}
