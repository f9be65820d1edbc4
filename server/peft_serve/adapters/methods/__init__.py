"""The served peft types, one small function each, in files by family.

Adding a type is a function with its decorator, and its name in the tuple below.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from peft_serve.adapters.methods.blocks import c3a, lokr
from peft_serve.adapters.methods.by_svd import osf, psoft
from peft_serve.adapters.methods.clusters import adamss
from peft_serve.adapters.methods.entries import shira, supertuning
from peft_serve.adapters.methods.factors import adalora, delora, hra, loha, poly
from peft_serve.adapters.methods.gated_prompts import adaption_prompt
from peft_serve.adapters.methods.joint import frod
from peft_serve.adapters.methods.lora import lora
from peft_serve.adapters.methods.products import glora, hira
from peft_serve.adapters.methods.projected import deft, peanut
from peft_serve.adapters.methods.random_bases import randlora
from peft_serve.adapters.methods.replacement import ln_tuning, trainable_tokens
from peft_serve.adapters.methods.rotations import boft, oft, road
from peft_serve.adapters.methods.scales import beft, ia3
from peft_serve.adapters.methods.sequence import (
    cartridge,
    cpt,
    multitask_prompt_tuning,
    p_tuning,
    prefix_tuning,
    prompt_tuning,
)
from peft_serve.adapters.methods.shared_projections import pvera, vera
from peft_serve.adapters.methods.shared_vectors import tinylora, unilora, vblora
from peft_serve.adapters.methods.spectral import fourierft, waveft
from peft_serve.adapters.methods.tiles import gralora, miss
from peft_serve.adapters.registry import Method

METHODS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        method.peft_type: method
        for method in (
            # by file
            *(c3a, lokr),
            *(osf, psoft),
            *(adamss,),
            *(shira, supertuning),
            *(adalora, delora, hra, loha, poly),
            *(adaption_prompt,),
            *(frod,),
            *(lora,),
            *(glora, hira),
            *(deft, peanut),
            *(randlora,),
            *(ln_tuning, trainable_tokens),
            *(boft, oft, road),
            *(beft, ia3),
            *(cartridge, cpt, multitask_prompt_tuning, p_tuning, prefix_tuning, prompt_tuning),
            *(pvera, vera),
            *(tinylora, unilora, vblora),
            *(fourierft, waveft),
            *(gralora, miss),
        )
    }
)
