"""Slopes: what a figure does over a long time, told by the median of all slopes (Theil and Sen), so that single
outliers, however large, do not count.

The median of all pairs takes the square of the points: many points are first put together, neighbours by their median.
"""

from collections.abc import Sequence
from statistics import median

import numpy as np

Points = Sequence[tuple[float, float]]

MOST_POINTS = 400


def theil_sen(points: Points) -> float:
    """The median slope over all pairs of points, y for each x; 0 of fewer than two."""
    if len(points) < 2:
        return 0.0
    x, y = np.array(thinned(points), dtype=float).T
    first, second = np.triu_indices(len(x), k=1)
    apart = x[second] - x[first]
    rises = (y[second] - y[first])[apart > 0]
    return float(np.median(rises / apart[apart > 0])) if len(rises) else 0.0


def thinned(points: Points, *, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most so many points: the medians of neighbours."""
    size = -(-len(points) // most)
    lots = [points[i : i + size] for i in range(0, len(points), size)]
    return [(median(x for x, _ in lot), median(y for _, y in lot)) for lot in lots]


def growth(points: Points) -> float:
    """What the slope comes to from the first point to the last."""
    return theil_sen(points) * (points[-1][0] - points[0][0]) if points else 0.0
