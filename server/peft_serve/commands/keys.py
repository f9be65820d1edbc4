"""`peft-serve keys`: make a key, and check the file that the server knows them from. Both work without a server.

A key is printed once, when it is made; the file holds its hash.
"""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.markup import escape
from rich.table import Table

from peft_serve.commands.exits import CommandFailed, Exit
from peft_serve.commands.speech import JsonOption, Speech

app = typer.Typer(help="Make keys for a server, and check the file of them.", no_args_is_help=True)

_TOKEN_BYTES: Final = 32
_PREFIX: Final = "psk_"
"""What a key begins with, so that it is known for one where it turns up by mistake."""


@app.command()
def new(
    tenant: Annotated[str, typer.Option("--tenant", help="whose it is", show_default=False)],
    scopes: Annotated[
        list[str], typer.Option("--scopes", help="infer, upload and admin; several with commas, or said again")
    ] = ["infer"],  # noqa: B006  # read, never changed
    adapters: Annotated[
        list[str] | None, typer.Option("--adapters", help="name, or prefix*; several with commas, or said again")
    ] = None,
    base: Annotated[bool, typer.Option("--base/--no-base", help="may ask the base by itself")] = True,
    note: Annotated[str, typer.Option("--note", help="a word for people, kept in the file")] = "",
    as_json: JsonOption = False,
) -> None:
    """Make a key: it is printed once, with the entry for the file that --api-keys-file names."""
    speech = Speech(as_json=as_json)
    with speech.ending():
        from peft_serve.api.key_file import KeyFileInvalid, entry_text, hash_of, read_keys

        token = _PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)
        entry: dict[str, Any] = {
            "tenant": tenant,
            "key": f"sha256:{hash_of(token).hex()}",
            "scopes": _listed(scopes),
            "adapters": _listed(adapters or []),
            "base": base,
        } | ({"note": note} if note else {})
        text = entry_text(entry)
        try:
            read_keys(b"keys:\n" + text.encode())
        except KeyFileInvalid as error:
            raise CommandFailed(Exit.USAGE, str(error).replace("keys.0.", "--"), code="usage") from None
        if not entry["adapters"]:
            speech.note("this key sees no adapter; --adapters 'name,prefix*' gives it some, --adapters '*' all")
        if as_json:
            speech.tell({"key": token, "entry": entry}, "")
            return
        speech.note("the key, which is shown this once:")
        typer.echo(token)
        speech.note("\nits entry, below `keys:` in the file of --api-keys-file:")
        typer.echo(text.rstrip())


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="the file of --api-keys-file; - for stdin", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Check a file of keys as the server would, and tell what is in it. No key can be read from it."""
    speech = Speech(as_json=as_json)
    with speech.ending():
        from peft_serve.api.key_file import KeyFileInvalid, read_keys

        try:
            notes: list[str] = []
            content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
            found = read_keys(content, note=notes.append)
        except KeyFileInvalid as error:
            raise CommandFailed(Exit.FAILED, f"{file}: {error}", code="invalid") from None
        except OSError as error:
            raise CommandFailed(Exit.USAGE, f"{file}: cannot be read ({error.strerror}); check the path") from None
        rows = [
            {
                "tenant": each.tenant.name,
                "hash": f"{known.hex()[:8]}..",
                "scopes": sorted(each.scopes),
                "adapters": [*sorted(each.reach.names), *(f"{begin}*" for begin in each.reach.beginnings)],
                "base": each.may_ask_base,
                "weight": each.tenant.weight,
            }
            for known, each in found.items()
        ]
        speech.tell({"keys": rows, "notes": notes}, _table(rows))
        for each in notes:
            speech.note(f"{file}: {each}")


def _listed(given: list[str]) -> list[str]:
    """What was said with commas, or again and again."""
    return [word.strip() for each in given for word in each.split(",") if word.strip()]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("tenant", "key", "scopes", "adapters", "base", "weight", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            escape(row["tenant"]),
            row["hash"],
            ", ".join(row["scopes"]),
            escape(", ".join(row["adapters"]) or "-"),
            "yes" if row["base"] else "no",
            f"{row['weight']:g}",
        )
    return table
