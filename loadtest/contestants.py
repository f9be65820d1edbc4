"""Contestants: servers and loops that live through a whole comparison, each with its adapters loaded and warm.

A peer (`loadtest.peers`) is made anew for each pass; a contestant stays while many small traces are put to it, and says
how much memory it has taken and what an adapter that it has not seen yet costs it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from loadtest.client import ClientOptions
from loadtest.llama_server import LlamaCommand, LlamaFiles, files_for
from loadtest.measure import percentile
from loadtest.memory import peak_mib
from loadtest.outcome import Outcome
from loadtest.peer_llama import LlamaServer
from loadtest.peer_loops import Decode, decoder
from loadtest.peft_loops import PeftJob
from loadtest.peft_plan import Mode
from loadtest.peft_worker import PeftWorker, outcomes_of, peft_worker
from loadtest.server import RunningServer, quiet, running_server
from loadtest.stage import Stage
from loadtest.trace import Trace

NUM_COLD = 8
"""How many adapters are asked for the first time, one after the other, to learn what that costs."""
WARM = 2
"""Tokens of an answer that only warms up."""


class Contestant(Protocol):
    """One who plays traces. `cold` says in words what the first request for an adapter costs."""

    @property
    def name(self) -> str:
        """What the tables call it."""
        ...

    @property
    def cold(self) -> str:
        """What an adapter that it does not hold yet costs."""
        ...

    def play(self, trace: Trace, label: str, *, concurrency: int, limit_s: float) -> list[Outcome]:
        """Play the trace with so many requests in flight until all are answered or the time is over: what is not
        done then is unfinished, with the tokens that came."""
        ...

    def peak_mib(self) -> float:
        """MiB of RAM at its peak until now; NaN if that cannot be known."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerContestant:
    """A server; `running` is None where it is somebody else's process."""

    stage: Stage
    name: str
    client: ClientOptions
    cold: str
    running: RunningServer | None = None

    def play(self, trace: Trace, label: str, *, concurrency: int, limit_s: float) -> list[Outcome]:
        """See `Contestant`; it has let go of what was cut off when this returns."""
        outcomes = self.stage.play(self.client, trace, label, concurrency=concurrency, duration_s=limit_s)
        if self.running is not None:
            quiet([self.running])
        return outcomes

    def peak_mib(self) -> float:
        """See `Contestant`."""
        return float("nan") if self.running is None else peak_mib(self.running.pid)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftContestant:
    """One of peft's loops in a process that the others share. A batch holds all that would be in flight."""

    stage: Stage
    mode: Mode
    worker: PeftWorker
    decode: Decode

    @property
    def name(self) -> str:
        """See `Contestant`."""
        return f"peft:{self.mode}"

    @property
    def cold(self) -> str:
        """See `Contestant`."""
        times_s = self.worker.load_times_s
        return f"load_adapter takes {1e3 * percentile(times_s, 50):.3g} ms before it" if times_s else "no adapters"

    def play(self, trace: Trace, label: str, *, concurrency: int, limit_s: float) -> list[Outcome]:
        """See `Contestant`."""
        path = self.stage.options.folder / "trace.json"
        trace.save(path)
        with self.stage.spinning(label):
            said = self.worker.play(path, self.mode, batch_size=concurrency, limit_s=limit_s)
        outcomes = outcomes_of(trace, said, self.decode)
        self.stage.keep(label, outcomes, {})
        return outcomes

    def peak_mib(self) -> float:
        """See `Contestant`."""
        return peak_mib(self.worker.process.pid)


@contextmanager
def our_server(stage: Stage, names: Sequence[str]) -> Iterator[Contestant]:
    """This server over a folder of the adapters, none of which it has read when it starts."""
    with stage.server(extra=("--adapters", str(_folder(stage, names)))) as running:
        client = stage.client(running)
        some = names[:NUM_COLD]
        first, again = (_first_tokens(stage, client, some, f"native, {when}") for when in ("cold", "warm"))
        stage.warm(running, tuple(names))
        cold = f"first token after {first:.3g} ms, {again:.3g} ms when warm (one request at a time)"
        yield ServerContestant(stage=stage, name="native", client=client, running=running, cold=cold)


