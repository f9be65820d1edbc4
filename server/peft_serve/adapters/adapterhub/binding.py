"""Every tensor of an AdapterHub checkpoint tied to a place in the base, or refused by name.

Keys are `<path>.<collection>.<adapter's name>.<suffix>`: `adapters` at sublayers, `loras` at linear layers,
`refts` behind layers, `invertible_adapters` (a path and a collection in one) at the embeddings, and prefixes in a
pool below the body.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch

from peft_serve.adapters.adapterhub.compiling import check_coupling, check_kept, check_one_norm
from peft_serve.adapters.adapterhub.config import HubConfig
from peft_serve.adapters.adapterhub.layouts import is_wanted, shapes_at
from peft_serve.adapters.adapterhub.places import INVERTIBLE, SUBLAYERS, Place
from peft_serve.adapters.adapterhub.prefixes import InFront
from peft_serve.adapters.base import Base
from peft_serve.adapters.bound import Binding, BoundSite
from peft_serve.adapters.header import NOT_SERVED, StoredTensor
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.paths import site_path
from peft_serve.adapters.records import CONFIG_FILE
from peft_serve.adapters.registry import Shape
from peft_serve.adapters.verdict import Verdict, quoted
from peft_serve.errors import AdapterInvalid

REMEDY: Final = "save the adapter again with adapters, and upload all of its files"
REFUSED_COLLECTIONS: Final[Mapping[str, str]] = {
    ".prefix_tunings.": (
        "belongs to prefix tuning that the config does not describe; upload the config that was saved with it"
    ),
    ".prefix_gates.": "belongs to a gated method (UniPELT), whose gates average over the whole sequence",
    ".prompt_tunings.": (
        "belongs to prompt tuning that the config does not describe; upload the config that was saved with it"
    ),
    "shared_parameters.": "is shared by many layers (Compacter, VeRA); such methods are not served from AdapterHub",
}


class HubBinder:
    """Binds the tensors of one checkpoint; refusals go to `verdict`."""

    def __init__(
        self, hub: HubConfig, places: Mapping[str, Place], base: Base, limits: GateLimits, verdict: Verdict
    ) -> None:
        self._hub = hub
        self._places = places
        self._base = base
        self._limits = limits
        self._verdict = verdict
        self._sites: dict[str, BoundSite] = {}
        self._in_pool: dict[str, StoredTensor] = {}
        self._num_twins = 0

    def bind(self, tensors: tuple[StoredTensor, ...], front: InFront) -> Binding:
        """Place every tensor and check that each place the config names, and what it puts in front, is complete."""
        for tensor in tensors:
            key = front.key_of(tensor.name)
            if key is None:
                self._take(tensor)
            else:
                self._take_pooled(key, tensor)
        wanted = [path for path, place in self._places.items() if is_wanted(place, self._hub)]
        if not wanted and not front.shapes:
            self._verdict.refuse(f"{CONFIG_FILE}: config", "names no place of the served base; nothing would change")
        for path in dict.fromkeys([*wanted, *self._sites]):
            self._complete(path)
        self._complete_pool(front.shapes)
        sites = {path: self._sites[path] for path in self._base.sites if path in self._sites}
        return Binding(sites=sites, shared=self._in_pool, num_twins=self._num_twins)

    def check_base(self) -> None:
        hub, base = self._hub, self._base
        if not self._places:
            self._verdict.refuse(
                f"{CONFIG_FILE}: model_type",
                f"is {quoted(hub.model_type)}; AdapterHub checkpoints are not served on {base.family} models",
            )
        elif hub.model_type != base.family:
            self._verdict.refuse(
                f"{CONFIG_FILE}: model_type",
                f"is {quoted(hub.model_type)}; the served base is a {base.family} model; serve it on its own base",
            )
        if hub.bottleneck is not None and hub.bottleneck.raw("inv_adapter") is not None:
            self._try(lambda: check_coupling(hub, is_encoder=base.shape.is_encoder))

    def _take(self, tensor: StoredTensor) -> None:
        found = self._split(tensor)
        path = None if found is None else site_path(found[0], self._base)
        if found is None:
            return
        if path is None or path not in self._places:
            reason = f"names no place of the served base {quoted(self._base.name)} ({self._base.class_name})"
            self._verdict.refuse(tensor.name, f"{reason}; serve it on the base it was trained on")
            return
        site = self._sites.setdefault(path, BoundSite(self._base.sites[path]))
        if found[1] in site.method:
            twin = quoted(site.method[found[1]].name)
            self._verdict.refuse(tensor.name, f"means the same place as {twin}; {REMEDY}")
        site.method[found[1]] = tensor

    def _take_pooled(self, key: str, tensor: StoredTensor) -> None:
        """A tensor of a prefix: the library saves it under several names, which must have one value."""
        twin = self._in_pool.setdefault(key, tensor)
        if twin is tensor:
            return
        self._num_twins += 1
        if tensor.shape != twin.shape or tensor.format != twin.format or not torch.equal(tensor.load(), twin.load()):
            reason = f"differs from {quoted(twin.name)}, and both are one parameter"
            self._verdict.refuse(tensor.name, f"{reason}; {REMEDY}")

    def _complete_pool(self, shapes: Mapping[str, Shape]) -> None:
        """Check that what stands in front has all tensors it needs, of the right shapes, and no other."""
        for key, shape in shapes.items():
            name, _, suffix = key.partition(".")
            self._check_tensor(name, suffix, shape, self._in_pool.get(key))
        for key in sorted(self._in_pool.keys() - shapes.keys()):
            self._verdict.refuse(self._in_pool[key].name, f"is not a tensor that the config describes; {REMEDY}")

    def _split(self, tensor: StoredTensor) -> tuple[str, str] | None:
        """The place and the suffix of a key; None when it is refused."""
        name = self._hub.name
        for collection in (f".adapters.{name}.", f".loras.{name}.", f".refts.{name}."):
            path, found, suffix = tensor.name.partition(collection)
            if found:
                return path, suffix
        path, found, suffix = f".{tensor.name}".partition(f".{INVERTIBLE}.{name}.")
        if found:
            return f"{path}.{INVERTIBLE}".removeprefix("."), suffix
        known = next((why for part, why in REFUSED_COLLECTIONS.items() if part in tensor.name), None)
        reason = f"is no tensor of a bottleneck, a LoRA or a ReFT of the adapter {quoted(name)} that the config names"
        self._verdict.refuse(tensor.name, known or f"{reason}; {REMEDY}")
        return None

    def _complete(self, path: str) -> None:
        """Check that a place has all tensors it needs, of the right shapes, and nothing else."""
        place = self._places[path]
        if not is_wanted(place, self._hub):
            self._refuse_extra(path, frozenset())
            return
        try:
            shapes, rank = shapes_at(self._base.sites[path], place, self._hub)
            if place.role in SUBLAYERS and self._hub.bottleneck is not None:
                check_kept(place, self._hub.bottleneck)
        except AdapterInvalid as error:
            self._verdict.adopt(error)
            return
        site = self._sites.setdefault(path, BoundSite(self._base.sites[path]))
        site.rank = rank
        self._check_rank(path, rank)
        for suffix, shape in shapes.items():
            self._check_tensor(path, suffix, shape, site.method.get(suffix))
        self._refuse_extra(path, frozenset(shapes))
        if "adapter_norm_before.weight" in shapes and shapes.keys() <= site.method.keys():
            names = [suffix for suffix in shapes if "norm_before" in suffix or suffix.startswith("adapter_down.0.")]
            self._try(lambda: check_one_norm({name: site.method[name].load() for name in names}, path))

    def _check_tensor(self, path: str, suffix: str, shape: tuple[int, ...], tensor: StoredTensor | None) -> None:
        if tensor is None:
            self._verdict.refuse(f"{path}.{suffix}", f"is missing; {REMEDY}")
        elif tensor.format.is_integer:
            self._verdict.refuse(tensor.name, f"has dtype {tensor.format.torch_dtype}; {NOT_SERVED}")
        elif tensor.shape != shape:
            self._verdict.refuse(
                tensor.name,
                f"has shape {list(tensor.shape)}; config and base {quoted(self._base.name)} ask for {list(shape)}; "
                "upload the config that was saved with these weights, to the base they were trained on",
            )

    def _check_rank(self, path: str, rank: int) -> None:
        if rank > self._limits.max_rank:
            self._verdict.refuse(
                path,
                f"has rank {rank}; this server was started with --max-rank {self._limits.max_rank}; retrain with a "
                "smaller r or ask the operator",
            )

    def _refuse_extra(self, path: str, known: frozenset[str]) -> None:
        site = self._sites.get(path)
        for suffix in () if site is None else sorted(site.method.keys() - known):
            assert site is not None, "there are suffixes"
            self._verdict.refuse(site.method[suffix].name, f"is not a tensor that the config describes here; {REMEDY}")

    def _try(self, check: Callable[[], None]) -> None:
        try:
            check()
        except AdapterInvalid as error:
            self._verdict.adopt(error)
