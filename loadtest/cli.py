"""The command line: one subcommand for each workload, and a few that make or show things."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from rich.console import Console

from loadtest.machine import Provenance, command_line, commit, machine, software
from loadtest.options import add_common, read_options
from loadtest.report import Report, load_report, log_entry
from loadtest.stage import Stage
from loadtest.trace import Trace, TraceSpec, build_trace
from loadtest.workloads import overhead, replay, sweep, w1, w4, w5, w11

Workload = Callable[[Stage, Namespace], Report]


def main(arguments: list[str]) -> int:
    """Run a command; answers with the exit status."""
    parsed = _parser().parse_args(arguments)
    console = Console()
    try:
        if "workload" in parsed:
            _run_workload(parsed, arguments, console)
        else:
            parsed.act(parsed, console)
    except (RuntimeError, ValueError, OSError) as problem:
        console.print(f"[red]loadtest:[/red] {problem}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    return 0


def _run_workload(parsed: Namespace, arguments: list[str], console: Console) -> None:
    name = str(parsed.command)
    now = datetime.now()
    folder = parsed.out / f"{now:%Y%m%d-%H%M%S}-{name}{'-quick' if parsed.quick else ''}"
    provenance = Provenance(
        date=f"{now:%Y-%m-%d %H:%M}",
        machine=machine(),
        software=software(),
        commit=commit(),
        command=command_line(arguments),
    )
    stage = Stage(read_options(parsed, folder), console)
    report = parsed.workload(stage, parsed).file(folder, provenance)
    report.show(console)
    console.print(f"\nFiled in {folder}. For loadtest/LOG.md, with a verdict of yours:\n")
    print(log_entry(report))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m loadtest", description="Load tests; loadtest/README.md explains each.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str, workload: Workload) -> ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        add_common(command)
        command.set_defaults(workload=workload)
        return command

    add("w1", "throughput as traffic spreads over n adapters", lambda stage, _: w1.run(stage))
    add("w2", "latency over the rate of requests", lambda stage, _: sweep.run(stage, "w2"))
    add("w3", "latency under bursts and skew", lambda stage, _: sweep.run(stage, "w3"))
    add("w4", "closed loop: distinct, uniform, skewed, identical", lambda stage, _: w4.run(stage))
    _add_w5(add("w5", "the same trace on this server and on peft's own loops", _w5))
    _add_overhead(add("overhead", "base-only traffic on a server with adapters against one without", _overhead))
    timed = add("terms", "W11: a decode step by kind of term, in this process", _terms)
    timed.add_argument("--term", action="append", default=[], help="only this kind (repeatable)")
    played = add("replay", "play a saved trace", _replay)
    played.add_argument("trace", type=Path)
    played.add_argument("--closed", action="store_true", help="closed loop with --concurrency in flight")

    made = commands.add_parser("trace", help="make a trace and save it, to be replayed")
    made.add_argument("path", type=Path)
    add_common(made)
    _add_trace(made)
    base = commands.add_parser("make-base", help="make a base with random weights")
    base.add_argument("--shape", default="0.1b", help="tiny, 0.1b or 0.5b")
    base.add_argument("--work", type=Path, default=Path("loadtest/work"))
    base.set_defaults(act=_make_base)
    adapters = commands.add_parser("make-adapters", help="make random adapters for a base")
    add_common(adapters)
    adapters.set_defaults(act=_make_adapters)
    upload = commands.add_parser("upload", help="make random adapters and upload them to --url")
    add_common(upload)
    upload.set_defaults(act=_upload)
    shown = commands.add_parser("report", help="show a result again, and its log entry")
    shown.add_argument("folder", type=Path)
    shown.set_defaults(act=_report)
    return parser


def _add_w5(parser: ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, help="requests in the trace (default 256, quick 24)")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of a batch in peft's loops")
    parser.add_argument("--window", type=int, default=0, help="waiting requests peft's loops may see (0: all)")


def _w5(stage: Stage, parsed: Namespace) -> Report:
    return w5.run(stage, batch_size=parsed.batch_size, window=parsed.window, num_requests=parsed.requests)


def _add_overhead(parser: ArgumentParser) -> None:
    parser.add_argument("--a-arg", action="append", default=[], help="passed to server A only")
    parser.add_argument("--b-arg", action="append", default=[], help="passed to server B only")
    parser.add_argument("--repeats", type=int, help="how often A B B A is played (default 3, quick 1)")


def _overhead(stage: Stage, parsed: Namespace) -> Report:
    return overhead.run(stage, a_arguments=tuple(parsed.a_arg), b_arguments=tuple(parsed.b_arg), repeats=parsed.repeats)


def _terms(stage: Stage, parsed: Namespace) -> Report:
    return w11.run(stage, tuple(parsed.term))


def _replay(stage: Stage, parsed: Namespace) -> Report:
    return replay.run(stage, Trace.load(parsed.trace), closed=parsed.closed)


def _add_trace(parser: ArgumentParser) -> None:
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second")
    parser.add_argument("--cv", type=float, default=1.0, help="coefficient of variation of the gaps; 1 is Poisson")
    parser.add_argument("--popularity", default="slora:1", help="slora:A, zipf:S, drift, distinct, uniform, skewed")
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
    trace.save(parsed.path)
    console.print(f"{len(trace.requests)} requests over {len(trace.adapters)} adapters in {parsed.path}")


def _make_base(parsed: Namespace, console: Console) -> None:
    from loadtest.bases import ensure_base

    console.print(f"base in {ensure_base(parsed.shape, parsed.work)}")


def _make_adapters(parsed: Namespace, console: Console) -> None:
    options = read_options(parsed, parsed.out)
    folders = Stage(options, console).adapter_folders(options.pick_adapters(whole=32, quick=8))
    console.print(f"{len(folders)} adapters in {folders[0].parent}")


def _upload(parsed: Namespace, console: Console) -> None:
    options = read_options(parsed, parsed.out)
    if options.url is None:
        raise ValueError("upload needs --url")
    with Stage(options, console).server(num_adapters=options.pick_adapters(whole=32, quick=8)):
        console.print(f"uploaded to {options.url}")


def _report(parsed: Namespace, console: Console) -> None:
    report = load_report(parsed.folder)
    report.show(console)
    sys.stdout.write(log_entry(report))
