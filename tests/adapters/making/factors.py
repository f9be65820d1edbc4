"""peft configs of methods that are low-rank factors, however they save them.

`METHODS` maps a method id to a function from the kind of base to the config; `ONLY` the base kinds of those that
do not fit every kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import peft

from tests.adapters.places import embedding, feed_forward, targets

LINEAR: Final = ("llama", "llama_tied", "qwen2", "mistral", "gemma", "opt", "neox", "t5", "bart", "bart_scaled")
"""Kinds without a Conv1D, on which these methods of peft do not act."""


def _vera(kind: str, config: Any = peft.VeraConfig, **more: Any) -> peft.PeftConfig:
    return config(r=8, projection_prng_key=3, target_modules=targets(kind), **more)


def _vblora(kind: str, **more: Any) -> peft.PeftConfig:
    return peft.VBLoRAConfig(**{"r": 3, "num_vectors": 12, "vector_length": 8, "target_modules": targets(kind), **more})


def _unilora(kind: str, **more: Any) -> peft.PeftConfig:
    return peft.UniLoraConfig(r=3, theta_d_length=400, proj_seed=7, target_modules=targets(kind), **more)


def _tinylora(kind: str, **more: Any) -> peft.PeftConfig:
    return peft.TinyLoraConfig(**{"r": 3, "u": 5, "target_modules": targets(kind), **more})


def _gralora(kind: str, **more: Any) -> peft.PeftConfig:
    return peft.GraloraConfig(**{"r": 4, "gralora_k": 2, "alpha": 6, "target_modules": targets(kind), **more})


def _miss(kind: str, **more: Any) -> peft.PeftConfig:
    return peft.MissConfig(**{"r": 6, "target_modules": targets(kind), **more})


def _loha(kind: str, **more: Any) -> peft.PeftConfig:
    return peft.LoHaConfig(**{"r": 3, "alpha": 5, "target_modules": targets(kind), **more})


def _hra(kind: str, **more: Any) -> peft.PeftConfig:
    return peft.HRAConfig(**{"r": 4, "target_modules": targets(kind), **more})


def _poly(kind: str, **more: Any) -> peft.PeftConfig:
    return peft.PolyConfig(r=4, n_tasks=3, n_skills=2, n_splits=2, target_modules=targets(kind), **more)


METHODS: Final[dict[str, Callable[[str], peft.PeftConfig]]] = {
    "adalora": lambda kind: peft.AdaLoraConfig(init_r=6, lora_alpha=9, total_step=10, target_modules=targets(kind)),
    "vera": _vera,
    "vera_unsaved": lambda kind: _vera(kind, save_projection=False),
    "vera_bias": lambda kind: _vera(kind, bias="vera_only"),
    "pvera": lambda kind: _vera(kind, peft.PveraConfig),
    "pvera_unsaved": lambda kind: _vera(kind, peft.PveraConfig, save_projection=False),
    "vblora": _vblora,
    "vblora_topk": lambda kind: _vblora(kind, topk=3, save_only_topk_weights=True),
    "vblora_many": lambda kind: _vblora(kind, num_vectors=300, save_only_topk_weights=True),
    "vblora_one": lambda kind: _vblora(kind, topk=1, save_only_topk_weights=True),
    "unilora": _unilora,
    "unilora_saved": lambda kind: _unilora(kind, save_indices=True),
    "unilora_bias": lambda kind: _unilora(kind, bias="unilora_only"),
    "tinylora": _tinylora,
    "tinylora_tied": lambda kind: _tinylora(kind, weight_tying=0.4, save_projection=False),
    "tinylora_embedding": lambda kind: _tinylora(
        kind, target_modules=[embedding(kind), feed_forward(kind)], save_projection=False
    ),
    "delora": lambda kind: peft.DeloraConfig(
        r=4,
        delora_lambda=12,
        target_modules=targets(kind),
        rank_pattern={targets(kind)[0]: 2},
        lambda_pattern={targets(kind)[0]: 9},
    ),
    "gralora": _gralora,
    "gralora_hybrid": lambda kind: _gralora(kind, hybrid_r=3),
    "gralora_dense": lambda kind: _gralora(kind, r=16, gralora_k=4, hybrid_r=1),
    "miss": _miss,
    "miss_large": lambda kind: _miss(kind, r=31, init_weights=False),
    "miss_mini": lambda kind: _miss(kind, init_weights="mini", mini_r=4),
    "miss_bat": lambda kind: _miss(kind, r=8, init_weights="bat"),
    "poly": _poly,
    "loha": _loha,
    "loha_dense": lambda kind: _loha(kind, r=6),
    "loha_pattern": lambda kind: _loha(kind, rank_pattern={targets(kind)[0]: 2}, alpha_pattern={targets(kind)[1]: 3}),
    "hra": _hra,
    "hra_gs": lambda kind: _hra(kind, apply_GS=True),
    "hra_dense": lambda kind: _hra(kind, r=30),
}
_ON_LINEAR: Final = ("delora", "miss", "poly", "loha", "hra")
ONLY: Final[dict[str, tuple[str, ...]]] = {
    **{name: LINEAR for name in METHODS if name.startswith(_ON_LINEAR)},
    "poly": tuple(kind for kind in LINEAR if kind != "opt"),  # whose feed-forward flattens the batch; peft fails on it
}
