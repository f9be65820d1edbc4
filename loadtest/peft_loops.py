"""peft's own loops over a trace, for W5: ``python -m loadtest.peft_loops JOB.json ANSWER.json``.

Runs in a process of its own, so that memory and threads are not shared with the load client. Every adapter is
loaded before the clock starts; answers are greedy and exactly as long as asked for. Rows are padded on the left,
and a batch runs as far as its longest answer; only the tokens that were asked for count.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loadtest.peft_plan import Mode, PeftBatch, plan_batches
from loadtest.trace import BASE, Trace

BASE_ROW = "__base__"
"""What peft's ``adapter_names`` calls a row without an adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftJob:
    """What one process is to run; folders and files as text, so that it can be written as JSON."""

    base: str
    adapters: str
    trace: str
    mode: Mode
    batch_size: int = 16
    window: int = 0
    num_threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftAnswer:
    """What came out: seconds for the whole trace, tokens that were asked for, and each request's token ids."""

    seconds: float
    num_tokens: int
    num_batches: int
    tokens: dict[int, list[int]]

    @property
    def tokens_per_s(self) -> float:
        """Asked-for tokens a second."""
        return self.num_tokens / self.seconds


class PeftLoop:
    """A base model with every adapter of a trace resident in peft."""

    def __init__(self, job: PeftJob, names: list[str]) -> None:
        """Load the base, the tokenizer and the adapters `names`."""
        self._tokenizer = AutoTokenizer.from_pretrained(job.base, padding_side="left")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        model: Any = AutoModelForCausalLM.from_pretrained(job.base, dtype=getattr(torch, job.dtype))
        self._device = torch.device(job.device)
        model.to(self._device)
        for number, name in enumerate(names):
            folder = Path(job.adapters) / name
            if number == 0:
                model = PeftModel.from_pretrained(model, folder, adapter_name=name)
            else:
                model.load_adapter(folder, adapter_name=name)
        self._model = model.eval()
        self._has_adapters = bool(names)

    def answer(self, batch: PeftBatch, *, num_tokens: int | None = None) -> dict[int, list[int]]:
        """Token ids of each request of the batch, cut to what it asked for."""
        encoded = self._tokenizer([request.text for request in batch.requests], padding=True, return_tensors="pt")
        width = encoded["input_ids"].shape[1]
        extra: dict[str, Any] = {}
        if batch.by_names and self._has_adapters:
            extra["adapter_names"] = [request.adapter or BASE_ROW for request in batch.requests]
        with self._choose(batch), torch.inference_mode():
            ids = self._model.generate(
                input_ids=encoded["input_ids"].to(self._device),
                attention_mask=encoded["attention_mask"].to(self._device),
                do_sample=False,
                max_new_tokens=num_tokens or batch.answer_tokens,
                eos_token_id=None,  # nothing ends an answer early, as with ignore_eos
                pad_token_id=self._tokenizer.pad_token_id,
                **extra,
            )
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


def run_job(job: PeftJob, *, clock: Callable[[], float] = time.perf_counter) -> PeftAnswer:
    """Run a job in this process, after one short warm-up batch that is not timed."""
    torch.set_num_threads(job.num_threads)
    trace = Trace.load(Path(job.trace))
    batches = plan_batches(trace.requests, job.mode, batch_size=job.batch_size, window=job.window)
    loop = PeftLoop(job, trace.adapters)
    loop.answer(batches[0], num_tokens=2)
    tokens: dict[int, list[int]] = {}
    began = clock()
    for batch in batches:
        tokens |= loop.answer(batch)
    return PeftAnswer(seconds=clock() - began, num_tokens=trace.answer_tokens, num_batches=len(batches), tokens=tokens)


PROGRAM = (sys.executable, "-m", "loadtest.peft_loops")


def run_in_subprocess(job: PeftJob, folder: Path, *, program: tuple[str, ...] = PROGRAM) -> PeftAnswer:
    """Run a job in a process of its own; its files are left in `folder`. RuntimeError if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    question, answer = folder / f"peft-{job.mode}-job.json", folder / f"peft-{job.mode}-answer.json"
    question.write_text(json.dumps(asdict(job)))
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.num_threads), "TRANSFORMERS_VERBOSITY": "error"}
    command = [*program, str(question), str(answer)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"peft's loop {job.mode!r} failed:\n{done.stderr[-2000:]}")
    fields = json.loads(answer.read_text())
    fields["tokens"] = {int(index): ids for index, ids in fields["tokens"].items()}
    return PeftAnswer(**fields)


def main(arguments: list[str]) -> int:
    """Read the job's file, run it, write the answer's file."""
    question, answer = map(Path, arguments)
    answer.write_text(json.dumps(asdict(run_job(PeftJob(**json.loads(question.read_text()))))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
