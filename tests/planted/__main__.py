"""``python -m tests.planted run [WORD]``: plant faults in a copy of the tree, and see that tests turn red.

WORD picks the faults whose names hold it. ``list`` says what there is.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.planted.faults import FAULTS
from tests.planted.planting import Planting, run_all

ROOT = Path(__file__).resolve().parents[2]


def main(words: list[str]) -> int:
    """Answers with the exit status: 0 if every fault was noticed."""
    if not words or words[0] not in ("run", "list"):
        print(__doc__)
        return 2
    faults = [fault for fault in FAULTS if all(word in fault.name for word in words[1:])]
    if words[0] == "list" or not faults:
        print("\n".join(fault.name for fault in faults) or "there is no such fault")
        return 0 if faults else 2
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        is_fine = run_all(Planting(ROOT, Path(folder)), faults, lambda text: print(text, flush=True))
    print(f"{len(faults)} faults: {'each turns a test red' if is_fine else 'NOT all are noticed'}")
    return 0 if is_fine else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
