"""Methods that compile to new values of a site's own parameters, or of some rows of them."""

from __future__ import annotations

from typing import Final

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import HAS_WEIGHT, Base, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.primitives import Affine, Replace
from peft_serve.adapters.registry import Site, SiteLayout, Stored, compiles
from peft_serve.adapters.targets import Named, named_by_modules, tie_partners
from peft_serve.adapters.token_rows import KINDS, ROWS, ids_at, rows_edit, shape_of_rows, token_ids

LN_TUNING: Final = ConfigSchema(
    optional={"target_modules": rules.names_or_text, "exclude_modules": rules.names_or_text},
)
LN_PREFIX: Final = "ln_tuning_layers."


def _ln_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    return SiteLayout(tensors={f"{LN_PREFIX}{name}": (shape,) for name, shape in spec.parameters.items()})


@compiles("LN_TUNING", schema=LN_TUNING, layout=_ln_layout, kinds=HAS_WEIGHT)
def ln_tuning(site: Site) -> Replace:
    """The tuned copy of a norm stands in for it (arXiv:2312.11420, peft `LNTuningLayer`)."""
    return Replace({name.removeprefix(LN_PREFIX): tensor for name, tensor in site.tensors.items()})


TRAINABLE_TOKENS: Final = ConfigSchema(
    required={"token_indices": token_ids},
    optional={"target_modules": rules.names_or_text, "exclude_modules": rules.names_or_text},
    inert=frozenset({"init_weights"}),
)


def _tokens_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    ids = ids_at(config.raw("token_indices"), spec.path)
    return SiteLayout(tensors={ROWS: (shape_of_rows(spec, ids, "token_indices"),)})


def _tokens_named(config: Config, base: Base) -> Named:
    """peft repeats the rows at every site that shares the weight; it names the embedding by its whole path."""
    named = named_by_modules(config, base)
    whole_path = config.raw("target_modules")
    if isinstance(whole_path, str) and whole_path in base.sites:
        named = Named(must=frozenset({whole_path}))
    if named.may is None:
        return named
    return Named(must=named.must, may=frozenset().union(*(tie_partners(base, path) for path in named.must)))


@compiles("TRAINABLE_TOKENS", schema=TRAINABLE_TOKENS, layout=_tokens_layout, kinds=KINDS, named=_tokens_named)
def trainable_tokens(site: Site) -> Affine:
    """Some rows of an embedding, and of a head that shares its weight, exchanged (peft `TrainableTokensLayer`)."""
    return rows_edit(ids_at(site.config.raw("token_indices"), site.spec.path), site.tensors[ROWS])
