"""peft's loops at hand: one process that holds the base and the adapters, and plays one trace after another.

``python -m loadtest.peft_worker JOB.json`` says a line of JSON when all is loaded (how long each adapter took) and then
answers each line it is given (a trace's file, a loop, a batch size, a limit in seconds) with one: tokens and times of
each request that was begun, in seconds from the start of that play. The end of its input ends it.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadtest.outcome import UNFINISHED, Outcome
from loadtest.peft_loops import PeftJob, PeftLoop
from loadtest.peft_plan import Mode, plan_batches
from loadtest.trace import Trace

PROGRAM = (sys.executable, "-m", "loadtest.peft_worker")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftWorker:
    """The process, ready. `load_times_s` are its adapters' times to load, in the order of their names."""

    process: subprocess.Popen[str]
    load_times_s: tuple[float, ...]

    def play(self, trace: Path, mode: Mode, *, batch_size: int, limit_s: float) -> dict[str, Any]:
        """One play: ``tokens``, ``times_s`` and ``begun_s`` by request. RuntimeError if the process has ended."""
        asked = {"trace": str(trace), "mode": mode, "batch_size": batch_size, "limit_s": limit_s}
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise RuntimeError("peft's loop has ended before its time; its log says why") from None
        return _line(self.process)


def _line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("peft's loop has ended before its time; its log says why")
    said: dict[str, Any] = json.loads(line)
    return said


@contextmanager
def peft_worker(
    job: PeftJob, names: list[str], folder: Path, *, label: str, program: tuple[str, ...] = PROGRAM
) -> Iterator[PeftWorker]:
    """Start the process with adapters `names` and end it; its files are left in `folder`. The job's trace, mode and
    batch size do not count. RuntimeError, with the end of what it said, if it does not come up."""
    folder.mkdir(parents=True, exist_ok=True)
    question, log = folder / f"{label}-job.json", folder / f"{label}.log"
    question.write_text(json.dumps({"job": asdict(job), "names": names}))
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.num_threads), "TRANSFORMERS_VERBOSITY": "error"}
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*program, str(question)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
    try:
        yield PeftWorker(process=process, load_times_s=tuple(_first(process, log)["load_times_s"]))
    finally:
        process.kill()  # it holds nothing that is worth waiting for
        process.communicate()


def _first(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    try:
        return _line(process)
    except RuntimeError:
        raise RuntimeError(f"peft's loop did not come up:\n{log.read_text(errors='replace')[-2000:]}") from None


def outcomes_of(trace: Trace, said: dict[str, Any], decode: Callable[[list[int]], str]) -> list[Outcome]:
    """Each request's outcome, all due at the start; what the limit cut off, or did not let begin, is unfinished."""
    outcomes = []
    for request in trace.requests:
        key = str(request.index)  # JSON's keys are text
        ids, times_s = said["tokens"].get(key, []), said["times_s"].get(key, [])
        whole = len(ids) == request.max_new_tokens
        outcomes.append(
            Outcome(
                index=request.index,
                adapter=request.adapter,
                due_s=0.0,
                sent_s=said["begun_s"].get(key, 0.0),
                end_s=times_s[-1] if times_s else 0.0,
                token_times_s=tuple(times_s),
                max_new_tokens=request.max_new_tokens,
                status=200 if whole else 0,
                error=None if whole else UNFINISHED,
                text=decode(ids),
            )
        )
    return outcomes


def play(loop: PeftLoop, trace: Trace, asked: dict[str, Any], clock: Callable[[], float]) -> dict[str, Any]:
    """Play a trace as `asked`: no batch begins at the limit or later, and one that runs then ends with its step."""
    said: dict[str, dict[int, Any]] = {"tokens": {}, "times_s": {}, "begun_s": {}}
    start = clock()
    for batch in plan_batches(trace.requests, asked["mode"], batch_size=asked["batch_size"]):
        begun_s = clock() - start
        if begun_s >= asked["limit_s"]:
            break
        answers = loop.answer(batch, until_s=start + asked["limit_s"])
        steps_s = [when - start for when in loop.step_times_s]
        for index, ids in answers.items():
            kept = ids[: len(steps_s)]
            said["tokens"][index], said["times_s"][index], said["begun_s"][index] = kept, steps_s[: len(kept)], begun_s
    return said


def main(arguments: list[str]) -> int:
    """Load what the job's file says, and answer the lines of standard input."""
    import torch

    given = json.loads(Path(arguments[0]).read_text())
    job = PeftJob(**given["job"])
    torch.set_num_threads(job.num_threads)
    loop = PeftLoop(job, given["names"], clock=time.perf_counter)
    print(json.dumps({"load_times_s": loop.load_times_s}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(play(loop, Trace.load(Path(asked["trace"])), asked, time.perf_counter)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
