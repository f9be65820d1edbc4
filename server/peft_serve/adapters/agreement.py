"""Whether a config and the tensors beside it speak of the same adapter, once every tensor has its place.

A checkpoint that names more than it holds is cut short, and one that holds more than it names is mislabelled:
peft loads both without a word. Knows no keys and no values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from peft_serve.adapters.base import Base
from peft_serve.adapters.bound import BoundSite
from peft_serve.adapters.completeness import REMEDY
from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.heads import HEADS
from peft_serve.adapters.records import CONFIG_FILE
from peft_serve.adapters.registry import Method, SiteMethod
from peft_serve.adapters.targets import is_saved, tie_partners
from peft_serve.adapters.verdict import Verdict

TEXT_TASKS: Final = frozenset({"CAUSAL_LM", "SEQ_2_SEQ_LM"})


class Agreement:
    """The checks of one checkpoint as a whole; refusals go to `verdict`."""

    def __init__(
        self, method: Method, config: Config, base: Base, sites: Mapping[str, BoundSite], verdict: Verdict
    ) -> None:
        self._method = method
        self._config = config
        self._base = base
        self._sites = sites
        self._verdict = verdict
        self._saved = config.names("modules_to_save")
        self._bias = config.text("bias", "none")

    def check(self) -> None:
        """Compare task, targets and saved modules with what is there."""
        self._check_task()
        self._check_targets()
        self._check_saved()

    def _check_task(self) -> None:
        task = self._config.text("task_type")
        if task in TEXT_TASKS and not self._base.shape.generates:
            self._verdict.refuse(
                f"{CONFIG_FILE}: task_type",
                f"is {task}; the served base {self._base.class_name} generates no text; serve it on one that does",
            )

    def _may_be_absent(self, path: str) -> bool:
        """Whether the class the adapter was trained on may lack this site: not every task's has a head or a pooler."""
        if path.rpartition(".")[2] in HEADS or path.split(".")[0] in HEADS:
            return True
        return self._config.text("task_type") not in TEXT_TASKS and path in self._base.beside_body

    def _check_targets(self) -> None:
        if not isinstance(self._method, SiteMethod):
            return
        named = self._method.named(self._config, self._base)
        bound = {path for path, site in self._sites.items() if site.is_target}
        for path in sorted(named.must - bound):
            is_wanted = self._base.sites[path].kind in self._method.kinds and not self._may_be_absent(path)
            if is_wanted and not self._is_alias(path, bound):
                self._verdict.refuse(path, f"is named by target_modules and has no tensors; {REMEDY}")
        if named.may is None:
            return
        is_tying = self._config.flag("ensure_weight_tying")
        for path in sorted(bound - named.must - named.may):
            if not (is_tying and tie_partners(self._base, path) & named.must):
                self._verdict.refuse(path, f"has tensors and is not named by target_modules; {REMEDY}")

    def _check_saved(self) -> None:
        for path, spec in self._base.sites.items():
            site = self._sites.get(path)
            if site is None and self._may_be_absent(path):
                continue
            is_missing = site is None and spec.parameters and is_saved(path, self._saved)
            if is_missing and not self._is_alias(path, self._sites.keys()):
                self._verdict.refuse(path, f"is named by modules_to_save and has no tensors; {REMEDY}")
            is_tuned = self._bias == "all" or (self._bias.endswith("_only") and site is not None and site.is_target)
            if is_tuned and spec.has_bias and (site is None or "bias" not in site.saved):
                self._verdict.refuse(f"{path}.bias", f"is missing though bias is {self._bias}; {REMEDY}")

    def _is_alias(self, path: str, bound: Collection[str]) -> bool:
        """Whether a bound site is of the same kind and shares the weight: one module under two names has one key."""
        kind = self._base.sites[path].kind
        return any(self._base.sites[p].kind is kind and p in bound for p in tie_partners(self._base, path))
