"""An adapter's edits, put into the terms of its sites and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from peft_serve.adapters.primitives import Edit
from peft_serve.model.sites_forward import Site
from peft_serve.model.terms.low_rank import LowRankDelta

Waits = Mapping[Site, Callable[[], None]]
"""Has the device wait for a site's low-rank factors, where an adapter is on its way to it."""


def put_all(slot: int, edits: Mapping[Site, Edit], waits: Waits) -> None:
    """Tell every term what concerns it. Low-rank factors on their way are waited for when a pass comes to the site."""
    with torch.inference_mode():
        for site, edit in edits.items():
            for term in site.terms:
                if isinstance(term, LowRankDelta) and site in waits:
                    term.put_early(slot, edit, waits[site])
                else:
                    term.put(slot, edit)


def drop_all(slot: int, sites: Iterable[Site]) -> None:
    """Have every term forget the slot."""
    with torch.inference_mode():
        for site in sites:
            site.forget()
            for term in site.terms:
                term.drop(slot)
