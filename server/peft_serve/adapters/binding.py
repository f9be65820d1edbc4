"""Every tensor of a checkpoint tied to a place in the base, or refused by name.

Owns the reading of keys. What comes out is complete: each site has all of its method's tensors, or all of its
saved parameters.
"""

from __future__ import annotations

from typing import Final

from peft_serve.adapters.base import Base
from peft_serve.adapters.bound import Binding, BoundSite
from peft_serve.adapters.completeness import REMEDY, Completeness, check_numbers, check_shape
from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.header import StoredTensor
from peft_serve.adapters.heads import HeadBinder
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.paths import spellings
from peft_serve.adapters.records import CONFIG_FILE, WEIGHTS_FILE
from peft_serve.adapters.registry import Method, SequenceMethod, Shape, SharedLayout, SiteMethod
from peft_serve.adapters.targets import is_saved, named_sites
from peft_serve.adapters.verdict import Verdict, quoted
from peft_serve.errors import AdapterInvalid

WRAPPED: Final = ("modules_to_save.", "original_module.")  # peft's own wrappers, saved twice by bias="all"
BASE_LAYER: Final = "base_layer."


class Binder:
    """Binds the tensors of one checkpoint; refusals go to `verdict`."""

    def __init__(self, method: Method, config: Config, base: Base, limits: GateLimits, verdict: Verdict) -> None:
        self._method = method
        self._config = config
        self._base = base
        self._limits = limits
        self._verdict = verdict
        self._saved = config.names("modules_to_save")
        self._bias = config.text("bias", "none")
        self._sites: dict[str, BoundSite] = {}
        self._shared: dict[str, StoredTensor] = {}
        self._head = HeadBinder(config, base, verdict)
        self._bound: dict[tuple[str, str], str] = {}  # the tensor at each place, by site and suffix
        self._shared_layout = SharedLayout()

    def bind(self, tensors: tuple[StoredTensor, ...]) -> Binding:
        """Place every tensor and check that each place is complete. Raises at once when the config does not fit."""
        self._shared_layout = self._layout_of_shared(tensors)
        self._verdict.settle()
        for tensor in tensors:
            self._place(tensor)
        for name, shape in self._shared_layout.tensors.items():
            if name not in self._shared:
                place = f"{self._shared_prefix}{name}"
                self._verdict.refuse(place, f"is missing; the checkpoint needs it with shape {list(shape)}")
        self._name_sites()
        completeness = Completeness(self._method, self._config, self._base, self._limits, self._verdict)
        for path in [path for path, site in self._sites.items() if not completeness.check(site)]:
            del self._sites[path]
        completeness.effort.check(self._verdict)
        head = self._head.bound()
        if not self._sites and not self._shared and head is None:
            self._verdict.refuse(WEIGHTS_FILE, "holds nothing that acts on the base; save the adapter again")
        in_order = {path: self._sites[path] for path in self._base.sites if path in self._sites}
        return Binding(sites=in_order, shared=self._shared, head=head)

    @property
    def _shared_prefix(self) -> str:
        return "" if isinstance(self._method, SequenceMethod) else "base_model."

    def _layout_of_shared(self, tensors: tuple[StoredTensor, ...]) -> SharedLayout:
        try:
            if isinstance(self._method, SequenceMethod):
                return SharedLayout(tensors=self._method.layout(self._config, self._base.shape))
            stored = {
                tensor.name.removeprefix("base_model."): tensor.shape
                for tensor in tensors
                if tensor.name.startswith("base_model.") and not tensor.name.startswith("base_model.model.")
            }
            return self._method.shared(self._config, self._base, stored)
        except AdapterInvalid as error:
            self._verdict.adopt(error)
            return SharedLayout()

    def _name_sites(self) -> None:
        """The sites of a method that saves nothing per site are those its config names."""
        method = self._method
        if not isinstance(method, SiteMethod) or method.has_site_tensors:
            return
        named = named_sites(self._config, self._base)
        if named is None and any(site.method for site in self._sites.values()):
            return  # this checkpoint shows its sites
        if named is None:
            self._verdict.refuse(
                f"{CONFIG_FILE}: target_modules",
                f"is a regular expression, which is never run, and {method.peft_type} saves nothing that shows its "
                "sites; write target_modules out as a list of module names",
            )
            return
        for path in sorted(named):
            spec = self._base.sites[path]
            if spec.kind in method.kinds:
                self._sites.setdefault(path, BoundSite(spec)).is_named = True

    # one tensor

    def _place(self, tensor: StoredTensor) -> None:
        shared_name = tensor.name.removeprefix(self._shared_prefix)
        if tensor.name.startswith(self._shared_prefix) and shared_name in self._shared_layout.tensors:
            self._shared[shared_name] = tensor
            check_shape(tensor, (self._shared_layout.tensors[shared_name],), self._base, self._verdict)
            check_numbers(tensor, self._verdict, self._shared_layout.indices.get(shared_name))
            return
        if self._shared_layout.leftovers and shared_name.startswith(self._shared_layout.leftovers):
            self._verdict.warn(f"{quoted(tensor.name)} is a leftover of training and is not read")
            return
        prefix = "base_model." if isinstance(self._method, SequenceMethod) else "base_model.model."
        if not tensor.name.startswith(prefix):
            self._verdict.refuse(tensor.name, f"is not a key of {self._method.peft_type}; {REMEDY}")
            return
        key = tensor.name.removeprefix(prefix)
        found = self._split(key)
        if self._head.takes(key, None if found is None else found[0]):
            self._head.add(key, tensor)
        elif found is None:
            self._refuse_unknown_site(tensor)
        elif found in self._bound:
            self._verdict.refuse(tensor.name, f"means the same place as {quoted(self._bound[found])}; {REMEDY}")
        else:
            path, suffix = found
            self._bound[found] = tensor.name
            site = self._sites.setdefault(path, BoundSite(self._base.sites[path]))
            self._sort(site, suffix, tensor)

    def _split(self, key: str) -> tuple[str, str] | None:
        """The longest path of a site that a key begins with, however it is spelt, and the rest of the key."""
        return next((found for spelt in spellings(key, self._base) if (found := self._split_spelt(spelt))), None)

    def _split_spelt(self, key: str) -> tuple[str, str] | None:
        end = key.rfind(".")
        while end > 0:
            if key[:end] in self._base.sites:
                return key[:end], key[end + 1 :]
            end = key.rfind(".", 0, end)
        return None

    def _sort(self, site: BoundSite, suffix: str, tensor: StoredTensor) -> None:
        shapes = site.spec.parameters
        if suffix.startswith(WRAPPED) and self._bias == "all" and is_saved(site.spec.path, self._saved):
            self._verdict.warn(f"{quoted(tensor.name)} is a leftover of bias='all' and is not read")
        elif suffix in shapes:
            site.saved[suffix] = tensor
            self._check_own_shape(tensor, shapes[suffix])
            check_numbers(tensor, self._verdict)
        elif suffix.startswith(BASE_LAYER) and suffix.removeprefix(BASE_LAYER) in shapes:
            name = suffix.removeprefix(BASE_LAYER)
            kept = site.saved if name == "bias" and self._bias != "none" else site.copies
            kept[name] = tensor
            self._check_own_shape(tensor, shapes[name])
            check_numbers(tensor, self._verdict)
        else:
            site.method[suffix] = tensor

    def _check_own_shape(self, tensor: StoredTensor, shape: Shape) -> None:
        if tensor.shape == shape:
            return
        way_out = "train on the base as it is served"
        if len(shape) == 2 and tensor.shape[1:] == shape[1:]:
            way_out = "the vocabulary was resized; serve the resized base, or train without adding tokens"
        self._verdict.refuse(tensor.name, f"has shape {list(tensor.shape)}, the base has {list(shape)}; {way_out}")

    def _refuse_unknown_site(self, tensor: StoredTensor) -> None:
        reason = f"names no module of the served base {quoted(self._base.name)} ({self._base.class_name})"
        self._verdict.refuse(tensor.name, f"{reason}; serve it on the base it was trained on")
