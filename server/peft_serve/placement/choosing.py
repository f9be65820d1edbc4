"""Which placement a name means."""

from __future__ import annotations

from random import Random

from peft_serve.placement.placements import HashOrder, LeastLoaded, Placement, PlacementName, Shuffled
from peft_serve.placement.residency import Bounds, ResidencyAware


def make_placement(name: PlacementName, rng: Random, *, bounds: Bounds | None = None) -> Placement:
    """The placement of this name. `bounds` are those of `residency`; the others have none."""
    match name:
        case "residency":
            return ResidencyAware(rng, bounds=bounds)
        case "rendezvous":
            return HashOrder(rng)
        case "least-loaded":
            return LeastLoaded(rng)
        case "random":
            return Shuffled(rng)
