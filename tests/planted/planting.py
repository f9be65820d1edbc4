"""Planting: a copy of the tree, one fault at a time in it, and what the tests say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tests.planted.faults import Fault

COPIED = ("server", "tests", "adapters", "docs", "deploy", "loadtest", "pyproject.toml", "README.md", "Makefile")
LEFT_OUT = ("__pycache__", "work", "results", ".*", "node_modules")
LONGEST_S = 240.0
ALL_PASSED, SOME_FAILED = 0, 1  # pytest's own exit codes


class Colour(StrEnum):
    """What the tests said. Only RED shows that a fault is noticed, and only GREEN that nothing else was."""

    GREEN = "green"
    RED = "red"
    BROKEN = "broken"  # they did not run


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What came of a run of tests."""

    colour: Colour
    seconds: float
    said: str


class Planting:
    """A copy of the tree `root` in `folder`."""

    def __init__(self, root: Path, folder: Path) -> None:
        self._folder = folder
        for name in COPIED:
            source, target = root / name, folder / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns(*LEFT_OUT))
            elif source.exists():
                shutil.copy2(source, target)

    def sound(self, tests: Sequence[str]) -> Found:
        """Run tests of the tree as it is."""
        return self._run(tests, timeout_s=4 * LONGEST_S)

    def plant(self, fault: Fault) -> Found:
        """Run a fault's tests on the tree with the fault in it; the tree is sound again afterwards."""
        path = self._folder / "server" / "peft_serve" / fault.file
        sound = path.read_text()
        path.write_text(planted(sound, fault))
        try:
            return self._run(fault.tests)
        finally:
            path.write_text(sound)

    def _run(self, tests: Sequence[str], *, timeout_s: float = LONGEST_S) -> Found:
        began = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
        try:
            done = subprocess.run(
                command, cwd=self._folder, env=self._environment(), capture_output=True, text=True, timeout=timeout_s
            )
        except subprocess.TimeoutExpired:
            return Found(colour=Colour.RED, seconds=timeout_s, said=f"not over after {timeout_s:.0f} s")
        said = (done.stdout + done.stderr)[-2000:]
        colours = {ALL_PASSED: Colour.GREEN, SOME_FAILED: Colour.RED}
        colour = colours.get(done.returncode, Colour.BROKEN)
        return Found(colour=colour, seconds=time.monotonic() - began, said=said)

    def _environment(self) -> dict[str, str]:
        """The copy's package in front of the installed one, and no bytecode that an edit could be too quick for."""
        return {
            **os.environ,
            "PYTHONPATH": str(self._folder / "server"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }


def planted(text: str, fault: Fault) -> str:
    """A file's text with the fault in it; ValueError if the place is not there, or there are several."""
    found = text.count(fault.old)
    if found != 1:
        raise ValueError(
            f"'{fault.name}': its text occurs {found} times in {fault.file}; write the fault for the code as it is now"
        )
    return text.replace(fault.old, fault.new)


def run_all(planting: Planting, faults: Sequence[Fault], say: Callable[[str], None]) -> bool:
    """Plant each fault in turn; whether the tests are green without any and red with each."""
    files = dict.fromkeys(word for fault in faults for word in fault.tests if word.startswith("tests/"))
    found = planting.sound(tuple(files))
    if found.colour is not Colour.GREEN:
        say(f"without a fault the tests are {found.colour}:\n{found.said}")
        return False
    say("without a fault everything is green")
    is_fine = True
    for fault in faults:
        found = planting.plant(fault)
        say(f"{found.colour:6} {found.seconds:6.1f} s  {fault.name}")
        if found.colour is not Colour.RED:
            say(found.said)
            is_fine = False
    return is_fine
