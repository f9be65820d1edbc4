"""Loads a base model from a folder or the hub, and proves that it can be served.

Only safetensors files are read and only classes of the transformers library are run. The library's automatic
classes are left aside, since they offer to run code that comes with a model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from peft_serve.model.base import ResidentBase
from peft_serve.model.families.registry import is_known
from peft_serve.model.self_check import difference, probe, tolerance

_DEMOS: Final = Path(__file__).parent.parent / "demo"
DEMO_NAMES: Final = ("demo-llama", "demo-t5")
_DTYPES: Final = ("auto", "float32", "bfloat16", "float16")

_log = logging.getLogger(__name__)


class NotServable(ValueError):  # noqa: N818  named as a refusal, like those of `errors`
    """This source cannot be served as a base; the message says why and what can be done."""


def resolve_device(name: str) -> torch.device:
    """The device a setting means; `auto` is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise NotServable("device cuda was asked for and this machine offers none; use --device cpu")
    return torch.device(name)


def resolve_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype a setting means; `auto` is float32 on a CPU and bfloat16 on CUDA."""
    if isinstance(name, torch.dtype):
        return name
    if name not in _DTYPES:
        raise NotServable(f"dtype {name!r} is not one of {', '.join(_DTYPES)}")
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_base(
    source: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    on_progress: Callable[[str], None] = _log.info,
) -> ResidentBase:
    """Load `demo-llama`, `demo-t5`, a folder or a hub id, and check it against itself.

    `on_progress` is told what happens now, in words. Raises `NotServable`.
    """
    on_device = resolve_device(device) if isinstance(device, str) else device
    location = locate(source)
    on_progress(f"reading the configuration of {source}")
    config = _read_config(source, location)
    on_progress(f"loading the weights of {source}")
    model = _read_model(source, location, config, resolve_dtype(dtype, on_device)).to(on_device)
    on_progress(f"checking {source} against itself")
    return wrap(model, name=Path(source).name if Path(source).is_dir() else source, on_progress=on_progress)


def wrap(model: PreTrainedModel, *, name: str, on_progress: Callable[[str], None] = _log.info) -> ResidentBase:
    """Make a loaded model resident, unless rows side by side differ from the model alone."""
    kind = model.config.model_type
    model.requires_grad_(False)
    model.eval()
    try:
        probes = probe(model)
        base = ResidentBase(model, name=name)
        measured = difference(base, probes)
    except (ValueError, TypeError, AttributeError, RuntimeError, LookupError) as error:
        if is_known(kind):
            raise
        raise NotServable(f"{name}: a model of type {kind!r} is not supported: {error}") from error
    allowed = tolerance(base.dtype)
    if not measured <= allowed:
        raise NotServable(
            f"{name}: with rows side by side its logits differ by {measured:.1e} from the model's own, more "
            f"than the {allowed:.0e} that rounding explains; a model of type {kind!r} "
            f"{'cannot be served in this dtype, try --dtype float32' if is_known(kind) else 'is not supported'}"
        )
    on_progress(f"{name}: largest difference to the model's own logits {measured:.1e}")
    return base


def locate(source: str) -> str:
    """Where the files of a source are: a folder for a demo base, the source itself for anything else."""
    if source not in DEMO_NAMES:
        return source
    folder = _DEMOS / source
    if not folder.is_dir():
        raise NotServable(
            f"{source} is not part of this installation (a wheel carries demo-llama alone); "
            "run from a checkout of the repository, or serve a folder or a hub id"
        )
    return str(folder)


def _read_config(source: str, location: str) -> PreTrainedConfig:
    if (Path(location) / "adapter_config.json").is_file():
        raise NotServable(f"{source} is an adapter, not a base; serve its base and upload it")
    try:
        given: Mapping[str, Any] = PreTrainedConfig.get_config_dict(location)[0]
    except (OSError, ValueError) as error:
        raise NotServable(f"{source}: no configuration can be read: {_first_line(error)}") from error
    kind = given.get("model_type")
    if kind is None:
        raise NotServable(f"{source}: no configuration with a model_type; name a folder with a config.json")
    if kind not in CONFIG_MAPPING:
        raise NotServable(
            f"{source}: model type {kind!r} is not in this version of transformers; models that bring their "
            "own code are not run"
        )
    config: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(dict(given))
    return config


def _read_model(source: str, location: str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        raise NotServable(
            f"{source}: model type {config.model_type!r} has no language-modelling head in transformers; "
            "use a causal or a sequence-to-sequence language model"
        )
    try:
        model, report = mapping[type(config)].from_pretrained(
            location,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise NotServable(
            f"{source}: its weights cannot be loaded from safetensors files: {_first_line(error)}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise NotServable(f"{source}: {len(missing)} weights are missing, {missing[0]} first; the files are incomplete")
    loaded: PreTrainedModel = model
    return loaded


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
