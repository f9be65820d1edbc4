"""Bounds that a checkpoint must respect before and after it is compiled.

The operator sets the first three; the others keep the gate's own work small and seldom need a change.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GateLimits:
    """Sizes in bytes; `max_adapter_bytes` holds for the uploaded file and for the compiled adapter alike."""

    max_rank: int = 256
    max_adapter_bytes: int = 512 * MIB
    max_virtual_tokens: int = 1024
    max_compile_tflop: int = 100  # 10^12 operations each
    max_new_tokens: int = 1 << 20  # that an adapter's own default parameters may ask for
    max_tensors: int = 20_000
    max_config_bytes: int = 512 * 1024  # AdaLoRA writes a line for every rank that training began with
    max_header_bytes: int = 1 * MIB
    max_profile_bytes: int = 16 * 1024
    max_abs: float = 65504.0  # the largest finite float16: beyond it no trained adapter has a value
