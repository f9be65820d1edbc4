"""The command: ``python3 -m loadtest gpu-check``. It imports neither torch nor what the other commands need, so that it
can say what is missing on a machine where half of that is."""

import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from loadtest.arguments import above_zero
from loadtest.gpu.parts import GROUPS, chosen
from loadtest.gpu.results import Results, Section, table
from loadtest.gpu.supervisor import NO_DEVICE, PROGRAM, NoDevice, Supervisor
from loadtest.machine import command_line, commit

_ENDED: Final = 128 + signal.SIGTERM
ABOUT: Final = "is this GPU served correctly, and how fast? Under ten minutes, results.json and table.md"


def add_options(parser: ArgumentParser) -> None:
    """The command's options."""
    out = "folder for results.json and table.md (default loadtest/results/gpu-DATE-TIME)"
    parser.add_argument("--out", type=Path, help=out)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it runs, proves no speed")
    parser.add_argument("--only", choices=GROUPS, help="only these parts, beside what the machine is")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu goes with --quick only")
    parser.add_argument("--minutes", type=above_zero, default=9.0, help="no part begins later (default 9)")
    parser.add_argument("--commit", help="what was checked, where git is not at hand to say it")


def run(
    parsed: Namespace, arguments: list[str], *, say: Callable[[str], None] = print, program: tuple[str, ...] = PROGRAM
) -> int:
    """Check, file and print; the exit status: 0, 1 where something is wrong, 2 where the device is not there.

    `program` stands in for the process that runs the parts."""
    if parsed.device == "cpu" and not parsed.quick:
        say("gpu-check: on a CPU there is --quick only, which shows that the program runs")
        return NO_DEVICE
    missing = [name for name in ("torch", "transformers", "numpy") if find_spec(name) is None]
    if missing:
        say(f"gpu-check: {', '.join(missing)} is not installed, and nothing can be checked without it")
        return NO_DEVICE
    began_s, now = time.time(), datetime.now()
    checked = parsed.commit or commit()
    folder = parsed.out or Path("loadtest/results") / f"gpu-{now:%Y%m%d-%H%M%S}"

    def results(sections: tuple[Section, ...]) -> Results:
        return Results(
            date=f"{now:%Y-%m-%d %H:%M}",
            commit=checked,
            command=command_line(arguments),
            device=parsed.device,
            is_quick=parsed.quick,
            seconds=time.time() - began_s,
            sections=sections,
        )

    supervisor = Supervisor(
        folder / "parts",
        device=parsed.device,
        is_quick=parsed.quick,
        until_s=began_s + 60 * parsed.minutes,
        say=say,
        file=lambda sections: results(sections).file(folder),
        program=program,
    )
    try:
        found = results(supervisor.run(chosen(parsed.only)))
    except NoDevice as problem:
        say(f"gpu-check: {problem}")
        _tidy(folder, keeps_log=False)
        return NO_DEVICE
    _tidy(folder, keeps_log=True)
    found.file(folder)
    say(f"\n{table(found)}")
    say(f"Filed in {folder}: results.json, table.md, child.log.")
    return int(found.is_wrong)


def _tidy(folder: Path, *, keeps_log: bool) -> None:
    """Nothing is left of what passed between the processes but what the other one said, if that is wanted."""
    parts = folder / "parts"
    log = parts / "child.log"
    if keeps_log and log.exists():
        log.replace(folder / "child.log")
    for left in (log, parts / "job.json"):
        left.unlink(missing_ok=True)
    for empty in (parts, folder):
        if empty.exists() and not any(empty.iterdir()):
            empty.rmdir()


def parser() -> ArgumentParser:
    """Of the command by itself."""
    made = ArgumentParser(prog="python -m loadtest gpu-check", description=ABOUT)
    add_options(made)
    return made


def main(arguments: list[str]) -> int:
    """The command by itself, without the others' parser; `arguments` begin behind its name."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_ENDED))  # so that the process that has the GPU is ended, too
    return run(parser().parse_args(arguments), ["gpu-check", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
