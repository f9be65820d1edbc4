"""peft's own loops over a trace, for W5: ``python -m loadtest.peft_loops JOB.json ANSWER.json``.

Runs in a process of its own, so that memory and threads are not shared with the load client. Every adapter is
loaded before the clock starts; answers are greedy and exactly as long as asked for. Rows are padded on the left,
and a batch runs as far as its longest answer; only the tokens that were asked for count. A token's time is when
its step ended: what a user would see if the loop streamed, which plain ``generate`` does not.
"""

import io
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from loadtest.peft_plan import Mode, PeftBatch, next_batch, plan_batches
from loadtest.trace import BASE, Trace, TraceRequest

BASE_ROW = "__base__"
"""What peft's ``adapter_names`` calls a row without an adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftJob:
    """What one process is to run; folders and files as text, so that it can be written as JSON. `paced` keeps the
    trace's arrival times; otherwise everything is there from the start."""

    base: str
    adapters: str
    trace: str
    mode: Mode
    batch_size: int = 16
    window: int = 0
    num_threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    paced: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftAnswer:
    """What came out: seconds for the whole trace, tokens that were asked for, and for each request its token ids,
    when each token was there and when its batch began, in seconds from the start."""

    seconds: float
    num_tokens: int
    num_batches: int
    tokens: dict[int, list[int]]
    times_s: dict[int, list[float]] = field(default_factory=dict)
    begun_s: dict[int, float] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        """Asked-for tokens a second."""
        return self.num_tokens / self.seconds


