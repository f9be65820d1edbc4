"""The served peft types, one small function each, in files by family.

Adding a type is a function with its decorator, and its name in the tuple below.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from peft_serve.adapters.methods.low_rank import lora
from peft_serve.adapters.methods.replacement import ln_tuning
from peft_serve.adapters.methods.scales import ia3
from peft_serve.adapters.methods.sequence import p_tuning, prefix_tuning, prompt_tuning
from peft_serve.adapters.registry import Method

METHODS: Final[Mapping[str, Method]] = MappingProxyType(
    {method.peft_type: method for method in (lora, ia3, ln_tuning, prompt_tuning, p_tuning, prefix_tuning)}
)
