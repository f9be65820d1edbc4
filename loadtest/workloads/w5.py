"""W5: one trace, four ways to serve it: this server, and three loops that one could write with peft.

Everybody has the whole trace from the start, the same torch threads, greedy answers of the same lengths; the
figure is tokens a second over the whole trace. peft's loops run in processes of their own, one after the other,
with no server beside them. Runs are played forwards and backwards. The texts of the server are compared with
peft's one-adapter-at-a-time loop.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from loadtest.adapters import adapter_name
from loadtest.measure import mean, ratio
from loadtest.outcome import Outcome
from loadtest.peft_loops import PeftAnswer, PeftJob, run_in_subprocess
from loadtest.peft_plan import Mode
from loadtest.plots import Plot
from loadtest.report import Cell, Report
from loadtest.stage import Stage, palindrome
from loadtest.trace import Trace

MODES: tuple[Mode, ...] = ("single", "mixed", "sorted")
WAYS = ("server", *MODES)


def run(stage: Stage, *, batch_size: int = 16, window: int = 0, num_requests: int | None = None) -> Report:
    """Play W5; `batch_size` and `window` are peft's (see `loadtest.peft_plan`)."""
    if not stage.options.mixture.startswith(("S1", "S2", "lora")):
        raise ValueError(f"w5 takes LoRA only, since peft mixes nothing else in a batch; got {stage.options.mixture}")
    count = stage.options.pick_adapters(whole=16, quick=4)
    names = tuple(map(adapter_name, range(count)))
    trace = stage.trace(adapters=names, num_requests=num_requests or (24 if stage.options.quick else 256))
    path = stage.options.folder / "trace.json"
    trace.save(path)
    speeds: dict[str, list[float]] = defaultdict(list)
    texts: dict[str, dict[int, str]] = {}
    for way in palindrome(list(WAYS)):
        if way == "server":
            speed, texts["server"] = _server(stage, trace, names)
        else:
            mode = next(mode for mode in MODES if mode == way)
            answer = _peft(stage, mode, path, len(trace.requests), batch_size=batch_size, window=window)
            speed, texts[way] = answer.tokens_per_s, _decoded(stage.base(), answer)
        speeds[way].append(speed)
    return report(dict(speeds), texts, count, len(trace.requests))


def _server(stage: Stage, trace: Trace, names: tuple[str, ...]) -> tuple[float, dict[int, str]]:
    with stage.server(num_adapters=len(names)) as server:
        stage.warm(server, names)
        outcomes = stage.closed_loop(server, trace, "server", concurrency=len(trace.requests))
    return backlog_tokens_per_s(outcomes), {outcome.index: outcome.text for outcome in outcomes if outcome.ok}


def backlog_tokens_per_s(outcomes: list[Outcome]) -> float:
    """Tokens of complete answers over the time in which the whole backlog was served."""
    tokens = sum(len(outcome.token_times_s) for outcome in outcomes if outcome.ok)
    return ratio(tokens, max(outcome.end_s for outcome in outcomes))


def _peft(stage: Stage, mode: Mode, trace: Path, num_requests: int, *, batch_size: int, window: int) -> PeftAnswer:
    options = stage.options
    folders = stage.adapter_folders(options.pick_adapters(whole=16, quick=4))
    job = PeftJob(
        base=str(stage.base()),
        adapters=str(folders[0].parent),
        trace=str(trace),
        mode=mode,
        batch_size=batch_size,
        window=window,
        num_threads=options.num_threads,
        dtype=options.dtype,
        device=options.device,
    )
    with stage.counting(f"peft, {mode}", num_requests) as tick:
        return run_in_subprocess(job, options.folder, on_done=tick)


def _decoded(base: Path, answer: PeftAnswer) -> dict[int, str]:
    decode = _decoder(base)
    return {index: decode(ids) for index, ids in answer.tokens.items()}


def _decoder(base: Path) -> Callable[[list[int]], str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))


def report(speeds: dict[str, list[float]], texts: dict[str, dict[int, str]], count: int, num_requests: int) -> Report:
    """Tokens a second of each way, this server's over it, and whether they said the same."""
    speed = {way: mean(passes) for way, passes in speeds.items()}
    truth = texts["single"]
    equal = {
        way: ratio(sum(said.get(i) == text for i, text in truth.items()), len(truth)) for way, said in texts.items()
    }
    rows: list[tuple[Cell, ...]] = [(way, speed[way], ratio(speed["server"], speed[way]), equal[way]) for way in WAYS]
    return Report(
        name="w5",
        title=f"W5: {num_requests} requests over {count} adapters, all there from the start",
        columns=("way", "tokens/s", "server over it", "answers equal to single"),
        rows=tuple(rows),
        plot=Plot(
            title="The same trace, four ways",
            x_label="peft: one adapter at a time, mixed batches, sorted batches",
            y_label="tokens/s",
            series={"tokens/s": tuple((float(at), speed[way]) for at, way in enumerate(WAYS))},
            ticks=WAYS,
        ),
    )
