"""Trained rows of a token table: which ids they are, and the other tables that share the weight.

peft calls the tensor a delta; it holds the new rows themselves (`TrainableTokensLayer`). Knows no peft type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from peft_serve.adapters.base import Base, SiteKind, SiteSpec
from peft_serve.adapters.primitives import Affine, Edit, Rows
from peft_serve.adapters.records import CONFIG_FILE
from peft_serve.adapters.targets import tie_partners
from peft_serve.errors import AdapterInvalid, Refusal

ROWS: Final = "trainable_tokens_delta"
KINDS: Final = frozenset({SiteKind.EMBEDDING, SiteKind.LINEAR})
MAX_IDS: Final = 1 << 16
MAX_TABLES: Final = 64  # a model has one or two; every name is compared with every module's


def token_ids(value: object) -> str | None:
    """Rule of a config field: distinct token ids."""
    if isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 31 for v in value):
        fits = len(value) == len(set(value)) <= MAX_IDS
    else:
        fits = False
    return None if fits else f"a list of at most {MAX_IDS} token ids, each once"


def token_ids_by_module(value: dict[str, object]) -> str | None:
    """Rule of a config field: an object from names of modules to distinct token ids."""
    if len(value) > MAX_TABLES:
        return f"an object from at most {MAX_TABLES} module names to lists"
    expected = next((rule for rule in map(token_ids, value.values()) if rule is not None), None)
    return None if expected is None else f"an object from module names to lists: {expected}"


def ids_at(value: object, path: str) -> list[int]:
    """The ids that a list, or an object from names of modules, gives for a site; peft looks at the end of its path."""
    if isinstance(value, dict):
        return next((list(ids) for name, ids in value.items() if path.endswith(name)), [])
    return list(value) if isinstance(value, list) else []


def input_embedding(base: Base) -> str | None:
    """The table that token ids are looked up in."""
    tables = (path for path, spec in base.sites.items() if spec.kind is SiteKind.EMBEDDING)
    return next((path for path in tables if base.sites[path].in_features == base.shape.vocab_size), None)


def shape_of_rows(spec: SiteSpec, ids: list[int], field: str) -> tuple[int, int]:
    """The shape the stored rows must have. Raises `AdapterInvalid` where the site has no such rows."""
    place = f"{CONFIG_FILE}: {field}"
    if spec.kind not in KINDS:
        reason = f"names {spec.path}, a {spec.kind} module; only embeddings and heads have token rows"
        raise AdapterInvalid([Refusal(place, reason)])
    num_rows, width = spec.out_features, spec.in_features
    if spec.kind is SiteKind.EMBEDDING:
        num_rows, width = width, num_rows
    if not ids:
        raise AdapterInvalid([Refusal(place, f"names no token ids for {spec.path}, which has trained rows")])
    if max(ids) >= num_rows:
        reason = f"holds id {max(ids)}; {spec.path} of the served base has {num_rows} rows; serve the resized base"
        raise AdapterInvalid([Refusal(place, reason)])
    return len(ids), width


def rows_edit(ids: list[int], values_ND: Tensor) -> Affine:
    return Affine(rows=Rows(torch.tensor(ids, dtype=torch.int64), values_ND))


def spread(edits: Mapping[str, Edit], base: Base) -> dict[str, Edit]:
    """The edits with the rows of the input embedding at each site that shares its weight, as tying has it in peft.

    Raises `AdapterInvalid` where a site that shares the weight is replaced, or has other values for the same ids.
    """
    spread_edits = dict(edits)
    source = input_embedding(base)
    edit = None if source is None else edits.get(source)
    if source is None or not isinstance(edit, Affine) or edit.rows is None:
        return spread_edits
    for path in sorted(tie_partners(base, source)):
        spread_edits[path] = _with_rows(edits.get(path), edit.rows, path, source)
    return spread_edits


def _with_rows(edit: Edit | None, rows: Rows, path: str, source: str) -> Edit:
    if edit is None:
        return Affine(rows=rows)
    if not isinstance(edit, Affine):
        reason = f"is retrained and shares its weight with {source}, whose rows are trained; train one of them"
        raise AdapterInvalid([Refusal(path, reason)])
    if edit.out_scale is not None:
        reason = f"has lengths that were learned with a weight whose rows were trained at {source}; train without DoRA"
        raise AdapterInvalid([Refusal(path, reason)])
    if edit.rows is None:
        return replace(edit, rows=rows)
    if torch.equal(edit.rows.ids_N, rows.ids_N) and not torch.equal(edit.rows.values_ND, rows.values_ND):
        raise AdapterInvalid([Refusal(path, f"shares its weight with {source} and has other values for the same rows")])
    return edit
