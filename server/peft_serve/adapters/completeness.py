"""Whether a site has all the tensors that make sense of it, and no others.

Looks at values only where a copy of the base's own weights may be dropped. Knows no keys: every tensor has its
place already.
"""

from __future__ import annotations

from typing import Final

from peft_serve.adapters.base import HAS_WEIGHT, Base
from peft_serve.adapters.bound import BoundSite, same_as_base
from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.effort import Effort
from peft_serve.adapters.header import NOT_SERVED, StoredTensor
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.registry import Method, Shape, SiteMethod
from peft_serve.adapters.targets import is_saved, tie_partners
from peft_serve.adapters.verdict import Verdict, quoted
from peft_serve.errors import AdapterInvalid

REMEDY: Final = "save the checkpoint again with peft, and upload both of its files"


class Completeness:
    """The checks of one site after another; refusals go to `verdict`."""

    def __init__(self, method: Method, config: Config, base: Base, limits: GateLimits, verdict: Verdict) -> None:
        self._method = method
        self._config = config
        self._base = base
        self._limits = limits
        self._verdict = verdict
        self.effort = Effort(base.dtype.itemsize, limits)  # of all sites that were checked
        self._saved = config.names("modules_to_save")
        self._bias = config.text("bias", "none")

    def check(self, site: BoundSite) -> bool:
        """Refuse what is missing or too much; whether anything is left that acts on the base."""
        if isinstance(self._method, SiteMethod) and site.is_target:
            self._check_method(site, self._method)
        else:
            self._refuse_extra(site)
        if site.saved:
            self._check_saved(site)
        if site.copies:
            self._check_copies(site)
        return bool(site.is_target or site.saved or site.copies)

    def _check_method(self, site: BoundSite, method: SiteMethod) -> None:
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
                check_shape(site.method[suffix], shapes, self._base, self._verdict)
                check_numbers(site.method[suffix], self._verdict, layout.indices.get(suffix))
            else:
                self._verdict.refuse(f"{path}.{suffix}", f"is missing; {REMEDY}")
        site.rank = layout.rank
        self.effort.add(layout)
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

    def _check_saved(self, site: BoundSite) -> None:
        path = site.spec.path
        if site.spec.kind not in HAS_WEIGHT:
            reason = f"is retrained; whole {site.spec.kind} modules are not served; use target_parameters of LoRA"
            self._verdict.refuse(path, reason)
            return
        if self._may_be_saved(path):
            for name in site.spec.parameters.keys() - site.saved.keys():
                self._verdict.refuse(f"{path}.{name}", f"is missing; {REMEDY}")
            return
        if self._bias == "all" or (self._bias.endswith("_only") and site.is_target):
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

    def _check_copies(self, site: BoundSite) -> None:
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

        A shared weight would have to change at its other place too, and some terms were learned with the weight.
        """
        vocab_size = self._base.shape.vocab_size
        speaks_tokens = vocab_size in (site.spec.in_features, site.spec.out_features)
        method = self._method
        is_plain = isinstance(method, SiteMethod) and site.rank > 0 and method.fits_any_weight(self._config)
        return speaks_tokens and is_plain and not tie_partners(self._base, site.spec.path)


def check_numbers(tensor: StoredTensor, verdict: Verdict, bound: int | None = None) -> None:
    """Integers below `bound` where indices are expected, floating-point numbers everywhere else."""
    dtype = str(tensor.format.torch_dtype).removeprefix("torch.")
    if bound is None:
        if tensor.format.is_integer:
            verdict.refuse(tensor.name, f"has dtype {dtype}; {NOT_SERVED}")
    elif not tensor.format.is_integer:
        verdict.refuse(tensor.name, f"has dtype {dtype} and holds indices, which are integers; {REMEDY}")
    elif not tensor.is_below(bound):
        verdict.refuse(tensor.name, f"holds an index outside 0 ... {bound - 1}; {REMEDY}")


def check_shape(tensor: StoredTensor, shapes: tuple[Shape, ...], base: Base, verdict: Verdict) -> None:
    """One of the shapes that a layout allows."""
    if tensor.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        verdict.refuse(
            tensor.name,
            f"has shape {list(tensor.shape)}; config and base {quoted(base.name)} ask for {wanted}; "
            "upload the config that was saved with these weights, to the base they were trained on",
        )
