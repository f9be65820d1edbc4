"""`peft-serve generate`: one prompt to one adapter or to several at once, the answers as they come.

Reads the prompt and the parameters and asks; how answers are shown is `columns`' business. Several adapters are asked
in the same moment, so that the server has them in one batch.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import httpx
import typer

from peft_serve.commands.answers import Answer, stream
from peft_serve.commands.columns import Columns, Lines, View
from peft_serve.commands.exits import CommandFailed, Exit
from peft_serve.commands.link import DEFAULT_URL, UrlOption, authorization, checked_url, timeouts
from peft_serve.commands.speech import JsonOption, Speech

BASE: Final = "base"


def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="the prompt; else --file, else stdin")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="who answers: a name, name@2, a+b, or base; several times"),
    ] = None,
    url: UrlOption = DEFAULT_URL,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="file with the prompt")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", "--max-tokens", "-n", min=1)] = None,
    min_new_tokens: Annotated[int | None, typer.Option("--min-new-tokens", min=0)] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", "-t", min=0)] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=0)] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0, max=1)] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", min=0, max=1)] = None,
    typical_p: Annotated[float | None, typer.Option("--typical-p", min=0, max=1)] = None,
    repetition_penalty: Annotated[float | None, typer.Option("--repetition-penalty")] = None,
    frequency_penalty: Annotated[float | None, typer.Option("--frequency-penalty")] = None,
    presence_penalty: Annotated[float | None, typer.Option("--presence-penalty")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0)] = None,
    do_sample: Annotated[
        bool | None, typer.Option("--sample/--greedy", help="draw tokens, or take the likeliest")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="text stops there; several times")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="go on to --max-new-tokens")] = False,
    truncate: Annotated[int | None, typer.Option("--truncate", min=1, help="keep the last n prompt tokens")] = None,
    choice: Annotated[
        list[str] | None, typer.Option("--choice", help="the answer is one of these; several times")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="without the template and the choices of the adapter")] = False,
    task_id: Annotated[int | None, typer.Option("--task-id", min=0, help="which task of the adapter")] = None,
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="any other parameter: name=value, the value in JSON")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Generate from a prompt, and watch the tokens come; several --adapter answer side by side."""
    speech = Speech(as_json=as_json)
    with speech.ending():
        parameters = {
            "max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens, "temperature": temperature,
            "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p,
            "repetition_penalty": repetition_penalty, "frequency_penalty": frequency_penalty,
            "presence_penalty": presence_penalty, "seed": seed, "do_sample": do_sample, "stop": stop or None,
            "ignore_eos": ignore_eos or None, "truncate": truncate, "choices": choice or None, "task_id": task_id,
        }  # fmt: skip
        given = {name: value for name, value in parameters.items() if value is not None} | _others(parameter or ())
        if raw:
            given = {"template": None, "choices": None} | given
        text = _prompt(prompt or [], file)
        answers = asyncio.run(_asked(checked_url(url), adapter or [BASE], text, given, speech))
        _settle(answers, speech)


def _others(parameters: Any) -> dict[str, Any]:
    found = {}
    for each in parameters:
        name, equals, value = each.partition("=")
        if not equals or not name:
            raise CommandFailed(Exit.USAGE, f"--parameter {each}: write name=value, such as num_beams=2")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value  # a word is a string; quotes are for those that look like something else
    return found


def _prompt(words: list[str], file: Path | None) -> str:
    if words and file is not None:
        raise CommandFailed(Exit.USAGE, "--file: the prompt is in the arguments already; leave one of them out")
    if words:
        return " ".join(words)
    try:
        if file is not None and str(file) != "-":
            return _without_end(file.read_text(encoding="utf-8"), f"--file {file}")
        if file is None and sys.stdin.isatty():
            raise CommandFailed(Exit.USAGE, "there is no prompt; write it behind the command, or pipe it in")
        return _without_end(sys.stdin.read(), "stdin")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandFailed(Exit.USAGE, f"--file {file}: cannot be read as text: {error}") from None


def _without_end(text: str, place: str) -> str:
    """A prompt without the newline that editors and `echo` put at the end: a model goes on from it elsewhere."""
    if not text.strip():
        raise CommandFailed(Exit.USAGE, f"{place}: holds no prompt; for an empty one write '' behind the command")
    return text.removesuffix("\n").removesuffix("\r")


def view_for(speech: Speech, adapters: list[str]) -> View:
    """Columns where somebody watches several answers; otherwise lines."""
    if speech.as_json or len(adapters) == 1 or not speech.out.is_terminal:
        return Lines(speech, is_single=len(adapters) == 1)
    return Columns(speech.out)


async def _asked(url: str, adapters: list[str], text: str, parameters: dict[str, Any], speech: Speech) -> list[Answer]:
    answers = [Answer(adapter=name) for name in adapters]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, timeout=timeouts(), limits=limits, headers=authorization(os.environ)
    ) as client:
        with view_for(speech, adapters) as view:
            view.show(answers)
            asked = [stream(client, url, each, text, parameters, lambda: view.show(answers)) for each in answers]
            await asyncio.gather(*asked)
            view.end(answers)
    return answers


def _settle(answers: list[Answer], speech: Speech) -> None:
    """Say what came of it to a program, and fail with the first answer that did."""
    failures = [each.failure for each in answers if each.failure is not None]
    if speech.as_json and len(failures) < len(answers):
        speech.tell({"answers": [each.told() for each in answers]}, "")
        if failures:
            raise typer.Exit(failures[0].exit_code)
    elif failures:
        raise failures[0]
