"""Options that every workload shares, and their defaults for whole and for quick runs."""

import os
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

from loadtest.arguments import above_zero, address, in_words, whole_from
from loadtest.lengths import Lengths, parse_lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to run a workload: on what base and server, with what load, for how long."""

    base: str = "0.1b"
    url: str | None = None
    api_key: str | None = None
    work: Path = Path("loadtest/work")
    folder: Path = Path("loadtest/results")
    mixture: str = "S1"
    targets: str = "all"
    lengths: Lengths
    seed: int = 0
    concurrency: int = 16
    duration_s: float = 60.0
    device: str = "cpu"
    dtype: str = "float32"
    num_threads: int = 1
    server_arguments: tuple[str, ...] = ()
    route: str = "native"
    num_adapters: int | None = None
    quick: bool = False

    def pick_adapters(self, *, whole: int, quick: int) -> int:
        """The number of adapters: as given, else the workload's own for a whole or a quick run."""
        if self.num_adapters is not None:
            return self.num_adapters
        return quick if self.quick else whole


def add_common(parser: ArgumentParser, *, least_adapters: int = 1, adapters: str = "the workload's own") -> None:
    """The options of `Options`. `adapters` says in the help what no ``--adapters`` means."""
    parser.add_argument(
        "--base",
        default="0.1b",
        help="tiny, 0.1b, 0.5b (random weights, -llama behind it for that architecture) or a model folder",
    )
    parser.add_argument("--url", type=address, help="use the server that runs here, instead of starting one on --base")
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument("--work", type=Path, default=Path("loadtest/work"), help="where bases and adapters are made")
    parser.add_argument("--out", type=Path, default=Path("loadtest/results"), help="where results are filed")
    parser.add_argument("--adapters", type=whole_from(least_adapters), help=f"number of adapters (default: {adapters})")
    parser.add_argument("--mixture", default="S1", help="S1, S2, MIX, lora:R, ia3, prompt:N or prefix:N")
    parser.add_argument("--targets", choices=["all", "attention"], default="all", help="layers that S1, S2 adapt")
    by_device = "cpu, gpu or PMIN-PMAX,AMIN-AMAX (default: by device)"
    parser.add_argument("--lengths", type=in_words(parse_lengths), help=by_device)
    parser.add_argument("--seed", type=whole_from(0), default=0)
    parser.add_argument("--concurrency", type=whole_from(1), default=16, help="requests in flight in closed loops")
    parser.add_argument("--duration", type=above_zero, help="seconds of each phase (default 60, quick 5)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    threads = "torch threads, server and peft (default: as many as there are cores)"
    parser.add_argument("--threads", type=whole_from(1), default=os.cpu_count() or 1, help=threads)
    parser.add_argument("--server-arg", action="append", default=[], help="passed to the server (--server-arg=--x=1)")
    parser.add_argument("--route", choices=["native", "completions"], default="native")
    parser.add_argument("--quick", action="store_true", help="about a minute: shows that it runs, proves nothing")


def read_options(arguments: Namespace, folder: Path) -> Options:
    """Parsed arguments as `Options`; results go to `folder`."""
    by_device = parse_lengths("gpu" if arguments.device == "cuda" else "cpu")
    by_haste = 5.0 if arguments.quick else 60.0
    return Options(
        base=arguments.base,
        url=arguments.url,
        api_key=arguments.api_key,
        work=arguments.work,
        folder=folder,
        mixture=arguments.mixture,
        targets=arguments.targets,
        lengths=by_device if arguments.lengths is None else arguments.lengths,
        seed=arguments.seed,
        concurrency=arguments.concurrency,
        duration_s=by_haste if arguments.duration is None else arguments.duration,
        device=arguments.device,
        dtype=arguments.dtype,
        num_threads=arguments.threads,
        server_arguments=tuple(arguments.server_arg),
        route=arguments.route,
        num_adapters=arguments.adapters,
        quick=arguments.quick,
    )
