"""The command line: one subcommand for each workload, and a few that make or show things."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from loadtest import bench, cache_replay, compare, replicas
from loadtest.arguments import above_zero, popularity, whole_from
from loadtest.filing import new_folder
from loadtest.gpu import command as gpu_check
from loadtest.machine import Provenance, command_line, commit, machine, others_cores, software
from loadtest.options import add_common, read_options
from loadtest.page import find_results, page
from loadtest.report import Report, log_entry
from loadtest.simulation import command as simulation
from loadtest.stage import Stage
from loadtest.targets import judged
from loadtest.trace import Trace, TraceSpec, build_trace
from loadtest.workloads import (
    beside,
    bound,
    ceiling,
    edge,
    kernels,
    overhead,
    policies,
    replay,
    soak,
    sweep,
    w1,
    w4,
    w5,
    w6,
    w7,
    w8,
    w9,
    w11,
    w13,
)

Workload = Callable[[Stage, Namespace], Report]


def main(arguments: list[str]) -> int:
    """Run a command; answers with the exit status."""
    parsed = _parser().parse_args(arguments)
    console = Console()
    try:
        if "workload" in parsed:
            _run_workload(parsed, arguments, console)
        elif "reckoning" in parsed:
            _reckon(parsed, arguments, console)
        else:
            return int(parsed.act(parsed, console) or 0)
    except (RuntimeError, ValueError, OSError) as problem:
        console.print(f"[red]loadtest:[/red] {escape(str(problem))}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    return 0


def _run_workload(parsed: Namespace, arguments: list[str], console: Console) -> None:
    """A measurement: of this machine, beside whatever else it does now."""
    now = datetime.now()
    with new_folder(parsed.out, f"{parsed.command}{'-quick' if parsed.quick else ''}", now) as folder:
        origin = replace(_origin(arguments, now), base=parsed.base, others=others_cores())
        if origin.is_busy:
            busy = f"Others keep {origin.others:g} cores busy: these figures will be no claims."
            console.print(f"[yellow]{busy}[/yellow]")
        stage = Stage(read_options(parsed, folder), console)
        _file(parsed.workload(stage, parsed), folder, origin, console)


def _reckon(parsed: Namespace, arguments: list[str], console: Console) -> None:
    """What follows from a file alone: no base, no server, and the machine's speed does not count."""
    now = datetime.now()
    with new_folder(parsed.out, parsed.command, now) as folder:
        _file(parsed.reckoning(parsed), folder, replace(_origin(arguments, now), base="none"), console)


def _origin(arguments: list[str], now: datetime) -> Provenance:
    return Provenance(
        date=f"{now:%Y-%m-%d %H:%M}",
        machine=machine(),
        software=software(),
        commit=commit(),
        command=command_line(arguments),
    )