class StepTimes(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed here
    """Notes when each step of ``generate`` ends, and stops it after the step that ends at `until_s` or later."""

    def __init__(self, clock: Callable[[], float], device: torch.device, until_s: float = inf) -> None:
        """`clock` gives seconds."""
        self.times_s: list[float] = []
        self._until_s = until_s
        self._clock = clock
        self._device = device

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Called by ``generate`` after each step; one answer a row, the same for all."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # generate itself waits here for the step, one line on
        self.times_s.append(self._clock())
        is_over = self.times_s[-1] >= self._until_s
        return torch.full((input_ids.shape[0],), is_over, dtype=torch.bool, device=input_ids.device)


class PeftLoop:
    """A base model with every adapter of a trace resident in peft."""

    def __init__(self, job: PeftJob, names: list[str], *, clock: Callable[[], float] = time.perf_counter) -> None:
        """Load the base, the tokenizer and the adapters `names`. `clock` gives seconds."""
        self._tokenizer = AutoTokenizer.from_pretrained(job.base, padding_side="left")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        model: Any = AutoModelForCausalLM.from_pretrained(job.base, dtype=getattr(torch, job.dtype))
        self._device = torch.device(job.device)
        model.to(self._device)
        self.load_times_s: list[float] = []
        """How long each adapter took to load."""
        for number, name in enumerate(names):
            began, folder = clock(), Path(job.adapters) / name
            if number == 0:
                model = PeftModel.from_pretrained(model, folder, adapter_name=name)
            else:
                model.load_adapter(folder, adapter_name=name)
            self.load_times_s.append(clock() - began)
        self._model = model.eval()
        self._has_adapters = bool(names)
        self._clock = clock
        self.step_times_s: list[float] = []
        """When each step of the last batch ended, on the clock."""

    def answer(self, batch: PeftBatch, *, num_tokens: int | None = None, until_s: float = inf) -> dict[int, list[int]]:
        """Token ids of each request of the batch, cut to what it asked for, and at the time `until_s` of the clock."""
        encoded = self._tokenizer([request.text for request in batch.requests], padding=True, return_tensors="pt")
        width = encoded["input_ids"].shape[1]
        extra: dict[str, Any] = {}
        if batch.by_names and self._has_adapters:
            extra["adapter_names"] = [request.adapter or BASE_ROW for request in batch.requests]
        steps = StepTimes(self._clock, self._device, until_s)
        with self._choose(batch), torch.inference_mode():
            ids = self._model.generate(
                input_ids=encoded["input_ids"].to(self._device),
                attention_mask=encoded["attention_mask"].to(self._device),
                do_sample=False,
                max_new_tokens=num_tokens or batch.answer_tokens,
                eos_token_id=None,  # nothing ends an answer early, as with ignore_eos
                pad_token_id=self._tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList([steps]),
                **extra,
            )
        self.step_times_s = steps.times_s
        rows = ids[:, width:].tolist()
        return {request.index: row[: request.max_new_tokens] for request, row in zip(batch.requests, rows, strict=True)}

    def _choose(self, batch: PeftBatch) -> AbstractContextManager[Any]:
        if batch.by_names or not self._has_adapters:
            return nullcontext()
        if batch.requests[0].adapter == BASE:
            context: AbstractContextManager[Any] = self._model.disable_adapter()
            return context
        self._model.set_adapter(batch.requests[0].adapter)
        return nullcontext()


def run_job(
    job: PeftJob,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    on_done: Callable[[int], None] = lambda _: None,
) -> PeftAnswer:
    """Run a job in this process, after one short warm-up batch that is not timed. `on_done` is told after each
    batch how many requests it answered."""
    torch.set_num_threads(job.num_threads)
    trace = Trace.load(Path(job.trace))
    if not trace.requests:
        raise ValueError(f"the trace {job.trace} holds no requests")
    loop = PeftLoop(job, trace.adapters, clock=clock)
    warm = next_batch(trace.requests, job.mode, batch_size=job.batch_size, window=job.window)
    loop.answer(warm, num_tokens=2)
    tokens: dict[int, list[int]] = {}
    times_s: dict[int, list[float]] = {}
    begun_s: dict[int, float] = {}
    num_batches = 0
    began = clock()
    batches = _as_they_come(job, trace, lambda: clock() - began, sleep) if job.paced else _backlog(job, trace)
    for batch in batches:
        begun_s |= dict.fromkeys((request.index for request in batch.requests), clock() - began)
        tokens |= loop.answer(batch)
        steps_s = [when - began for when in loop.step_times_s]
        times_s |= {request.index: steps_s[: request.max_new_tokens] for request in batch.requests}
        num_batches += 1
        on_done(len(batch.requests))
    return PeftAnswer(
        seconds=clock() - began,
        num_tokens=trace.answer_tokens,
        num_batches=num_batches,
        tokens=tokens,
        times_s=times_s,
        begun_s=begun_s,
    )


def _backlog(job: PeftJob, trace: Trace) -> Iterator[PeftBatch]:
    yield from plan_batches(trace.requests, job.mode, batch_size=job.batch_size, window=job.window)


def _as_they_come(
    job: PeftJob, trace: Trace, now: Callable[[], float], sleep: Callable[[float], None]
) -> Iterator[PeftBatch]:
    coming = deque(sorted(trace.requests, key=lambda request: request.arrival_s))
    waiting: list[TraceRequest] = []
    while coming or waiting:
        if not waiting:
            sleep(max(0.0, coming[0].arrival_s - now()))
            waiting.append(coming.popleft())
        while coming and coming[0].arrival_s <= now():
            waiting.append(coming.popleft())
        batch = next_batch(waiting, job.mode, batch_size=job.batch_size, window=job.window)
        taken = {request.index for request in batch.requests}
        waiting = [request for request in waiting if request.index not in taken]
        yield batch


PROGRAM = (sys.executable, "-m", "loadtest.peft_loops")


def run_in_subprocess(
    job: PeftJob,
    folder: Path,
    *,
    program: tuple[str, ...] = PROGRAM,
    on_done: Callable[[], None] = lambda: None,
) -> PeftAnswer:
    """Run a job in a process of its own; its files are left in `folder`, and `on_done` is called for each request
    answered. RuntimeError, with the end of what it said, if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    question, answer, log = (folder / f"peft-{job.mode}{end}" for end in ("-job.json", "-answer.json", ".log"))
    question.write_text(json.dumps(asdict(job)))
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.num_threads), "TRANSFORMERS_VERBOSITY": "error"}
    command = [*program, str(question), str(answer)]
    with log.open("wb") as said:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=said, text=True)
        try:
            with process.stdout or io.StringIO() as lines:
                for line in lines:
                    for _ in range(int(line) if line.strip().isdecimal() else 0):
                        on_done()
        finally:
            if sys.exc_info()[0] is not None:  # stopped from outside: leave no loop behind
                process.kill()
            code = process.wait()
    if code:
        raise RuntimeError(f"peft's loop {job.mode!r} failed:\n{log.read_text(errors='replace')[-2000:]}")
    fields = json.loads(answer.read_text())
    for name in ("tokens", "times_s", "begun_s"):  # JSON's keys are text
        fields[name] = {int(index): value for index, value in fields[name].items()}
    return PeftAnswer(**fields)


def main(arguments: list[str]) -> int:
    """Read the job's file, run it, write the answer's file; prints the size of each batch that is done."""
    question, answer = map(Path, arguments)
    job = PeftJob(**json.loads(question.read_text()))
    answer.write_text(json.dumps(asdict(run_job(job, on_done=lambda count: print(count, flush=True)))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
