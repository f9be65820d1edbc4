"""The whole campaign against the gate: `python -m tests.attacks.campaign`, from the root of the checkout.

For one checkpoint of each served type, every byte of config and header is changed, one at a time; beside that,
configs come out of a seeded generator. Each upload is refused with a place and a reason, or is the honest adapter bit
by bit, or differs in a field that no tensor can contradict. After each type the base's bits and the answer to a fixed
request are compared with what they were. Takes about ten minutes on one core; a test runs a sample of it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from peft_serve.adapters.records import CheckpointFiles
from tests.attacks import byte_changes, config_maker
from tests.attacks.golden_row import fingerprint, golden_row
from tests.attacks.subjects import METHOD_OF
from tests.attacks.trials import BAD, Subject

SLOWEST_S = 0.1
MAX_TOLD = 20


@dataclass(slots=True, kw_only=True)
class Report:
    """What became of all uploads; `is_clean` says whether nothing went wrong."""

    seed: int
    num_byte_changes: int = 0
    num_configs: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    slowest_ms: float = 0.0
    slowest: str = ""
    num_slow: int = 0
    faults: list[str] = field(default_factory=list)
    unchanged: int = 0  # types after which base and golden row were as before
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        return not self.faults and not self.num_slow


def attack(peft_type: str, report: Report, *, share: float, num_configs: int) -> None:
    """Try a share of all byte changes, and so many configs, against one type."""
    rng = random.Random(f"{report.seed} {peft_type}")
    subject = Subject(peft_type)
    bits, row = fingerprint(subject.base), golden_row(subject)
    for what, files in _uploads(subject, rng, report, share=share, num_configs=num_configs):
        trial = subject.judge(files)
        report.outcomes[trial.outcome.value] = report.outcomes.get(trial.outcome.value, 0) + 1
        if trial.gate_s * 1000 > report.slowest_ms:
            report.slowest_ms, report.slowest = round(trial.gate_s * 1000, 2), f"{peft_type} {what}"
        report.num_slow += trial.gate_s > SLOWEST_S
        if trial.outcome in BAD and len(report.faults) < MAX_TOLD:
            report.faults.append(f"{peft_type} {what}: {trial.outcome} {trial.detail} {files.config!r}"[:2000])
    if fingerprint(subject.base) != bits or golden_row(subject) != row:
        report.faults.append(f"{peft_type}: the base or the golden row changed")
    else:
        report.unchanged += 1


def _uploads(
    subject: Subject, rng: random.Random, report: Report, *, share: float, num_configs: int
) -> Iterator[tuple[str, CheckpointFiles]]:
    everywhere = list(byte_changes.places(subject.files))
    chosen = everywhere if share >= 1 else rng.sample(everywhere, max(1, int(share * len(everywhere))))
    for where in chosen:
        report.num_byte_changes += 1
        yield f"{where[0]} byte {where[1]}", byte_changes.changed(subject.files, where, rng)
    for number in range(num_configs):
        report.num_configs += 1
        yield f"config {number}", config_maker.made(subject.peft_type, subject.files, rng)


def run(seed: int, *, share: float, num_configs: int, tell: bool = False) -> Report:
    """The campaign over every type, `num_configs` configs in all or a few more."""
    report, started = Report(seed=seed), time.perf_counter()
    each = -(-num_configs // len(METHOD_OF))
    for peft_type in sorted(METHOD_OF):
        attack(peft_type, report, share=share, num_configs=each)
        if tell:
            sys.stderr.write(f"{peft_type}: {report.outcomes}, {len(report.faults)} faults\n")
    report.seconds = round(time.perf_counter() - started, 1)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description="Hostile uploads of every served type against the gate.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--share", type=float, default=1.0, help="share of the byte changes that is tried; default all")
    parser.add_argument("--configs", type=int, default=10_000, help="generated configs in all")
    parser.add_argument("--json", type=Path, help="file for the result; default standard output")
    given = parser.parse_args()
    report = run(given.seed, share=given.share, num_configs=given.configs, tell=True)
    text = json.dumps({**asdict(report), "is_clean": report.is_clean}, indent=2)
    if given.json is None:
        sys.stdout.write(text + "\n")
    else:
        given.json.write_text(text + "\n")
    return 0 if report.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
