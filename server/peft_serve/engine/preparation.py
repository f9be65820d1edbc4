"""Preparation: what can be done to an adapter before a step needs it, on the thread that loads it.

A step's own thread is then left with putting it into its slot: it has been looked over for the base's sites, and what
it asks of the device is known. Safe from any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from weakref import WeakKeyDictionary

from peft_serve.adapters.primitives import Adapter
from peft_serve.core import AdapterId, Footprint
from peft_serve.model.base import ResidentBase
from peft_serve.model.carrier import Carrier


class Preparation:
    """Loads by `load`, for one base; remembers what it found as long as the adapter is somewhere."""

    def __init__(
        self, base: ResidentBase, load: Callable[[AdapterId], Adapter], carrier: Carrier | None = None
    ) -> None:
        """With a `carrier` adapters lie among the KV blocks, and take whole ones."""
        self._base = base
        self._load = load
        self._carrier = carrier
        self._footprints: WeakKeyDictionary[Adapter, Footprint] = WeakKeyDictionary()

    def load(self, adapter_id: AdapterId) -> Adapter:
        """The adapter, prepared; raises as `load` does."""
        adapter = self._load(adapter_id)
        with suppress(ValueError):  # the install says so, to those who wait for it
            self._base.adapted.vet(adapter)
        self.footprint(adapter)
        return adapter

    def footprint(self, adapter: Adapter) -> Footprint:
        """What the adapter asks of the device when it is resident."""
        found = self._footprints.get(adapter)
        if found is None:
            shape = self._base.shape
            found = adapter.footprint(is_encoder_decoder=shape.is_encoder_decoder, is_encoder=shape.is_encoder)
            if self._carrier is not None:
                runs, num_bytes = self._carrier.room_for(adapter)
                found = replace(found, runs=runs, num_bytes=num_bytes)
            self._footprints[adapter] = found
        return found
