"""Many simulated days: `python -m tests.scheduling.campaign --seeds 100000 --first 2000`.

Each seed that fails is told with what it broke; the exit status is 1 if one did. A failing seed is replayed by
`--first SEED --seeds 1`.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from tests.scheduling.simulated import simulate

_TOLD = 20


def campaign(seeds: range) -> tuple[Counter[str], dict[int, str]]:
    """The sums of what the days saw, and what each failing seed broke."""
    sums: Counter[str] = Counter()
    broken: dict[int, str] = {}
    for seed in seeds:
        try:
            sums.update(asdict(simulate(seed)))
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the seed's finding
            broken[seed] = f"{type(error).__name__}: {error}"
    return sums, broken


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Simulated days of the scheduler.")
    parser.add_argument("--seeds", type=int, default=2000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    given = parser.parse_args(arguments)
    sums, broken = campaign(range(given.first, given.first + given.seeds))
    for name, total in sums.items():
        print(f"{name:18} {total}")
    for seed, what in list(broken.items())[:_TOLD]:
        print(f"seed {seed}: {what}")
    print(f"{len(broken)} of {given.seeds} seeds failed")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
