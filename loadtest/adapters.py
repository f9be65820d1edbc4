"""Adapters: random PEFT checkpoints of every kind the load tests use, made in bulk.

peft builds one checkpoint of each kind for a base without weights, as a template; every adapter is then the
template's config with tensors of its own. No tensor is zero (a fresh LoRA has B = 0 and changes nothing), and
all stay small, so that the adapted model remains well behaved.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

Kind = Literal["lora", "ia3", "prompt", "prefix"]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterKind:
    """One kind of checkpoint: `size` is LoRA's rank or the number of virtual tokens; IA3 has none."""

    kind: Kind
    size: int = 0
    targets: tuple[str, ...] = ()

    def peft_config(self) -> PeftConfig:
        """peft's config for it."""
        match self.kind:
            case "lora":
                return LoraConfig(
                    r=self.size, lora_alpha=2 * self.size, target_modules=list(self.targets), task_type="CAUSAL_LM"
                )
            case "ia3":
                places = ["k_proj", "v_proj", "down_proj"]
                return IA3Config(target_modules=places, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
            case "prompt":
                return PromptTuningConfig(num_virtual_tokens=self.size, task_type="CAUSAL_LM")
            case "prefix":
                return PrefixTuningConfig(num_virtual_tokens=self.size, task_type="CAUSAL_LM")


def mixture(name: str, *, targets: tuple[str, ...] = ATTENTION + FEED_FORWARD) -> tuple[AdapterKind, ...]:
    """The kinds that a population takes in turn: ``S1`` (LoRA, rank 8), ``S2`` (LoRA, ranks 64, 32, 16, 8),
    ``MIX`` (two LoRAs, IA3, prompt, prefix), ``lora:R``, ``ia3``, ``prompt:N`` or ``prefix:N``."""
    kind, _, size = name.partition(":")
    match kind:
        case "S1":
            return (AdapterKind(kind="lora", size=8, targets=targets),)
        case "S2":
            return tuple(AdapterKind(kind="lora", size=rank, targets=targets) for rank in (64, 32, 16, 8))
        case "MIX":
            return (
                AdapterKind(kind="lora", size=8, targets=ATTENTION),
                AdapterKind(kind="lora", size=16, targets=ATTENTION + FEED_FORWARD),
                AdapterKind(kind="ia3"),
                AdapterKind(kind="prompt", size=20),
                AdapterKind(kind="prefix", size=20),
            )
        case "lora":
            return (AdapterKind(kind="lora", size=_size(name, size or "8"), targets=targets),)
        case "ia3":
            return (AdapterKind(kind="ia3"),)
        case "prompt":
            return (AdapterKind(kind="prompt", size=_size(name, size or "20")),)
        case "prefix":
            return (AdapterKind(kind="prefix", size=_size(name, size or "20")),)
    raise ValueError(f"adapter mixture {name!r} is not known; write S1, S2, MIX, lora:R, ia3, prompt:N or prefix:N")


def _size(name: str, size: str) -> int:
    if not size.isdecimal() or int(size) == 0:
        raise ValueError(f"adapter mixture {name!r}: {size!r} is no size; write a whole number from 1 on")
    return int(size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """What all checkpoints of a kind share: the config file's content and the tensors' shapes."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def make_template(base: Path, kind: AdapterKind) -> Template:
    """Ask peft what a checkpoint of this kind holds for the base in folder `base`; no weights are read."""
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)), kind.peft_config())
    if kind.kind in ("prompt", "prefix"):  # peft copies these when it saves, which weightless tensors refuse
        tensors = {"prompt_embeddings": model.prompt_encoder["default"].embedding.weight}
    else:
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    config = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=_jsonable))
    config |= {"base_model_name_or_path": base.name, "inference_mode": True}
    return Template(config=config, shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()})


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Tensors as a short training might leave them: IA3's scales near one, everything else small."""
    spread = 0.1
    if "lora_A" in name:
        spread = float(shape[-1]) ** -0.5
    elif "lora_B" in name:
        spread = 0.02
    return torch.randn(shape, generator=generator) * spread + (1.0 if "ia3_" in name else 0.0)


def adapter_name(number: int) -> str:
    """The name of the adapter with this number in a population."""
    return f"a{number:05d}"


def make_adapters(
    base: Path, folder: Path, kinds: tuple[AdapterKind, ...], count: int, *, dtype: torch.dtype = torch.float32
) -> Iterator[Path]:
    """Make adapters 0 .. count - 1 for `base` under `folder`, taking `kinds` in turn, and yield each one's
    folder. Adapter i is the same whatever the count; those that are there already are left as they are."""
    templates: dict[AdapterKind, Template] = {}
    for number in range(count):
        kind, target = kinds[number % len(kinds)], folder / adapter_name(number)
        if not (target / "adapter_config.json").exists():
            if kind not in templates:
                templates[kind] = make_template(base, kind)
            _write(templates[kind], target, torch.Generator().manual_seed(number), dtype)
        yield target


def _write(template: Template, folder: Path, generator: torch.Generator, dtype: torch.dtype) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: random_tensor(name, shape, generator).to(dtype) for name, shape in template.shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(template.config, indent=2, sort_keys=True))
