"""Methods that compile to new values of a site's own parameters."""

from __future__ import annotations

from typing import Final

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.primitives import Replace
from peft_serve.adapters.registry import Site, SiteLayout, Stored, compiles

LN_TUNING: Final = ConfigSchema(
    optional={"target_modules": rules.names_or_text, "exclude_modules": rules.names_or_text},
)
LN_PREFIX: Final = "ln_tuning_layers."


def _ln_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    return SiteLayout(tensors={f"{LN_PREFIX}{name}": (shape,) for name, shape in spec.parameters.items()})


@compiles("LN_TUNING", schema=LN_TUNING, layout=_ln_layout, kinds=frozenset(SiteKind))
def ln_tuning(site: Site) -> Replace:
    """The tuned copy of a norm stands in for it (arXiv:2312.11420, peft `LNTuningLayer`)."""
    return Replace({name.removeprefix(LN_PREFIX): tensor for name, tensor in site.tensors.items()})
