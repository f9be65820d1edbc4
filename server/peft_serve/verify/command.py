"""The commands under `peft-serve adapters`."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from peft_serve.adapters.filesystem import DiskFileSystem
from peft_serve.adapters.findings import Inspection
from peft_serve.adapters.profile import parse_profile
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.vocabulary import Vocabulary
from peft_serve.config import Settings
from peft_serve.engine.adapter_places import default_store, shipped_adapters
from peft_serve.engine.assembly import build
from peft_serve.engine.parts import ServerParts
from peft_serve.errors import AdapterInvalid, BadRequest, ServeError
from peft_serve.verify import served
from peft_serve.verify.checkpoint import find_checkpoint
from peft_serve.verify.oracle import Oracle
from peft_serve.verify.report import Compared, Comparison, ReadComparison, Rows, verdict
from peft_serve.verify.task import Task, refuse_foreign, task_of

PROMPTS: Final = (
    "The weather today is",
    "@support my order is three weeks late and nobody answers",
    "What is the capital of France?",
    "I have never seen a film that was",
)

CONTEXT: Final = "The capital of France is Paris. My order is three weeks late, and nobody at @support answers."
"""Where the answers to questions are looked for."""

NOT_VERIFIED: Final = 2
"""The exit status when nothing was compared; 1 is for an answer that differs."""

app = typer.Typer(help="Work with adapters.", no_args_is_help=True)


@app.callback()
def _adapters() -> None:
    """Work with adapters."""


@app.command()
def verify(
    name: Annotated[str, typer.Argument(help="a checkpoint folder, or the name of an uploaded or shipped adapter")],
    model: Annotated[str, typer.Option(help="the base: demo-llama, demo-t5, a folder, or a hub id")] = "demo-llama",
    store: Annotated[str | None, typer.Option(help="the servers' store: a folder, or s3://bucket/prefix")] = None,
    adapters: Annotated[list[Path] | None, typer.Option(help="folders of checkpoints")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="a prompt to compare on; may be repeated")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=1024, help="tokens of each answer")] = 16,
    task_id: Annotated[int | None, typer.Option(min=0, help="which task of an adapter that holds several")] = None,
    context: Annotated[str, typer.Option(help="the text that an adapter for questions looks for answers in")] = CONTEXT,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document, for programs")] = False,
) -> None:
    """Run an adapter's prompts through peft and through the server, in float32, and print the comparison.

    Of an adapter that generates, greedy tokens are compared; of a task head its logits; else the mean of the last
    hidden states. Prompts are --prompt, else the examples of the adapter's peft_serve.json, else four of our own; the
    adapter's template is put around each, unless tokens are read where they stand. Exits with 0 when all answers are
    equal, with 1 when one differs, and with 2 when nothing was compared: the adapter is not found, not served or not
    peft's (AdapterHub's own library needs an environment of its own).
    """
    console = Console()
    shipped = shipped_adapters(model)
    folders = [*(adapters or []), *([] if shipped is None else [shipped])]
    try:
        base_name = Path(model).name if Path(model).is_dir() else model
        root = store or default_store(base_name)
        files = find_checkpoint(name, store=root, folders=folders, base_name=base_name, fs=DiskFileSystem())
        refuse_foreign(files)
        wish = _Wish(
            files=files, model=model, prompts=tuple(prompt or ()), max_new_tokens=max_new_tokens, task_id=task_id,
            context=context,
        )  # fmt: skip
        comparisons = _compare(wish, Console(stderr=True))
    except (ServeError, ValueError, OSError) as error:
        if as_json:
            typer.echo(json.dumps({"error": {"code": "not_verified", "message": str(error)}}, indent=2))
        else:
            console.print(f"[red]not verified:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(NOT_VERIFIED) from None
    is_equal, sentence = verdict(comparisons)
    if as_json:
        prompts = [_facts(one) for one in comparisons]
        typer.echo(json.dumps({"equal": is_equal, "verdict": sentence, "prompts": prompts}, indent=2))
    else:
        console.print(_table(comparisons))
        console.print(f"{'[green]equal[/green]' if is_equal else '[red]different[/red]'}: {sentence}")
    raise typer.Exit(0 if is_equal else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """What is to be compared."""

    files: CheckpointFiles
    model: str
    prompts: tuple[str, ...]
    max_new_tokens: int
    task_id: int | None
    context: str

    def texts(self, task: Task) -> list[str]:
        profile = None if self.files.profile is None else parse_profile(self.files.profile)
        bare = self.prompts or (profile.examples if profile else ()) or PROMPTS
        template = profile.template if profile and not task.reads_tokens else None
        return [template.replace("{text}", text) if template else text for text in bare]


def _compare(wish: _Wish, progress: Console) -> Sequence[Compared]:
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(model=wish.model, dtype="float32", device="cpu", store=folder)
        parts, engine = build(settings, lambda line: progress.print(f"  {line}", highlight=False))
        inspected = _inspected(parts, wish.files)
        task = task_of(wish.files, inspected.summary.head, parts.base)
        engine.start()
        try:
            compared = _generated if task.is_text else _read
            return compared(wish, task, parts, lambda: _oracle(wish, task, inspected.vocabulary, progress))
        finally:
            engine.stop()


def _inspected(parts: ServerParts, files: CheckpointFiles) -> Inspection:
    try:
        return parts.inspect(files)
    except AdapterInvalid as error:
        reasons = "; ".join(f"{refusal.path} {refusal.reason}" for refusal in error.errors)
        raise BadRequest(f"the server refuses the adapter: {reasons}") from error


def _oracle(wish: _Wish, task: Task, vocabulary: Vocabulary, progress: Console) -> Oracle:
    progress.print("  asking peft")
    return Oracle(wish.model, wish.files, task, vocabulary)


def _generated(wish: _Wish, task: Task, parts: ServerParts, oracle: Callable[[], Oracle]) -> Sequence[Compared]:
    texts = wish.texts(task)
    ask = served.ask(parts, wish.files, texts, max_new_tokens=wish.max_new_tokens, task_id=wish.task_id)
    given, plain = asyncio.run(ask)
    asked, eos_ids = oracle(), sorted(parts.base.eos_ids)
    expected = [
        asked.answer(text, max_new_tokens=wish.max_new_tokens, eos_ids=eos_ids, task_id=wish.task_id) for text in texts
    ]
    each = zip(texts, expected, given, plain, strict=True)
    return [Comparison(text=t, expected=e, served=s, base=b) for t, e, s, b in each]


def _read(wish: _Wish, task: Task, parts: ServerParts, oracle: Callable[[], Oracle]) -> Sequence[Compared]:
    texts = [(text, wish.context if task.is_question else None) for text in wish.texts(task)]
    given, plain = asyncio.run(served.read(parts, wish.files, texts, task, task_id=wish.task_id))
    asked = oracle()
    expected = [asked.read(text, pair, task_id=wish.task_id) for text, pair in texts]
    of_base: Sequence[Rows | None] = plain or [None] * len(texts)
    each = zip(texts, expected, given, of_base, strict=True)
    return [ReadComparison(text=t, expected=e, served=s, base=b) for (t, _), e, s, b in each]


def _facts(one: Compared) -> dict[str, object]:
    """A comparison for a program; `differs_from_base` is null where the base alone gives nothing."""
    return {
        "prompt": one.text, "compared": one.told, "equal": one.is_equal, "largest_gap": one.gap,
        "differs_from_base": one.moves,
    }  # fmt: skip


def _table(comparisons: Sequence[Compared]) -> Table:
    table = Table("prompt", "compared", "equal to peft", "largest gap", "differs from base")
    for one in comparisons:
        moves = {True: "yes", False: "no", None: "-"}[one.moves]
        table.add_row(Text(one.text[-60:]), Text(one.told), "yes" if one.is_equal else "no", f"{one.gap:.1e}", moves)
    return table
