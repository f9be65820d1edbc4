"""Loads a base model from a folder or the hub, and proves that it can be served.

Only safetensors files are read and only classes of the transformers library are run. The library's automatic
classes are left aside, since they offer to run code that comes with a model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from peft_serve.adapters.heads import task_of_class
from peft_serve.adapters.primitives import HeadTask
from peft_serve.model.base import ResidentBase
from peft_serve.model.eight_bits import store_in_eight_bits
from peft_serve.model.families.registry import is_encoder, is_encoder_kind, is_known
from peft_serve.model.quantised import OWN, Quantisation, loading_options, settle
from peft_serve.model.self_check import difference, probe, tolerance
from peft_serve.model.weight_files import read_not_mapped

_DEMOS: Final = Path(__file__).parent.parent / "demo"
DEMO_NAMES: Final = ("demo-llama", "demo-t5")
_DEFAULT_REVISION: Final = "main"
_DTYPES: Final = ("auto", "float32", "bfloat16", "float16")

_WITH_HEADS: Final[Mapping[HeadTask, Any]] = {
    HeadTask.SEQUENCE: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    HeadTask.TOKENS: MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    HeadTask.SPANS: MODEL_FOR_QUESTION_ANSWERING_MAPPING,
}

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
    quantisation: str | None = None,
    revision: str | None = None,
    on_progress: Callable[[str], None] = _log.info,
) -> ResidentBase:
    """Load `demo-llama`, `demo-t5`, a folder or a hub id, and check it against itself.

    `quantisation` names a `Quantisation` to load plain weights in; weights that are saved quantised say theirs.
    `revision` is a branch, a tag or a commit of a hub id; `on_progress` is told what happens now, in
    words. Raises `NotServable`.
    """
    on_device = resolve_device(device) if isinstance(device, str) else device
    location = locate(source)
    if revision is not None and Path(location).is_dir():
        raise NotServable(f"--revision {revision}: {source} is a folder; only a hub id has revisions, leave it out")
    on_progress(f"reading the configuration of {source}")
    config = _read_config(source, location, revision)
    on_progress(f"loading the weights of {source}")
    in_dtype = resolve_dtype(dtype, on_device)
    try:
        options = loading_options(config, quantisation, in_dtype, on_device)
    except ValueError as error:
        raise NotServable(f"{source}: {error}") from error
    model = _read_model(source, location, config, in_dtype, options, revision)
    model = _placed(source, model, quantisation, on_device) if not options else model  # a library put it there
    on_progress(f"checking {source} against itself")
    return wrap(model, name=name_of(source), on_progress=on_progress)


def _placed(source: str, model: PreTrainedModel, quantisation: str | None, device: torch.device) -> PreTrainedModel:
    """Plain weights on their device, in 8 bits if that is wanted."""
    if quantisation is None:
        return model.to(device)
    try:
        store_in_eight_bits(model, OWN[Quantisation(quantisation)], device)
    except ValueError as error:
        raise NotServable(f"{source}: {error}") from error
    return model


def name_of(source: str) -> str:
    """What a base is called where nobody says otherwise: its hub id, or its folder's name."""
    return Path(source).name if Path(source).is_dir() else source


def require_configuration(source: str, *, revision: str | None = None) -> None:
    """Find out about a source that is no base before anything is made for it; raises `NotServable`."""
    _read_config(source, locate(source), revision)


def outline(source: str, *, revision: str | None = None) -> PreTrainedModel:
    """The model a source describes, without its weights (torch's meta device): its sites, shapes and size.

    Reads the configuration alone. Raises `NotServable`.
    """
    config = _read_config(source, locate(source), revision)
    mapping = _mapping_for(config)
    if type(config) not in mapping:
        raise NotServable(f"{source}: model type {config.model_type!r} has no class that can be served")
    with torch.device("meta"):
        model: PreTrainedModel = mapping[type(config)]._from_config(config)
    return model.eval()


def wrap(model: PreTrainedModel, *, name: str, on_progress: Callable[[str], None] = _log.info) -> ResidentBase:
    """Make a loaded model resident, unless rows side by side differ from the model alone."""
    kind = model.config.model_type
    model.requires_grad_(False)
    model.eval()
    try:
        settle(model)
    except ValueError as error:
        raise NotServable(f"{name}: {error}") from error
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
            f"{name}: with rows side by side its values differ by {measured:.1e} from the model's own, more "
            f"than the {allowed:.0e} that rounding explains; a model of type {kind!r} "
            f"{'cannot be served in this dtype, try --dtype float32' if is_known(kind) else 'is not supported'}"
        )
    if is_known(kind):
        on_progress(f"{name}: largest difference to the model's own values {measured:.1e}")
    else:
        on_progress(
            f"{name}: this kind of model ({kind}) is not among those tested with peft-serve; "
            f"its values agree to {measured:.1e}"
        )
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


