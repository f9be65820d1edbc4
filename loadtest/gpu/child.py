"""The process that runs parts: ``python -m loadtest.gpu.child JOB.json``. See `supervisor`, which starts it."""

import gc
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from loadtest.gpu.ground import Ground
from loadtest.gpu.parts import Part, named, share_s
from loadtest.gpu.results import Found, Section, write_section
from loadtest.gpu.supervisor import NO_DEVICE, POISONED, Job

_LEAST_S: Final = 0.5


def run(job: Job, ground: Ground, *, parts: tuple[Part, ...], clock: Callable[[], float] = time.time) -> int:
    """Run the parts and write each one's section; the process's status. `clock` is that of the job."""
    for place, part in enumerate(parts):
        section = _section(part, ground, own_s=share_s(parts[place:], job.until_s - clock()))
        if ground.is_gpu:
            gc.collect()  # runners and bases refer to each other, and hold the device's memory
        write_section(section, Path(job.folder) / f"{part.name.replace(' ', '-')}.json")
        if section.state == "failed" and not _is_usable(ground):
            return POISONED
    return 0


def _section(part: Part, ground: Ground, *, own_s: float) -> Section:
    lacks = part.lacks()
    if lacks:
        return _left_out(part, f"{', '.join(lacks)} is not installed")
    if part.is_for_gpu and not ground.is_gpu:
        return _left_out(part, "it has a meaning on a GPU only")
    if own_s < _LEAST_S:
        return _left_out(part, "no time was left for it")
    began_s = ground.clock()
    ground.until_s = began_s + own_s
    try:
        found: Found = part.function()(ground)
    except Exception as error:  # noqa: BLE001  # whatever it is, the other parts are run
        traceback.print_exc()
        reason = f"{type(error).__name__}: {str(error).strip()[:500] or 'it says nothing'}"
        seconds = ground.clock() - began_s
        ground.bases.drop()
        return Section(name=part.name, group=part.group, state="failed", reason=reason, seconds=seconds)
    return Section(name=part.name, group=part.group, state="done", seconds=ground.clock() - began_s, found=found)


def _left_out(part: Part, reason: str) -> Section:
    return Section(name=part.name, group=part.group, state="left out", reason=reason)


def _is_usable(ground: Ground) -> bool:
    """Whether the device still computes: a fault leaves a process without it."""
    try:
        torch.ones(1, device=ground.device).add_(1).item()
        ground.settle()
    except RuntimeError:
        return False
    return True


def main(arguments: list[str]) -> int:
    """Read the job's file and run it."""
    fields = json.loads(Path(arguments[0]).read_text())
    job = Job(**{**fields, "parts": tuple(fields["parts"])})
    if job.device == "cuda" and not torch.cuda.is_available():
        print("no GPU that torch can use is here; --device cpu --quick shows that the program runs")
        return NO_DEVICE
    torch.set_num_threads(1)  # what the CPU computes here is tiny, and more threads only wait for each other
    ground = Ground(device=torch.device(job.device), is_quick=job.is_quick)
    return run(job, ground, parts=named(job.parts))


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    sys.exit(main(sys.argv[1:]))
