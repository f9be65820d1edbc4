"""The golden checkpoints on this library's side: read by the gate, compiled, and run on a plain transformers model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor

from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import Inspected, inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.primitives import Adapter
from peft_serve.adapters.records import (
    CONFIG_FILE,
    HEAD_CONFIG_FILE,
    HEAD_WEIGHTS_FILE,
    HUB_WEIGHTS_FILE,
    CheckpointFiles,
)
from peft_serve.core import AdapterId
from peft_serve.model.base import ResidentBase
from peft_serve.model.extents import Extent
from peft_serve.model.routing import Stream
from peft_serve.model.sites import AdaptedSites
from tests.adapters.adapterhub.bases import NUM_TOKENS, SEQ2SEQ, answer, base_model, inputs

GOLDEN: Final = Path(__file__).parent / "golden"
LIMITS: Final = GateLimits()


def files_of(family: str, form: str) -> CheckpointFiles:
    folder = GOLDEN / family / form
    has_head = (folder / HEAD_CONFIG_FILE).exists()
    return CheckpointFiles(
        config=(folder / CONFIG_FILE).read_bytes(),
        weights=(folder / HUB_WEIGHTS_FILE).read_bytes(),
        head_config=(folder / HEAD_CONFIG_FILE).read_bytes() if has_head else None,
        head_weights=(folder / HEAD_WEIGHTS_FILE).read_bytes() if has_head else None,
    )


def forms_of(family: str) -> list[str]:
    folders = (path.name for path in (GOLDEN / family).iterdir() if path.is_dir())
    return sorted(name for name in folders if not name.startswith(("head_", "refused_")))


def in_front(family: str) -> list[str]:
    """The forms with a prefix or a prompt, which only a resident model can run."""
    return [form for form in forms_of(family) if form.startswith(("prefix", "mam", "prompt"))]


def heads_of(family: str) -> list[str]:
    return sorted(path.name for path in (GOLDEN / family).iterdir() if path.name.startswith("head_"))


@cache
def expected_of(family: str) -> Mapping[str, Tensor]:
    files = sorted((GOLDEN / family).glob("expected*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@cache
def resident(family: str) -> ResidentBase:
    """A base to check against; nothing is installed there."""
    return ResidentBase(base_model(family), name="tiny")


def inspected(family: str, form: str) -> Inspected:
    return inspect(files_of(family, form), resident(family), LIMITS)


def compiled(family: str, form: str) -> Adapter:
    return compile_adapter(inspected(family, form), resident(family), LIMITS)


class PlainModel:
    """A transformers model with its own attention and our sites, run on rows of equal length."""

    def __init__(self, family: str) -> None:
        self._family = family
        self.model = base_model(family)
        self.sites = AdaptedSites(self.model, stream_of=resident(family).runs.stream_of)

    def install(self, slot: int, adapter: Adapter) -> None:
        self.sites.install(slot, adapter)

    @torch.inference_mode()
    def run(self, slots: Sequence[int]) -> Tensor:
        """The answers [R, T, .] of rows that have the same tokens and each an adapter; slots ascend."""
        given = {name: ids.repeat(len(slots), 1) for name, ids in inputs(self._family).items()}
        target = given["decoder_input_ids" if self._family in SEQ2SEQ else "input_ids"].shape[1]
        for stream, length in ((Stream.TARGET, target), (Stream.HEAD, target), (Stream.SOURCE, NUM_TOKENS)):
            extents = partial(_whole_rows, slots, length, is_encoder=stream is Stream.SOURCE)
            self.sites.route(stream, [(slot, length) for slot in slots], extents)
        out = self.model(**given, use_cache=False) if self._family in SEQ2SEQ else self.model(**given)
        self.sites.clear()
        states = out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits
        assert torch.equal(answer(self._family, out), states[0])
        return states


def _whole_rows(slots: Sequence[int], length: int, *, is_encoder: bool) -> list[Extent]:
    return [
        Extent(slot=slot, at=row * length, num_tokens=length, first=0, length=length, is_whole=is_encoder)
        for row, slot in enumerate(slots)
    ]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def renamed(adapter: Adapter, name: str) -> AdapterId:
    return AdapterId(f"{adapter.id}/{name}")
