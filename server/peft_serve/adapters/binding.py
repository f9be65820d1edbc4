"""Every tensor of a checkpoint tied to a place in the base, or refused by name.

Owns the reading of keys. Knows layouts and shapes, and looks at values only where a copy of the base's own
weights may be dropped. What comes out is complete: each site has all of its method's tensors, or all of its saved
parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import torch

from peft_serve.adapters.base import Base, SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.header import NOT_SERVED, StoredTensor
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.records import CONFIG_FILE, WEIGHTS_FILE
from peft_serve.adapters.registry import Method, SequenceMethod, Shape, SharedLayout, SiteMethod
from peft_serve.adapters.targets import is_saved, named_sites, tie_partners
from peft_serve.adapters.verdict import Verdict, quoted
from peft_serve.errors import AdapterInvalid

HEADS: Final = frozenset({"score", "classifier", "classification_head", "qa_outputs"})
WRAPPED: Final = ("modules_to_save.", "original_module.")  # peft's own wrappers, saved twice by bias="all"
BASE_LAYER: Final = "base_layer."
REMEDY: Final = "save the checkpoint again with peft, and upload both of its files"


@dataclass(slots=True)
class BoundSite:
    """The tensors of one site by what they are: the method's, the site's own retrained, copies of the base's."""

    spec: SiteSpec
    method: dict[str, StoredTensor] = field(default_factory=dict)
    saved: dict[str, StoredTensor] = field(default_factory=dict)
    copies: dict[str, StoredTensor] = field(default_factory=dict)
    rank: int = 0
    is_named: bool = False  # the method acts here though it saves nothing here

    @property
    def is_target(self) -> bool:
        """Whether the method acts here."""
        return bool(self.method) or self.is_named

    @property
    def is_retrained(self) -> bool:
        """Whether all of the site's own parameters are in the checkpoint."""
        return bool(self.saved) and self.saved.keys() == self.spec.parameters.keys()


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """Where everything goes. `shared` are the method's tensors that belong to no site."""

    sites: Mapping[str, BoundSite]
    shared: Mapping[str, StoredTensor]

    @property
    def targets(self) -> tuple[SiteSpec, ...]:
        """Every site the method acts on, in the module order of the base."""
        return tuple(site.spec for site in self.sites.values() if site.is_target)

    @property
    def num_tensors(self) -> int:
        return len(self.shared) + sum(len(s.method) + len(s.saved) + len(s.copies) for s in self.sites.values())


