"""Which placement a name means."""

from __future__ import annotations

from random import Random

from peft_serve.placement.placements import MOST_ASKED, HashOrder, LeastLoaded, Placement, PlacementName, Shuffled
from peft_serve.placement.rendezvous import Ranks
from peft_serve.placement.residency import Bounds, ResidencyAware


def make_placement(
    name: PlacementName,
    rng: Random,
    *,
    bounds: Bounds | None = None,
    most: int = MOST_ASKED,
    ranks: Ranks | None = None,
) -> Placement:
    """The placement of this name.

    `bounds` are those of `residency`; `ranks` is what placements by hash remember, their own where there is none.
    """
    match name:
        case "residency":
            return ResidencyAware(rng, bounds=bounds, most=most, ranks=ranks)
        case "rendezvous":
            return HashOrder(rng, most=most, ranks=ranks)
        case "least-loaded":
            return LeastLoaded(rng, most=most)
        case "random":
            return Shuffled(rng, most=most)
