"""Notes: sentences that hold a figure against a target it must not exceed; `report.against` has the other kind."""

from math import isnan


def at_most(label: str, value: float, target: float) -> str:
    """What the figure is, and whether it keeps below the target."""
    if isnan(value):
        return f"{label}: not measured (target at most {target:g})"
    return f"{label} = {value:.3f}, target at most {target:g}: {'met' if value <= target else 'missed'}"
