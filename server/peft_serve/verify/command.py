"""The commands under `peft-serve adapters`."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

from peft_serve.adapters.filesystem import DiskFileSystem
from peft_serve.adapters.profile import parse_profile
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.config import Settings
from peft_serve.engine.assembly import build, default_store, shipped_adapters
from peft_serve.errors import BadRequest, ServeError
from peft_serve.verify import served
from peft_serve.verify.checkpoint import find_checkpoint
from peft_serve.verify.oracle import Oracle, generates
from peft_serve.verify.report import Comparison, verdict

PROMPTS: Final = (
    "The weather today is",
    "@support my order is three weeks late and nobody answers",
    "What is the capital of France?",
    "I have never seen a film that was",
)

app = typer.Typer(help="Work with adapters.", no_args_is_help=True)


@app.callback()
def _adapters() -> None:
    """Work with adapters."""


@app.command()
def verify(
    name: Annotated[str, typer.Argument(help="a checkpoint folder, or the name of an uploaded or shipped adapter")],
    model: Annotated[str, typer.Option(help="the base: demo-llama, demo-t5, a folder, or a hub id")] = "demo-llama",
    store: Annotated[Path | None, typer.Option(help="the server's folder of uploads")] = None,
    adapters: Annotated[list[Path] | None, typer.Option(help="folders of checkpoints")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="a prompt to compare on; may be repeated")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=1024, help="tokens of each answer")] = 16,
    task_id: Annotated[int | None, typer.Option(min=0, help="which task of an adapter that holds several")] = None,
) -> None:
    """Run an adapter's prompts through peft and through the server, in float32, and print the comparison.

    Prompts are --prompt, else the examples of the adapter's peft_serve.json, else four of our own; the adapter's
    template is put around each. Exits with 1 when an answer differs.
    """
    console = Console()
    shipped = shipped_adapters(model)
    folders = [*(adapters or []), *([] if shipped is None else [shipped])]
    try:
        base_name = Path(model).name if Path(model).is_dir() else model
        root = store or default_store(base_name)
        files = find_checkpoint(name, store=root, folders=folders, base_name=base_name, fs=DiskFileSystem())
        comparisons = _compare(files, model, _texts(files, prompt), max_new_tokens, task_id, Console(stderr=True))
    except (ServeError, ValueError, OSError) as error:
        console.print(f"[red]not verified:[/red] {error}")
        raise typer.Exit(2) from None
    console.print(_table(comparisons))
    is_equal, sentence = verdict(comparisons)
    console.print(f"{'[green]equal[/green]' if is_equal else '[red]different[/red]'}: {sentence}")
    raise typer.Exit(0 if is_equal else 1)


def _texts(files: CheckpointFiles, prompts: Sequence[str] | None) -> list[str]:
    profile = None if files.profile is None else parse_profile(files.profile)
    bare = prompts or (profile.examples if profile else ()) or PROMPTS
    template = profile.template if profile else None
    return [template.replace("{text}", text) if template else text for text in bare]


def _compare(
    files: CheckpointFiles, model: str, texts: list[str], max_new_tokens: int, task_id: int | None, progress: Console
) -> list[Comparison]:
    if not generates(files):
        raise BadRequest("this is no peft adapter that generates text, and only those can be verified this way")
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(model=model, dtype="float32", device="cpu", store=Path(folder))
        parts, engine = build(settings, lambda line: progress.print(f"  {line}", highlight=False))
        engine.start()
        try:
            given, plain = asyncio.run(served.ask(parts, files, texts, max_new_tokens=max_new_tokens, task_id=task_id))
        finally:
            engine.stop()
        progress.print("  asking peft")
        oracle = Oracle(model, files)
        eos_ids = sorted(parts.base.eos_ids)
        expected = [
            oracle.answer(parts.codec.encode(text), max_new_tokens=max_new_tokens, eos_ids=eos_ids, task_id=task_id)
            for text in texts
        ]
    each = zip(texts, expected, given, plain, strict=True)
    return [Comparison(text=t, expected=e, served=s, base=b) for t, e, s, b in each]


def _table(comparisons: list[Comparison]) -> Table:
    table = Table("prompt", "tokens", "equal to peft", "log-probability gap", "differs from base")
    for one in comparisons:
        table.add_row(
            one.text[-60:],
            str(len(one.served.tokens)),
            "yes" if one.is_equal else f"no: {list(one.expected.tokens)} / {list(one.served.tokens)}",
            f"{one.logprob_gap:.1e}",
            "yes" if one.moves else "no",
        )
    return table
