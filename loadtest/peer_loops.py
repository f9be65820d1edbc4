"""peft's loops as a peer: each pass in a process of its own, its tokens' times turned into outcomes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.outcome import Outcome
from loadtest.peers import population
from loadtest.peft_loops import PeftAnswer, PeftJob, run_in_subprocess
from loadtest.peft_plan import Mode
from loadtest.stage import Stage
from loadtest.trace import Trace

Decode = Callable[[list[int]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftPeer:
    """One of peft's loops; `batch_size` and `window` as in `loadtest.peft_plan`."""

    stage: Stage
    mode: Mode
    batch_size: int = 16
    window: int = 0

    @property
    def name(self) -> str:
        """See `Peer`."""
        return f"peft:{self.mode}"

    def prepare(self, adapters: Sequence[str]) -> tuple[str, ...]:
        """Make the adapters' folders; ValueError if peft cannot mix them in a batch."""
        mixture = self.stage.options.mixture
        if self.mode != "single" and not mixture.startswith(("S1", "S2", "lora")):
            raise ValueError(f"{self.name} takes LoRA only, since peft mixes nothing else in a batch; got {mixture}")
        self.stage.adapter_folders(population(adapters))
        return ()

    def play(self, trace: Trace, *, paced: bool) -> list[Outcome]:
        """See `Peer`. A request counts as sent when its batch begins."""
        options = self.stage.options
        path = options.folder / "trace.json"
        trace.save(path)
        job = PeftJob(
            base=str(self.stage.base()),
            adapters=str(self.stage.adapters_folder()),
            trace=str(path),
            mode=self.mode,
            batch_size=self.batch_size,
            window=self.window,
            num_threads=options.num_threads,
            dtype=options.dtype,
            device=options.device,
            paced=paced,
        )
        with self.stage.counting(self.name, len(trace.requests)) as tick:
            answer = run_in_subprocess(job, options.folder, on_done=tick)
        outcomes = outcomes_of(trace, answer, decoder(self.stage.base()), paced=paced)
        self.stage.keep(self.name, outcomes, {})
        return outcomes


def decoder(base: Path) -> Decode:
    """Token ids to text with the base's tokenizer, special tokens left out, as servers do."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))


def outcomes_of(trace: Trace, answer: PeftAnswer, decode: Decode, *, paced: bool) -> list[Outcome]:
    """Each request's outcome, timed from when it was due; in a backlog all are due at the start."""
    return [
        Outcome(
            index=request.index,
            adapter=request.adapter,
            due_s=request.arrival_s if paced else 0.0,
            sent_s=answer.begun_s[request.index],
            end_s=answer.times_s[request.index][-1],
            token_times_s=tuple(answer.times_s[request.index]),
            max_new_tokens=request.max_new_tokens,
            status=200,
            text=decode(answer.tokens[request.index]),
        )
        for request in trace.requests
    ]
