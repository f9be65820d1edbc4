"""Two thousand simulated days: see `simulated`. More: `python -m tests.scheduling.campaign --seeds N`."""

from __future__ import annotations

import pytest

from tests.scheduling.campaign import campaign

NUM_SEEDS = 2000
_PARTS = 8


@pytest.mark.parametrize("part", range(_PARTS))
def test_everybody_gets_what_they_get_alone_on_every_day(part: int) -> None:
    size = NUM_SEEDS // _PARTS
    sums, broken = campaign(range(part * size, (part + 1) * size))
    assert not broken
    for name in ("num_refused", "num_late", "num_preempted", "num_failed_loads", "num_cancelled", "num_judged"):
        assert sums[name], f"no day has seen {name}"