def _file(found: Report, folder: Path, origin: Provenance, console: Console) -> None:
    report = judged(found, is_quick=origin.is_quick).file(folder, origin)
    report.show(console)
    console.print(f"\nFiled in {folder}. For loadtest/LOG.md, with a verdict of yours:\n")
    print(log_entry(report))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m loadtest", description="Load tests; loadtest/README.md explains each.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str, workload: Workload, *, least_adapters: int = 1) -> ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        add_common(command, least_adapters=least_adapters)
        command.set_defaults(workload=workload)
        return command

    add("w1", "throughput as traffic spreads over n adapters", lambda stage, _: w1.run(stage), least_adapters=0)
    add("w2", "latency over the rate of requests", lambda stage, _: sweep.run(stage, "w2"), least_adapters=0)
    add("w3", "latency under bursts and skew", lambda stage, _: sweep.run(stage, "w3"), least_adapters=0)
    add("w4", "closed loop: distinct, uniform, skewed, identical", lambda stage, _: w4.run(stage))
    _add_w5(add("w5", "the same trace on this server and on peft's own loops", _w5))
    two = "base-only traffic on a server with adapters against one without"
    _add_overhead(add("overhead", two, _overhead, least_adapters=0))
    add("w6", "adapters never seen before, against ones that are cached", lambda stage, _: w6.run(stage))
    add("w7", "hit rates of caches too small, by policy", lambda stage, _: w7.run(stage)).set_defaults(mixture="S2")
    mixed = add("w8", "mixed methods against one task at a time and LoRA", lambda stage, _: w8.run(stage))
    mixed.set_defaults(mixture="MIX")
    add("w9", "uploads, re-uploads and deletes beside steady traffic", lambda stage, _: w9.run(stage))
    _add_terms(add("w11", "a step by kind of term, in this process (also called terms)", _terms))
    _add_terms(add("terms", "the same as w11", _terms))
    equal = add("w13", "tokens equal to peft's, under eviction and re-uploads", _w13)
    equal.set_defaults(base="tiny", mixture="MIX")
    equal.add_argument("--tokens", type=whole_from(1), help="answer tokens to compare (default 100000, quick 400)")
    add("bound", "the base's decode step against what the machine could do", lambda stage, _: bound.run(stage))
    add("kernels", "our own CPU products beside torch's, by weight of the base", lambda stage, _: kernels.run(stage))
    orders = "fcfs, affinity and fair on the same traffic: W2's, W3's, W7's, and light tenants beside a heavy one"
    add("policies", orders, lambda stage, parsed: policies.run(stage, duration_s=parsed.duration))
    _add_ceiling(add("ceiling", "what the HTTP side can carry, over an engine that computes nothing", _ceiling))
    soaked = add("soak", "everything at once for hours: does the server hold more at the end?", _soak)
    soaked.set_defaults(base="tiny", mixture="MIX")
    soaked.add_argument("--minutes", type=above_zero, default=30.0, help="how long (default 30, made for 480)")
    _add_edge(add("edge", "overload, a greedy adapter, clients that leave or dawdle, and a stop under streams", _edge))
    played = add("replay", "play a saved trace", _replay)
    played.add_argument("trace", type=Path, help="a trace that `python -m loadtest trace` made")
    played.add_argument("--closed", action="store_true", help="closed loop with --concurrency in flight")
    offline = "eviction policies on a server's --cache-trace, without a server"
    _add_cache_replay(commands.add_parser("cache-replay", help=offline, description=offline))
    simulated = commands.add_parser("simulate", help=simulation.ABOUT, description=simulation.ABOUT)
    simulation.add_options(simulated)
    simulated.set_defaults(reckoning=simulation.run_parsed)
    compare.add_options(add("compare", "one trace on several servers and loops", compare.run_parsed))
    sides = "this server, peft, llama.cpp's server and others, side by side: a table by traffic and load"
    beside.add_options(add("beside", sides, beside.run_parsed))

    faults = "two replicas on Ray Serve: kill -9 and scaling under load"
    replicas_ = commands.add_parser("replicas", help=faults, description=faults)
    replicas.add(replicas_)
    replicas_.set_defaults(act=replicas.run)
    bench_ = commands.add_parser("bench", help="the short honest subset, and a page about it")
    bench.add_options(bench_)
    bench_.set_defaults(act=bench.run_parsed)
    checked = commands.add_parser("gpu-check", help=gpu_check.ABOUT, description=gpu_check.ABOUT)
    gpu_check.add_options(checked)
    checked.set_defaults(act=lambda parsed, _: gpu_check.run(parsed, sys.argv[1:]))
    made = commands.add_parser("trace", help="make a trace and save it, to be replayed")
    made.add_argument("path", type=Path)
    add_common(made, least_adapters=0, adapters="0, traffic of the base alone")
    _add_trace(made)
    base = commands.add_parser("make-base", help="make a base with random weights")
    base.add_argument("--shape", default="0.1b", help="tiny, 0.1b (default) or 0.5b, each also with -llama")
    base.add_argument("--work", type=Path, default=Path("loadtest/work"))
    base.set_defaults(act=_make_base)
    adapters = commands.add_parser("make-adapters", help="make random adapters for a base")
    add_common(adapters, adapters="32, quick 8")
    adapters.set_defaults(act=_make_adapters)
    gguf = commands.add_parser("make-gguf", help="make GGUF files of a base and its adapters, for llama.cpp's server")
    add_common(gguf, adapters="32, quick 8")
    gguf.set_defaults(act=_make_gguf)
    upload = commands.add_parser("upload", help="make random adapters and upload them to --url")
    add_common(upload, adapters="32, quick 8")
    upload.set_defaults(act=_upload)
    shown = commands.add_parser("report", help="show results again: tables and log entries, or one page")
    results = Path("loadtest/results")
    shown.add_argument("results", type=Path, nargs="*", default=[results], help=f"folders (default {results})")
    shown.add_argument("--html", type=Path, help="write one page about all of them to this file")
    shown.set_defaults(act=_report)
    return parser


