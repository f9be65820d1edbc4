"""Arrivals: when the requests of an open-loop trace come in.

One global stream of gaps drawn from Gamma(shape 1/cv^2, scale cv^2/R): mean gap 1/R, coefficient of variation
cv. cv = 1 is a Poisson stream; above 1 the requests come in bursts.
"""

import numpy as np
from numpy.typing import NDArray


def arrival_times(*, rate_per_s: float, cv: float, duration_s: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Ascending times in [0, duration_s), in seconds from the start."""
    if rate_per_s <= 0 or cv <= 0:
        raise ValueError(f"rate ({rate_per_s}) and cv ({cv}) must be above zero")
    shape, scale = 1.0 / cv**2, cv**2 / rate_per_s
    drawn = np.empty(0, dtype=np.float64)
    while drawn.size == 0 or drawn[-1] < duration_s:
        start = 0.0 if drawn.size == 0 else float(drawn[-1])
        gaps = rng.gamma(shape, scale, size=max(64, int(rate_per_s * duration_s)))
        drawn = np.concatenate([drawn, start + np.cumsum(gaps)])
    return drawn[drawn < duration_s]
