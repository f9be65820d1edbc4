"""`peft-serve bench`: a small honest measurement of a server that runs, over HTTP like everybody's requests."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Final

import typer
from rich.console import Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from peft_serve.commands.exits import Exit
from peft_serve.commands.link import DEFAULT_URL, UrlOption, checked_url
from peft_serve.commands.measuring import Load, Measured, measure
from peft_serve.commands.speech import JsonOption, Speech

_LATENCIES: Final = (
    ("ttft_ms", "to the first token"),
    ("tpot_ms", "from token to token"),
    ("total_ms", "to the last token"),
)
_SEED_BITS: Final = 32
_FEW: Final = 100  # requests, below which a 99th percentile is the largest value


def bench(
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", help="who is asked, in turn; several times; default: base")
    ] = None,
    url: UrlOption = DEFAULT_URL,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "--max-concurrency", "-c", min=1, max=4096, help="callers at the same time")
    ] = 4,
    num_requests: Annotated[int, typer.Option("--requests", "--num-prompts", min=1, help="requests in all")] = 32,
    prompt_words: Annotated[
        int, typer.Option("--prompt-words", "--random-input-len", min=1, help="words of each prompt")
    ] = 32,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "--random-output-len", "-n", min=2, help="tokens of each answer")
    ] = 32,
    seed: Annotated[
        int | None, typer.Option("--seed", help="of the prompts' words; default: another in every run")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Keep a server busy with callers that ask again at once, and tell tokens/s and latencies."""
    speech = Speech(as_json=as_json)
    load = Load(
        adapters=adapter or ["base"],
        concurrency=min(concurrency, num_requests),
        num_requests=num_requests,
        prompt_words=prompt_words,
        max_new_tokens=max_new_tokens,
        seed=secrets.randbits(_SEED_BITS) if seed is None else seed,
    )
    with speech.ending():
        told = _run(checked_url(url), load, speech).told()
        asked = {"url": url, "adapters": list(load.adapters), "concurrency": load.concurrency}
        asked |= {"prompt_words": prompt_words, "max_new_tokens": max_new_tokens, "seed": load.seed}
        speech.tell({"load": asked, **told}, _page(told, load))
    if told["failed"]:
        raise typer.Exit(Exit.FAILED)


def _run(url: str, load: Load, speech: Speech) -> Measured:
    columns = (TextColumn("asking"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    silent = speech.as_json or not speech.err.is_terminal
    with Progress(*columns, console=speech.err, transient=True, disable=silent) as bars:
        task = bars.add_task("asking", total=load.num_requests)
        return asyncio.run(measure(url, load, lambda: bars.advance(task)))


def _page(told: Mapping[str, Any], load: Load) -> Group:
    line = (
        f"{told['requests']} requests over {len(load.adapters)} adapters by {load.concurrency} callers "
        f"in {told['seconds']:.1f} s: {told['output_tokens_per_s']} output tokens/s, "
        f"{told['prompt_tokens_per_s']} prompt tokens/s, {told['requests_per_s']} requests/s"
    )
    table = Table("milliseconds", "p50", "p99", "mean", box=None, pad_edge=False)
    for key, name in _LATENCIES:
        figures = told[key]
        table.add_row(name, *("-" if figures[q] is None else f"{figures[q]:g}" for q in ("p50", "p99", "mean")))
    remarks = Text(style="dim")
    if told["requests"] < _FEW:
        remarks.append(f"of {told['requests']} requests the p99 is the slowest; --requests {_FEW} tells more\n")
    remarks.append(
        "a closed loop of one client; for arrivals, mixes and comparisons: python -m loadtest (in a checkout)"
    )
    parts: list[Any] = [Text(line), table, remarks]
    if told["failed"]:
        parts.insert(1, Text(f"failed: {', '.join(f'{n} {code}' for code, n in told['failed'].items())}", style="red"))
    return Group(*parts)