def _add_w5(parser: ArgumentParser) -> None:
    parser.add_argument("--requests", type=whole_from(1), help="requests in the trace (default 256, quick 24)")
    parser.add_argument("--batch-size", type=whole_from(1), default=16, help="rows of a batch in peft's loops")
    window = "waiting requests peft's loops may see (0: all)"
    parser.add_argument("--window", type=whole_from(0), default=0, help=window)


def _w5(stage: Stage, parsed: Namespace) -> Report:
    return w5.run(stage, batch_size=parsed.batch_size, window=parsed.window, num_requests=parsed.requests)


def _add_overhead(parser: ArgumentParser) -> None:
    parser.add_argument("--a-arg", action="append", default=[], help="passed to server A only")
    parser.add_argument("--b-arg", action="append", default=[], help="passed to server B only")
    parser.add_argument("--repeats", type=whole_from(1), help="how often A B B A is played (default 3, quick 1)")


def _overhead(stage: Stage, parsed: Namespace) -> Report:
    return overhead.run(stage, a_arguments=tuple(parsed.a_arg), b_arguments=tuple(parsed.b_arg), repeats=parsed.repeats)


def _add_terms(parser: ArgumentParser) -> None:
    parser.add_argument("--term", action="append", default=[], help="only this kind (repeatable)")
    parser.add_argument("--phase", action="append", default=[], choices=w11.PHASES, help="only this (repeatable)")


def _terms(stage: Stage, parsed: Namespace) -> Report:
    return w11.run(stage, tuple(parsed.term), tuple(parsed.phase))


def _w13(stage: Stage, parsed: Namespace) -> Report:
    return w13.run(stage, num_tokens=parsed.tokens)


def _replay(stage: Stage, parsed: Namespace) -> Report:
    return replay.run(stage, Trace.load(parsed.trace), closed=parsed.closed)


def _soak(stage: Stage, parsed: Namespace) -> Report:
    return soak.run(stage, minutes=parsed.minutes)


def _add_ceiling(parser: ArgumentParser) -> None:
    parser.set_defaults(base="demo-llama", threads=1)
    parser.add_argument("--real", action="store_true", help="run the base, in place of the fake engine")
    parser.add_argument("--streams", type=whole_from(1), help="streams at once (default 1000, quick 100)")
    steps, rows = "steps a second of the fake engine under streams", "rows of a step with --real; other streams wait"
    parser.add_argument("--steps", type=above_zero, default=20.0, help=steps)
    parser.add_argument("--rows", type=whole_from(1), default=64, help=rows)


def _ceiling(stage: Stage, parsed: Namespace) -> Report:
    streams = parsed.streams or (100 if parsed.quick else 1000)
    return ceiling.run(stage, real=parsed.real, streams=streams, steps_per_s=parsed.steps, max_rows=parsed.rows)


def _add_edge(parser: ArgumentParser) -> None:
    parser.set_defaults(base="tiny", threads=1)
    parser.add_argument("--phase", action="append", default=[], choices=edge.PHASES, help="only this (repeatable)")
    often = "clients that leave at each stage (default 200), drains (50), slow sockets (500); quick 10, 2 and 50"
    parser.add_argument("--count", type=whole_from(1), help=often)


