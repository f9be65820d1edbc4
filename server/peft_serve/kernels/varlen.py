"""torch's own attention over blocks of keys and values, where this machine has it (`torch.nn.attention.varlen`).

It takes block tables from torch 2.12 on, and only while FlashAttention-3 (arXiv:2407.08608) is what computes it: a
package of its own, for GPUs of compute capability 9 alone. Knows neither rows nor plans.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor

BACKEND: Final = "FA3"
_PACKAGE: Final = "flash_attn_interface"
_CAPABILITY: Final = 9  # the major number

DTYPES: Final = (torch.bfloat16, torch.float16)
LARGEST_HEAD: Final = 256

VarlenAttend = Callable[..., Tensor]
"""`torch.nn.attention.varlen.varlen_attn`, as it is from torch 2.12 on."""


class NoVarlen(RuntimeError):  # noqa: N818  named as what is the matter
    """It cannot be had here; the message says why."""


class Varlen:
    """torch's attention, switched to the backend that reads blocks. The switch holds for the whole process, so it is
    thrown back (`close`) where the attention is not used."""

    def __init__(self, attend: VarlenAttend, close: Callable[[], None]) -> None:
        self.attend = attend
        self.close = close


def varlen_function() -> VarlenAttend:
    """torch's function, if it takes block tables. Raises `NoVarlen`."""
    try:
        attend: VarlenAttend = import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError) as error:
        raise NoVarlen(f"torch {torch.__version__} has no varlen_attn") from error
    if "block_table" not in inspect.signature(attend).parameters:
        raise NoVarlen(f"varlen_attn of torch {torch.__version__} takes no block table; that of 2.12 does")
    return attend


def open_varlen(device: torch.device) -> Varlen:
    """Have torch read blocks on this device. Raises `NoVarlen`."""
    attend = varlen_function()
    if device.type != "cuda":
        raise NoVarlen("it is for GPUs")
    if torch.cuda.get_device_capability(device)[0] != _CAPABILITY:
        raise NoVarlen(f"FlashAttention-3 is for compute capability {_CAPABILITY}.0")
    if find_spec(_PACKAGE) is None:
        raise NoVarlen(f"FlashAttention-3 ({_PACKAGE}) is not installed, and block tables take it")
    switches: Any = import_module("torch.nn.attention")
    try:
        switches.activate_flash_attention_impl(BACKEND)
    except Exception as error:  # a package of somebody else's has many ways not to load
        raise NoVarlen(f"FlashAttention-3 does not load ({type(error).__name__}: {error})") from error
    return Varlen(attend, switches.restore_flash_attention_impl)
