"""The way in: an AdapterHub checkpoint's files, checked against the base as strictly as peft's.

What comes out is what the gate and the compiler work with, whatever library saved the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from peft_serve.adapters.adapterhub.binding import HubBinder
from peft_serve.adapters.adapterhub.compiling import HubCompile
from peft_serve.adapters.adapterhub.config import HubConfig, read_config
from peft_serve.adapters.adapterhub.heads import HubHead, HubHeads
from peft_serve.adapters.adapterhub.layouts import shapes_at
from peft_serve.adapters.adapterhub.places import Place, places_in
from peft_serve.adapters.adapterhub.prefixes import InFront, in_front
from peft_serve.adapters.base import Base, SiteKind, SiteSpec
from peft_serve.adapters.bound import Binding
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.header import AS_PEFT, StoredTensor, parse_tensors
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.records import (
    HEAD_CONFIG_FILE,
    HEAD_WEIGHTS_FILE,
    HUB_WEIGHTS_FILE,
    WEIGHTS_FILE,
    CheckpointFiles,
)
from peft_serve.adapters.registry import SiteLayout, SiteMethod, Stored, compiles
from peft_serve.adapters.verdict import Verdict
from peft_serve.errors import MalformedUpload

AS_HUB = "save it again with adapters' save_adapter (use_safetensors=True)"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubCheckpoint:
    """A checkpoint whose every tensor is bound, once the verdict has settled. `tensors` are all that it holds."""

    method: SiteMethod
    config: Config
    binding: Binding
    tensors: tuple[StoredTensor, ...]
    labels: tuple[str, ...]


def read_checkpoint(files: CheckpointFiles, base: Base, limits: GateLimits, verdict: Verdict) -> HubCheckpoint:
    """Read and bind all files; raises `MalformedUpload` and `AdapterInvalid`, other refusals go to `verdict`."""
    hub = read_config(files.config, limits, verdict)
    with _told_of(HUB_WEIGHTS_FILE):
        tensors = parse_tensors(files.weights, limits, verdict)
    verdict.settle()
    places = places_in(base)
    binder = HubBinder(hub, places, base, limits, verdict)
    binder.check_base()
    verdict.settle()
    front = in_front(hub, base)
    bound = binder.bind(tensors, front)
    head, head_tensors = _head(files, hub, base, limits, verdict)
    return HubCheckpoint(
        method=_method(hub, places, front),
        config=_as_config(hub, head),
        binding=replace(bound, head=head.bound),
        tensors=(*tensors, *head_tensors),
        labels=head.labels,
    )


def _head(
    files: CheckpointFiles, hub: HubConfig, base: Base, limits: GateLimits, verdict: Verdict
) -> tuple[HubHead, tuple[StoredTensor, ...]]:
    if files.head_config is None and files.head_weights is None:
        return HubHead(None), ()
    if files.head_config is None or files.head_weights is None:
        missing = HEAD_CONFIG_FILE if files.head_config is None else HEAD_WEIGHTS_FILE
        reason = "is missing beside the other file of the head; save the adapter with use_safetensors=True"
        verdict.refuse(missing, f"{reason}, or with with_head=False, or leave both files of the head out")
        return HubHead(None), ()
    with _told_of(HEAD_WEIGHTS_FILE):
        tensors = parse_tensors(files.head_weights, limits, verdict)
    verdict.settle()
    return HubHeads(hub, base, limits, verdict).bind(files.head_config, tensors), tensors


@contextmanager
def _told_of(name: str) -> Iterator[None]:
    """Name the file that is read; the parser speaks of peft's."""
    try:
        yield
    except MalformedUpload as error:
        message = error.message.replace(WEIGHTS_FILE, name).replace(AS_PEFT, AS_HUB)
        raise MalformedUpload(message) from error


def _method(hub: HubConfig, places: Mapping[str, Place], front: InFront) -> SiteMethod:
    """The checkpoint's method, as the compiler wants one."""

    def layout(spec: SiteSpec, _config: Config, _stored: Stored) -> SiteLayout:
        shapes, rank = shapes_at(spec, places[spec.path], hub)
        return SiteLayout(tensors={suffix: (shape,) for suffix, shape in shapes.items()}, rank=rank)

    made = compiles(hub.method, schema=ConfigSchema(), layout=layout, kinds=frozenset(SiteKind))
    return replace(made(HubCompile(hub, places)), prefixes=front)


def _as_config(hub: HubConfig, head: HubHead) -> Config:
    """The facts that a peft config would hold, by their names there."""
    task = {} if head.bound is None else {"task_type": str(head.bound.task)}
    return Config({"base_model_name_or_path": hub.model_name, **task})
