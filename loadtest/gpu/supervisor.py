"""Runs the parts in a process beside this one, and goes on with the next part where that process dies or hangs.

A fault of a kernel leaves a GPU's context unusable for the process that owns it, and a kernel that does not end is
ended with its process only. Knows no torch.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from loadtest.gpu.parts import Part, share_s
from loadtest.gpu.results import Section, read_section, told

_ROOT: Final = Path(__file__).resolve().parents[2]
PROGRAM: Final = (sys.executable, "-m", "loadtest.gpu.child")
NO_DEVICE: Final = 2
"""The child's status where the device asked for is not there."""

POISONED: Final = 3
"""Its status where it left off because the device is of no more use to it; what it began is told."""

_START_S: Final = 120.0  # importing torch and transformers from a cold disk
_OVER: Final = 1.5  # a part that is asked to end by then is ended at so many times its share of the time, or when
_GRACE_S: Final = 20.0  # all is to be over, and these seconds: kernels are compiled, and a step is not interrupted
_LOOK_S: Final = 0.05

Process = subprocess.Popen[bytes]


class NoDevice(RuntimeError):  # noqa: N818  named as what is the matter
    """The device asked for is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one process is to run, as it is written down for it."""

    parts: tuple[str, ...]
    device: str
    is_quick: bool
    folder: str
    until_s: float  # on the clock of time.time, which processes share


class Supervisor:
    """Runs parts one after the other and keeps what came of each."""

    def __init__(
        self,
        folder: Path,
        *,
        device: str,
        is_quick: bool,
        until_s: float,
        say: Callable[[str], None] = print,
        file: Callable[[tuple[Section, ...]], None] = lambda _: None,
        program: Sequence[str] = PROGRAM,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        grace_s: float = _GRACE_S,
    ) -> None:
        """Sections pass through `folder`. `until_s` is when all is to be over, on `clock`, which is time.time or a
        clock like it; `program` takes the path of a `Job`. `file` is given what there is behind each part: whoever
        ends this process early has that."""
        self._folder = folder
        self._device = device
        self._is_quick = is_quick
        self._until_s = until_s
        self._say = say
        self._file = file
        self._program = tuple(program)
        self._clock = clock
        self._sleep = sleep
        self._grace_s = grace_s

    def run(self, parts: Sequence[Part]) -> tuple[Section, ...]:
        """A section for each part. Raises `NoDevice`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        sections: list[Section] = []
        while len(sections) < len(parts):
            left = parts[len(sections) :]
            if sections and self._clock() >= self._until_s:  # nor is a process begun that would only say so
                sections += [_not_reached(part, "no time was left for it") for part in left]
                break
            sections += self._run_some(left, tuple(sections))
        return tuple(sections)

    def _run_some(self, parts: Sequence[Part], before: tuple[Section, ...]) -> list[Section]:
        """The sections of one process: of all parts, or of those up to the one that ended it; one at least."""
        path, log = self._folder / "job.json", self._folder / "child.log"
        path.write_text(json.dumps(asdict(self._job(parts))))
        sections: list[Section] = []
        with log.open("ab") as said:
            process = subprocess.Popen(
                [*self._program, str(path)], stdout=said, stderr=subprocess.STDOUT, env=self._environment()
            )
        try:
            for place, part in enumerate(parts):
                section = self._next(process, parts[place:], log, is_first=not sections)
                if section is None:
                    break
                sections.append(section)
                self._say(told(section))
                missing = [_not_reached(each, "the check was ended before it") for each in parts[len(sections) :]]
                self._file((*before, *sections, *missing))
                if not self._path(part).exists():  # it ended the process
                    break
                self._path(part).unlink()
        finally:
            if len(sections) < len(parts):
                process.kill()
            process.wait()
        return sections

    def _job(self, parts: Sequence[Part]) -> Job:
        return Job(
            parts=tuple(part.name for part in parts),
            device=self._device,
            is_quick=self._is_quick,
            folder=str(self._folder),
            until_s=self._until_s,
        )

    def _environment(self) -> dict[str, str]:
        """This checkout's packages come first, wherever the command was started. On a CPU Triton runs kernels by its
        interpreter, and is to know before it is imported."""
        paths = [str(_ROOT / "server"), str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        interpret = "1" if self._device == "cpu" else "0"
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": interpret}

    def _next(self, process: Process, parts: Sequence[Part], log: Path, *, is_first: bool) -> Section | None:
        """The section of the first part, as the process wrote it or as its end explains; None if it left off before.
        The parts are those that share what time is left."""
        part, began_s = parts[0], self._clock()
        own_s = share_s(parts, max(0.0, self._until_s - began_s))
        start_s = began_s + (_START_S if is_first else 0.0)
        latest_s = min(start_s + _OVER * own_s, max(self._until_s, start_s)) + self._grace_s
        path = self._path(part)
        while not path.exists():
            status, now_s = process.poll(), self._clock()
            if status is not None and not path.exists():
                return self._without(part, status, now_s - began_s, log, is_first=is_first)
            if now_s > latest_s:
                process.kill()
                process.wait()
                return _failed(part, f"it was ended after {now_s - began_s:.0f} s", now_s - began_s)
            self._sleep(_LOOK_S)
        return read_section(path)

    def _without(self, part: Part, status: int, seconds: float, log: Path, *, is_first: bool) -> Section | None:
        said = log.read_text(errors="replace").strip().splitlines()
        last = said[-1] if said else "it said nothing"
        if status == NO_DEVICE:
            raise NoDevice(last)
        if status == POISONED and not is_first:
            return None
        return _failed(part, f"its process ended with status {status}: {last[:300]}", seconds)

    def _path(self, part: Part) -> Path:
        return self._folder / f"{part.name.replace(' ', '-')}.json"


def _not_reached(part: Part, reason: str) -> Section:
    return Section(name=part.name, group=part.group, state="left out", reason=reason)


def _failed(part: Part, reason: str, seconds: float) -> Section:
    return Section(name=part.name, group=part.group, state="failed", reason=reason, seconds=seconds)