def _read_config(source: str, location: str, revision: str | None = None) -> PreTrainedConfig:
    if (Path(location) / "adapter_config.json").is_file():
        raise NotServable(f"{source} is an adapter, not a base; serve its base and upload it")
    if _is_path(location) and not Path(location).is_dir():
        raise NotServable(f"{source}: there is no such folder; check the path, or name a hub id (org/model)")
    try:
        given: Mapping[str, Any] = PreTrainedConfig.get_config_dict(location, revision=revision or _DEFAULT_REVISION)[0]
    except (OSError, ValueError) as error:
        what = source if revision is None else f"{source} at {revision}"
        raise NotServable(
            f"{what}: no configuration can be read: {_elsewhere(location)}{_first_line(error)}{_offline(location)}"
        ) from error
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


def _read_model(
    source: str,
    location: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    options: Mapping[str, Any],
    revision: str | None,
) -> PreTrainedModel:
    mapping = _mapping_for(config)
    if type(config) not in mapping:
        raise NotServable(
            f"{source}: model type {config.model_type!r} has no language-modelling head in transformers; "
            "use a causal or a sequence-to-sequence language model, or a text encoder"
        )
    try:
        with read_not_mapped():
            model, report = mapping[type(config)].from_pretrained(
                location,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                revision=revision or _DEFAULT_REVISION,
                attn_implementation=_own_attention(config),
                output_loading_info=True,
                **options,
            )
    except ImportError as error:
        raise NotServable(f"{source}: {_first_line(error)}; quantised bases need peft-serve[quantised]") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # the last: cut short, or damaged
        raise NotServable(
            f"{source}: its weights cannot be loaded from safetensors files: {_first_line(error)}{_offline(location)}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing and is_encoder(config) and all(key.startswith("pooler.") for key in missing):
        model.pooler = None  # trained without one: what the library made up here is of no use
        missing = []
    if missing:
        raise NotServable(f"{source}: {len(missing)} weights are missing, {missing[0]} first; the files are incomplete")
    loaded: PreTrainedModel = model
    return loaded


def _mapping_for(config: PreTrainedConfig) -> Any:
    """The library's table of classes to load: with the head of a task, as a body alone, or to generate text."""
    named = next(iter(getattr(config, "architectures", None) or ()), "")
    if config.is_encoder_decoder:
        return MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    if is_encoder_kind(config.model_type) and getattr(config, "is_decoder", False):
        raise NotServable(f"a {config.model_type} model that was made a decoder (is_decoder) is not served")
    task = task_of_class(named)
    if task is not None:
        return _WITH_HEADS[task]
    is_body = type(config) in MODEL_MAPPING and MODEL_MAPPING[type(config)].__name__ == named
    if is_encoder(config) or (is_body and not config.tie_word_embeddings):
        return MODEL_MAPPING
    return MODEL_FOR_CAUSAL_LM_MAPPING


def _own_attention(config: PreTrainedConfig) -> str:
    """The library's attention that a model is measured against: the plain one, but for a Falcon with slopes.

    That one is trained and used with the other, and the plain one adds its slopes twice.
    """
    return "sdpa" if config.model_type == "falcon" and config.alibi else "eager"


def _offline(location: str) -> str:
    """What to know about a hub id that cannot be read where the network is switched off."""
    if not constants.HF_HUB_OFFLINE or Path(location).is_dir():
        return ""
    return " (HF_HUB_OFFLINE is set: what the hub's cache on this machine holds is all there is)"


def _elsewhere(location: str) -> str:
    """What to know about a name that was asked for on the hub because nothing here has it."""
    if Path(location).is_dir():
        return ""
    close = get_close_matches(location.lower(), DEMO_NAMES, n=1)
    return f"no folder here has this name{f' (did you mean {close[0]}?)' if close else ''}; asked for on the hub: "


def _is_path(location: str) -> bool:
    """Whether a source cannot be a hub id."""
    return location.startswith(("/", ".", "~")) or location.count("/") > 1


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
