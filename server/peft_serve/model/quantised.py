"""Weights stored in fewer bits: our own (8 bits), of bitsandbytes (4 and 8 bits) and of torchao.

Knows how a quantised Linear keeps its weight: the shape it stands for, the matrix it multiplies by, the tensors it
consists of. The products stay the modules' own, so that an adapter trained on a quantised base (QLoRA,
arXiv:2305.14314) meets the numbers it was trained with. Both libraries are optional (`peft-serve[quantised]`) and
imported when a module of theirs is met. Knows no site and no adapter.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, TorchAoConfig

from peft_serve.kernels.eight_bits import Code
from peft_serve.model.eight_bits import EightBitLinear
from peft_serve.model.packed_weight import PackedWeight

SERVED: Final = ("bitsandbytes", "torchao")
"""Values of `quantization_config.quant_method` whose weights can be read back."""

_TORCHAO_KINDS: Final = re.compile(r'"_type": "(\w+Config)"')
_INSTALL: Final = "install peft-serve[quantised]"
_INT8_STEP: Final = 1 / 127  # of a row's largest value, in an int8 weight of bitsandbytes
_INT8_LOG: Final = "bitsandbytes.autograd._functions"


class Quantisation(StrEnum):
    """How a base is quantised while it is loaded: by itself, or by a library."""

    INT8 = "int8"
    FP8 = "fp8"
    BNB_NF4 = "bnb-nf4"
    BNB_INT8 = "bnb-int8"
    TORCHAO_INT8 = "torchao-int8wo"


OWN: Final = {Quantisation.INT8: Code.INT8, Quantisation.FP8: Code.FP8}
"""The kinds that need no library: plain weights are read, and then brought to 8 bits (`eight_bits`)."""


def quantisation_config(kind: Quantisation, dtype: torch.dtype) -> Any:
    """What transformers is given to quantise a base that computes in `dtype`. ImportError without the library."""
    assert kind not in OWN, "our own kinds are no library's"
    if kind is Quantisation.TORCHAO_INT8:
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    import bitsandbytes  # noqa: F401  # transformers would say the same later and at greater length

    if kind is Quantisation.BNB_NF4:
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


def _saved(config: PreTrainedConfig) -> Mapping[str, Any] | None:
    """How a base was saved, if its weights are quantised."""
    given = getattr(config, "quantization_config", None)
    if given is None or isinstance(given, Mapping):
        return given
    written: Mapping[str, Any] = given.to_dict()
    return written


def loading_options(
    config: PreTrainedConfig, wanted: str | None, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """What `from_pretrained` is told beside the rest; empty where it reads plain weights.

    `wanted` is how the base is to be quantised now. ValueError says what does not go together or is not there.
    """
    given = _saved(config)
    if given is None and wanted is None:
        return {}
    method = None if given is None else given.get("quant_method")
    saved = None if method is None else str(getattr(method, "value", method))
    if saved is not None and saved not in SERVED:
        raise ValueError(
            f"its weights are quantised with {saved}; served are {' and '.join(SERVED)}, and plain weights"
        )
    if saved is not None and wanted is not None:
        raise ValueError(f"its weights are quantised with {saved} already; leave --quantisation out")
    rounding = next((name for name in _TORCHAO_KINDS.findall(json.dumps(given, default=str)) if _acts(name)), None)
    if rounding is not None:
        raise ValueError(
            f"its weights are quantised with {rounding}, which rounds activations too, and may do so for all rows of "
            "a batch together; served are the weight-only kinds of torchao"
        )
    on_device = {"device_map": {"": str(device)}}
    if wanted is None:
        return on_device
    if Quantisation(wanted) in OWN:
        return {}
    try:
        return {"quantization_config": quantisation_config(Quantisation(wanted), dtype), **on_device}
    except ImportError as error:
        raise ValueError(f"--quantisation {wanted} needs a library that is not here ({error}); {_INSTALL}") from error


def quantisation_of(config: PreTrainedConfig, wanted: str | None) -> str | None:
    """What a loaded base's weights are stored in, in a word: `wanted` at its start, or as it was saved; None: plain."""
    given = _saved(config)
    if wanted is not None or given is None:
        return wanted
    method = given.get("quant_method")
    if given.get("load_in_4bit"):
        return f"bnb-{given.get('bnb_4bit_quant_type', 'fp4')}"
    return Quantisation.BNB_INT8.value if given.get("load_in_8bit") else str(getattr(method, "value", method))