def _folder(stage: Stage, names: Sequence[str]) -> Path:
    return stage.adapter_folders(len(names))[0].parent


def _first_tokens(stage: Stage, client: ClientOptions, names: Sequence[str], label: str) -> float:
    """Milliseconds to the first token, the median over one request for each adapter; RuntimeError if one fails."""
    trace = short(stage.trace(adapters=tuple(names), popularity="distinct", num_requests=len(names)))
    outcomes = stage.play(client, trace, label, concurrency=1)
    failed = [one.error for one in outcomes if not one.ok]
    if failed:
        raise RuntimeError(f"{label}: {len(failed)} of {len(outcomes)} requests failed, one with {failed[0]}")
    return 1e3 * percentile([one.ttft_s for one in outcomes if one.ttft_s is not None], 50)


def short(trace: Trace) -> Trace:
    """The same requests, for a few tokens each."""
    return Trace(requests=tuple(replace(request, max_new_tokens=WARM) for request in trace.requests))


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaSetting:
    """How llama.cpp's server is started for a comparison: `context` tokens for each of `slots` requests."""

    program: Path
    slots: int
    context: int
    arguments: tuple[str, ...] = ()


def llama_files(stage: Stage, count: int) -> LlamaFiles:
    """The stage's base and adapters as llama.cpp takes them, made where they are not there."""
    options, folders = stage.options, stage.adapter_folders(count)
    paths = []
    with stage.counting("making GGUF files", count + 1) as tick:
        for path in files_for(stage.base(), folders, options.work, dtype=options.dtype):
            paths.append(path.resolve())
            tick()
    return LlamaFiles(base=paths[0], adapters=tuple(paths[1:]), dtype=options.dtype)


@contextmanager
def llama_server(stage: Stage, names: Sequence[str], setting: LlamaSetting) -> Iterator[Contestant]:
    """llama.cpp's server with the base and the adapters, started once without the adapters to learn their share."""
    files = llama_files(stage, len(names))
    alone = replace(files, adapters=())
    with running_server(_command(stage, setting, alone), stage.options.folder / "llamacpp-base.log") as bare:
        pass
    with running_server(_command(stage, setting, files), stage.options.folder / "llamacpp.log") as running:
        peer = LlamaServer(stage=stage, name="llamacpp", url=running.url)
        peer.prepare(names)
        _first_tokens(stage, peer.client(), names, "llamacpp, warming")
        cold = (
            f"it takes adapters at its start only: {running.start_s:.3g} s with {len(names)} of them, "
            f"{bare.start_s:.3g} s with none"
        )
        yield ServerContestant(stage=stage, name="llamacpp", client=peer.client(), running=running, cold=cold)


def _command(stage: Stage, setting: LlamaSetting, files: LlamaFiles) -> LlamaCommand:
    threads = stage.options.num_threads
    return LlamaCommand(
        program=setting.program,
        files=files,
        slots=setting.slots,
        context=setting.context,
        num_threads=threads,
        arguments=setting.arguments,
        environment={"OMP_NUM_THREADS": str(threads)},
    )


@contextmanager
def peft_loops(stage: Stage, names: Sequence[str], modes: Sequence[Mode]) -> Iterator[list[Contestant]]:
    """peft's loops, all in one process that holds every adapter."""
    options = stage.options
    job = PeftJob(
        base=str(stage.base()),
        adapters=str(_folder(stage, names)),
        trace="",
        mode="mixed",
        num_threads=options.num_threads,
        dtype=options.dtype,
        device=options.device,
    )
    decode = decoder(stage.base())
    with peft_worker(job, list(names), options.folder, label="peft") as worker:
        loops = [PeftContestant(stage=stage, mode=mode, worker=worker, decode=decode) for mode in modes]
        for loop in loops:
            warming = short(stage.trace(adapters=tuple(names), popularity="distinct", num_requests=2))
            loop.play(warming, f"{loop.name}, warming", concurrency=2, limit_s=60.0)
        yield list(loops)