def same_as_base(tensor: StoredTensor, spec: SiteSpec, parameter: str, base: Base) -> bool:
    """Whether a saved parameter is the base's own, to the precision the base is served in."""
    own = base.bias(spec.path) if parameter == "bias" else base.weight(spec.path)
    if own is None:
        return False
    mine = tensor.load()
    if parameter == "weight" and spec.kind in (SiteKind.CONV1D, SiteKind.EMBEDDING):
        mine = mine.T  # these modules store [in, out]; the base gives [out, in]
    return own.shape == mine.shape and torch.equal(mine.to(base.dtype), own.cpu().to(base.dtype))


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
        for path in list(self._sites):
            self._complete(self._sites[path])
        if not self._sites and not self._shared:
            self._verdict.refuse(WEIGHTS_FILE, "holds nothing that acts on the base; save the adapter again")
        in_order = {path: self._sites[path] for path in self._base.sites if path in self._sites}
        return Binding(sites=in_order, shared=self._shared)

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
            self._check_shape(tensor, (self._shared_layout.tensors[shared_name],))
            self._check_numbers(tensor, self._shared_layout.indices.get(shared_name))
            return
        if self._shared_layout.leftovers and shared_name.startswith(self._shared_layout.leftovers):
            self._verdict.warn(f"{quoted(tensor.name)} is a leftover of training and is not read")
            return
        prefix = "base_model." if isinstance(self._method, SequenceMethod) else "base_model.model."
        if not tensor.name.startswith(prefix):
            self._verdict.refuse(tensor.name, f"is not a key of {self._method.peft_type}; {REMEDY}")
            return
        found = self._split(tensor.name.removeprefix(prefix))
        if found is None:
            self._refuse_unknown_site(tensor)
        else:
            path, suffix = found
            site = self._sites.setdefault(path, BoundSite(self._base.sites[path]))
            self._sort(site, suffix, tensor)

    def _split(self, key: str) -> tuple[str, str] | None:
        """The longest path of a site that a key begins with, and the rest of the key."""
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
            self._check_numbers(tensor)
        elif suffix.startswith(BASE_LAYER) and suffix.removeprefix(BASE_LAYER) in shapes:
            name = suffix.removeprefix(BASE_LAYER)
            kept = site.saved if name == "bias" and self._bias != "none" else site.copies
            kept[name] = tensor
            self._check_own_shape(tensor, shapes[name])
            self._check_numbers(tensor)
        else:
            site.method[suffix] = tensor

    def _check_own_shape(self, tensor: StoredTensor, shape: Shape) -> None:
        if tensor.shape == shape:
            return
        way_out = "train on the base as it is served"
        if len(shape) == 2 and tensor.shape[1:] == shape[1:]:
            way_out = "the vocabulary was resized; serve the resized base, or train without adding tokens"
        self._verdict.refuse(tensor.name, f"has shape {list(tensor.shape)}, the base has {list(shape)}; {way_out}")

    def _check_numbers(self, tensor: StoredTensor, bound: int | None = None) -> None:
        """Integers below `bound` where indices are expected, floating-point numbers everywhere else."""
        dtype = str(tensor.format.torch_dtype).removeprefix("torch.")
        if bound is None:
            if tensor.format.is_integer:
                self._verdict.refuse(tensor.name, f"has dtype {dtype}; {NOT_SERVED}")
        elif not tensor.format.is_integer:
            self._verdict.refuse(tensor.name, f"has dtype {dtype} and holds indices, which are integers; {REMEDY}")
        elif not tensor.is_below(bound):
            self._verdict.refuse(tensor.name, f"holds an index outside 0 ... {bound - 1}; {REMEDY}")

    def _check_shape(self, tensor: StoredTensor, shapes: tuple[Shape, ...]) -> None:
        if tensor.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            self._verdict.refuse(
                tensor.name,
                f"has shape {list(tensor.shape)}; config and base {quoted(self._base.name)} ask for {wanted}; "
                "upload the config that was saved with these weights, to the base they were trained on",
            )

    def _refuse_unknown_site(self, tensor: StoredTensor) -> None:
        parts = tensor.name.split(".")
        head = next((part for part in parts if part in HEADS), None)
        if head is not None:
            reason = (
                f"is a task head; the served base {self._base.class_name} has no module {quoted(head)}; "
                "serve it on a base with that head, or retrain for this one"
            )
        else:
            reason = f"names no module of the served base {quoted(self._base.name)} ({self._base.class_name})"
            reason += "; serve it on the base it was trained on"
        self._verdict.refuse(tensor.name, reason)

    # one site

    def _complete(self, site: BoundSite) -> None:
        """Check that a site has all it needs and nothing else."""
        if isinstance(self._method, SiteMethod) and site.is_target:
            self._complete_method(site, self._method)
        else:
            self._refuse_extra(site)
        if site.saved:
            self._complete_saved(site)
        if site.copies:
            self._complete_copies(site)
        if not (site.is_target or site.saved or site.copies):
            del self._sites[site.spec.path]

    def _complete_method(self, site: BoundSite, method: SiteMethod) -> None:
        path = site.spec.path
        if site.spec.kind not in method.kinds:
            self._verdict.refuse(path, f"is a {site.spec.kind} module; {method.peft_type} does not act on these")
            return
        if is_saved(path, self._saved):
            self._verdict.refuse(path, "is in modules_to_save and has adapter tensors too; it can be only one")
        try:
            stored = {suffix: tensor.shape for suffix, tensor in site.method.items()}
            layout = method.layout(site.spec, self._config, stored)
        except AdapterInvalid as error:
            self._verdict.adopt(error)
            return
        for suffix in [s for s in site.method if s.startswith(layout.leftovers)] if layout.leftovers else []:
            self._verdict.warn(f"{quoted(site.method.pop(suffix).name)} is a leftover of training and is not read")
        for suffix, shapes in layout.tensors.items():
            if suffix in site.method:
                self._check_rank(site.method[suffix], layout.rank)
                self._check_shape(site.method[suffix], shapes)
                self._check_numbers(site.method[suffix], layout.indices.get(suffix))
            else:
                self._verdict.refuse(f"{path}.{suffix}", f"is missing; {REMEDY}")
        site.rank = layout.rank
        self._refuse_extra(site, known=frozenset(layout.tensors))

    def _check_rank(self, tensor: StoredTensor, rank: int) -> None:
        if rank > self._limits.max_rank:
            self._verdict.refuse(
                tensor.name,
                f"has rank {rank}; this server was started with --max-rank {self._limits.max_rank}; "
                f"retrain with r <= {self._limits.max_rank} or ask the operator",
            )

    def _refuse_extra(self, site: BoundSite, known: frozenset[str] = frozenset()) -> None:
        for suffix in site.method.keys() - known:
            self._verdict.refuse(
                site.method[suffix].name,
                f"is not a tensor of {self._method.peft_type} as this config describes it; {REMEDY}",
            )

    def _complete_saved(self, site: BoundSite) -> None:
        path = site.spec.path
        if self._may_be_saved(path):
            for name in site.spec.parameters.keys() - site.saved.keys():
                self._verdict.refuse(f"{path}.{name}", f"is missing; {REMEDY}")
            return
        if self._bias == "all" or (self._bias == "lora_only" and site.method):
            extra = [name for name in site.saved if name != "bias"]
        else:
            extra = list(site.saved)
        for name in extra:
            tensor = site.saved.pop(name)
            if tensor.shape == site.spec.parameters[name] and same_as_base(tensor, site.spec, name, self._base):
                self._verdict.warn(f"{quoted(tensor.name)} repeats the base's own values and is not read")
            else:
                self._verdict.refuse(
                    tensor.name,
                    "would change the base and is not announced; name its module in modules_to_save of the config",
                )

    def _may_be_saved(self, path: str) -> bool:
        if is_saved(path, self._saved):
            return True
        tied = self._config.flag("ensure_weight_tying")
        return tied and any(is_saved(partner, self._saved) for partner in tie_partners(self._base, path))

    def _complete_copies(self, site: BoundSite) -> None:
        """peft saves the whole embedding (or head) beside a LoRA on it: drop it where it is the base's own."""
        for name in list(site.copies):
            tensor = site.copies[name]
            if tensor.shape != site.spec.parameters[name]:
                continue  # refused already, by shape
            if same_as_base(tensor, site.spec, name, self._base):
                del site.copies[name]
                self._verdict.warn(f"{quoted(tensor.name)} repeats the base's own values and is not read")
            elif name != "weight" or not self._may_stand_on_its_own(site):
                self._verdict.refuse(
                    tensor.name, "differs from the served base's own values; serve it on the base it was trained on"
                )

    def _may_stand_on_its_own(self, site: BoundSite) -> bool:
        """Whether a site may bring the weight its low-rank term was trained on: only where peft saves it at all.

        A shared weight would have to change at its other place too, and DoRA's lengths were learned with it.
        """
        vocab_size = self._base.shape.vocab_size
        speaks_tokens = vocab_size in (site.spec.in_features, site.spec.out_features)
        is_plain = bool(site.method) and not self._config.flag("use_dora")
        return speaks_tokens and is_plain and not tie_partners(self._base, site.spec.path)