def _acts(kind: str) -> bool:
    """Whether a kind of torchao's acts on more than weights."""
    return "WeightOnly" not in kind and "FqnTo" not in kind  # the latter names a kind for each module


def settle(model: nn.Module) -> None:
    """Make the modules of a loaded base leave their weights, and each other's rows, alone.

    4 bits: on a CPU with AVX512-BF16 the first product would lay the weight out anew and round its scales to
    bfloat16. 8 bits: LLM.int8 (arXiv:2208.07339) takes out the columns in which any row of the batch has a large
    value, so that what one row gets depends on the rows beside it; ValueError where that is switched on.
    """
    for path, module in model.named_modules():
        if _is_4bit(module):
            module.support_avx512bf16_for_cpu = False
        if not _is_8bit(module):
            continue
        logging.getLogger(_INT8_LOG).setLevel(logging.ERROR)  # else a line for every product in float32
        if module.state.threshold > 0:
            raise ValueError(
                f"{path} is quantised to 8 bits with llm_int8_threshold {module.state.threshold}, with which a "
                "request's answer depends on the requests beside it; set llm_int8_threshold to 0.0 in the "
                "quantization_config of its config.json"
            )


def is_quantised(module: nn.Module) -> bool:
    """Whether the module's weight is stored in fewer bits than it stands for."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    return not weight.is_floating_point() or type(weight) not in (Tensor, nn.Parameter, PackedWeight)


def logical_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape each of the module's own parameters stands for; a packed weight's is not that of its storage."""
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    if _is_4bit(module):
        shapes["weight"] = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
    return shapes


def num_parameters(model: nn.Module) -> int:
    """How many numbers the model stands for, two of which lie in one byte where they have 4 bits."""
    packed = {id(m.weight): int(m.out_features * m.in_features) for m in model.modules() if _is_4bit(m)}  # type: ignore[operator]
    return sum(packed.get(id(p), p.numel()) for p in model.parameters())


def dense(module: nn.Module, name: str) -> Tensor:
    """A parameter in float32, as the module uses it: a quantised weight is the matrix it multiplies by."""
    tensor = getattr(module, name)
    assert isinstance(tensor, Tensor), f"{type(module).__name__} has no tensor {name!r}"
    if name != "weight" or not is_quantised(module):
        return tensor.detach().float()
    if isinstance(module, EightBitLinear):
        return module.matrix()
    if _is_4bit(module):
        from bitsandbytes.functional import dequantize_4bit

        matrix: Tensor = dequantize_4bit(tensor.data, getattr(tensor, "quant_state"))  # noqa: B009
        return matrix.float()
    if _is_8bit(module):
        return tensor.data.float() * (_row_scales(module).float()[:, None] * _INT8_STEP)
    return tensor.detach().dequantize().float()


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every plain tensor that the model's parameters and buffers consist of, by name; packed ones as they are."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield from ((name, tensor),) if isinstance(tensor, PackedWeight) else _plain(name, tensor.detach())
    for path, module in model.named_modules():
        if _is_4bit(module):
            state = module.weight.quant_state.as_dict(packed=False)
            yield from ((f"{path}.weight.{key}", part) for key, part in state.items() if isinstance(part, Tensor))
        elif _is_8bit(module):
            yield f"{path}.weight.SCB", _row_scales(module)


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors a wrapper holds (torchao's), or the tensor itself."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor.data.as_subclass(Tensor)
        return
    for part in flatten()[0]:
        yield from _plain(f"{name}.{part}", getattr(tensor, part))


def _row_scales(module: Any) -> Tensor:
    """The largest value of each row of an int8 weight; it moves from weight to module at the first product."""
    scales: Tensor = module.state.SCB if module.state.SCB is not None else module.weight.SCB
    return scales


def _is_4bit(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def _is_8bit(module: nn.Module) -> bool:
    return hasattr(getattr(module, "weight", None), "SCB")