def _edge(stage: Stage, parsed: Namespace) -> Report:
    return edge.run(stage, phases=tuple(parsed.phase), count=parsed.count)


def _add_cache_replay(parser: ArgumentParser) -> None:
    parser.add_argument("trace", type=Path, help="the file of `peft-serve serve --cache-trace FILE`")
    parser.add_argument("--out", type=Path, default=Path("loadtest/results"), help="where results are filed")
    parser.add_argument("--bytes", default="10%,25%,50%", help="sizes: bytes, or shares of all adapters' bytes")
    parser.add_argument("--tier", choices=cache_replay.TIERS, default="device", help="whose lookups are played")
    parser.set_defaults(reckoning=_cache)


def _cache(parsed: Namespace) -> Report:
    return cache_replay.run(parsed.trace, sizes=parsed.bytes, tier=parsed.tier)


def _add_trace(parser: ArgumentParser) -> None:
    gaps = "coefficient of variation of the gaps; 1 is Poisson"
    shares = "slora:A, zipf:S, drift[:PERIOD_S], skewed[:RATIO], distinct, uniform or identical (default slora:1)"
    parser.add_argument("--rate", type=above_zero, default=1.0, help="requests a second (default 1)")
    parser.add_argument("--cv", type=above_zero, default=1.0, help=gaps)
    parser.add_argument("--popularity", type=popularity, default="slora:1", help=shares)
    parser.set_defaults(act=_trace)


def _trace(parsed: Namespace, console: Console) -> None:
    from loadtest.adapters import adapter_name

    options = read_options(parsed, parsed.out)
    spec = TraceSpec(
        adapters=tuple(map(adapter_name, range(options.num_adapters or 0))),
        lengths=options.lengths,
        popularity=parsed.popularity,
        rate_per_s=parsed.rate,
        cv=parsed.cv,
        duration_s=options.duration_s,
        seed=options.seed,
    )
    trace = build_trace(spec)
    if not trace.requests:
        here = f"--rate {parsed.rate:g} in --duration {options.duration_s:g}"
        raise ValueError(f"no request comes at {here} with this seed; take more of either")
    trace.save(parsed.path)
    console.print(f"{len(trace.requests)} requests over {len(trace.adapters)} adapters in {parsed.path}")


def _make_base(parsed: Namespace, console: Console) -> None:
    from loadtest.bases import ensure_base

    console.print(f"base in {ensure_base(parsed.shape, parsed.work)}")


def _make_adapters(parsed: Namespace, console: Console) -> None:
    options = read_options(parsed, parsed.out)
    folders = Stage(options, console).adapter_folders(options.pick_adapters(whole=32, quick=8))
    console.print(f"{len(folders)} adapters in {folders[0].parent}")


def _make_gguf(parsed: Namespace, console: Console) -> None:
    from loadtest.contestants import llama_files
    from loadtest.llama_server import LlamaCommand

    options = read_options(parsed, parsed.out)
    files = llama_files(Stage(options, console), options.pick_adapters(whole=32, quick=8))
    start = LlamaCommand(
        program=Path("llama-server"),
        files=files,
        slots=options.concurrency,
        context=1024,
        num_threads=options.num_threads,
    )
    console.print(f"{1 + len(files.adapters)} files in {files.base.parent}; to serve them:", soft_wrap=True)
    print(" ".join(start.line(8001)))


def _upload(parsed: Namespace, console: Console) -> None:
    options = read_options(parsed, parsed.out)
    if options.url is None:
        raise ValueError("upload needs --url")
    with Stage(options, console).server(num_adapters=options.pick_adapters(whole=32, quick=8)):
        console.print(f"uploaded to {options.url}")


def _report(parsed: Namespace, console: Console) -> None:
    results = find_results(parsed.results)
    if parsed.html is not None:
        parsed.html.parent.mkdir(parents=True, exist_ok=True)
        parsed.html.write_text(page(results))
        console.print(f"{len(results)} results in {parsed.html}", soft_wrap=True)
        return
    for result in results:
        result.report.show(console)
        sys.stdout.write(log_entry(result.report))
