"""`peft-serve adapters`: what a server serves, and how it changes. Each command is one or two requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from peft_serve.commands import adapter_tables as tables
from peft_serve.commands import aliases
from peft_serve.commands.adapter_transfer import fetched, pulled, pushed
from peft_serve.commands.exits import CommandFailed, Exit
from peft_serve.commands.link import DEFAULT_URL, ServerLink, UrlOption
from peft_serve.commands.speech import JsonOption, Speech

app = typer.Typer(help="List, upload, check and move the adapters of a server.", no_args_is_help=True)
app.add_typer(aliases.app, name="alias")

NameArgument = Annotated[str, typer.Argument(help="the adapter's name", show_default=False)]
CheckpointArgument = Annotated[
    Path, typer.Argument(help="a checkpoint folder, or a .zip, .tar or .tar.gz of one", show_default=False)
]


@app.command("list")
def list_adapters(
    url: UrlOption = DEFAULT_URL,
    resident: Annotated[bool, typer.Option("--resident", help="only those on the device")] = False,
    as_json: JsonOption = False,
) -> None:
    """List every adapter: version, method, size, and where it is now."""
    speech = Speech(as_json=as_json)
    with speech.ending(), ServerLink(url) as link:
        found = link.json("GET", "/adapters")
        if resident:
            found["adapters"] = [each for each in found["adapters"] if each["residency"] == "device"]
        speech.tell(found, tables.listed(found["adapters"]))


@app.command()
def show(name: NameArgument, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """Show everything that is known about an adapter."""
    speech = Speech(as_json=as_json)
    with speech.ending(), ServerLink(url) as link:
        found = link.json("GET", tables.address(name))
        speech.tell(found, tables.facts(found))


@app.command()
def versions(name: NameArgument, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """List the versions of an adapter, oldest first."""
    speech = Speech(as_json=as_json)
    with speech.ending(), ServerLink(url) as link:
        found = link.json("GET", tables.address(name, "versions"))
        speech.tell(found, tables.versions(found["versions"]))


@app.command()
def push(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="a checkpoint folder, a .zip, .tar or .tar.gz of one, or a source: hf://org/repo", show_default=False
        ),
    ],
    name: Annotated[str | None, typer.Argument(help="its name; default: the folder's, file's or repository's")] = None,
    url: UrlOption = DEFAULT_URL,
    if_match: Annotated[
        str | None, typer.Option("--if-match", help="only over this version: its digest or ETag")
    ] = None,
    create_only: Annotated[bool, typer.Option("--create-only", help="only if the name is free")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check, and publish nothing")] = False,
    as_json: JsonOption = False,
) -> None:
    """Upload a checkpoint as an adapter, or as a new version of it. The next request can use it.

    A source (hf://, s3://, gs://, az:// or file:) is fetched by the server, where its --allow-source allows it.
    """
    speech = Speech(as_json=as_json)
    with speech.ending(), ServerLink(url) as link:
        headers = {} if if_match is None else {"if-match": etag(if_match)}
        headers |= {"if-none-match": "*"} if create_only else {}
        query = {"dry_run": "1"} if dry_run else {}
        if checkpoint.startswith(_SOURCES):
            if dry_run or if_match is not None:
                raise CommandFailed(Exit.USAGE, "--dry-run and --if-match are for files of yours, not for a source")
            found = fetched(link, speech, checkpoint, name or _last_step(checkpoint), headers=headers)
        elif "://" in checkpoint:
            raise CommandFailed(
                Exit.USAGE, f"{checkpoint}: nothing is fetched from there; a source begins with {', '.join(_SOURCES)}"
            )
        else:
            found = pushed(link, speech, Path(checkpoint), name, headers=headers, query=query)
        speech.tell(found, tables.published(found))


@app.command()
def validate(checkpoint: CheckpointArgument, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """Let the server check a checkpoint against its base, and keep nothing."""
    speech = Speech(as_json=as_json)
    with speech.ending(), ServerLink(url) as link:
        found = pushed(link, speech, checkpoint, None, validate=True)
        speech.tell(found, tables.facts(found, title=f"{checkpoint.name} would be accepted"))


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="name, name@3 or name@sha256:..", show_default=False)],
    folder: Annotated[Path | None, typer.Argument(help="where to; default: a new folder of its name")] = None,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Download the files of an adapter into a folder, each checked against the digest of the version."""
    speech = Speech(as_json=as_json)
    with speech.ending(), ServerLink(url) as link:
        found = pulled(link, speech, name, folder or Path(name.partition("@")[0]))
        speech.tell(found, f"{found['name']} version {found['version']} is in {found['folder']}")


@app.command()
def rm(
    name: NameArgument,
    url: UrlOption = DEFAULT_URL,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
    if_match: Annotated[str | None, typer.Option("--if-match", help="only if it is at this version")] = None,
    force: Annotated[bool, typer.Option("--force", help="take it out of the aliases that point to it")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete an adapter with all its versions. Running requests end on their weights."""
    speech = Speech(as_json=as_json)
    with speech.ending(), ServerLink(url) as link:
        if as_json and not yes:
            raise CommandFailed(Exit.USAGE, "rm asks before it deletes, and --json cannot ask; add --yes")
        if not yes and not typer.confirm(f"delete adapter {name!r} and all its versions?", err=True):
            raise typer.Exit(Exit.FAILED)
        headers = {} if if_match is None else {"if-match": etag(if_match)}
        query = {"force": "1"} if force else {}
        found = link.json("DELETE", tables.address(name), headers=headers, params=query)
        told = found or {"name": name, "state": "deleted", "in_flight": 0}
        rest = f"; {told['in_flight']} requests still run on it" if told["in_flight"] else ""
        speech.tell(told, f"{name} is deleted{rest}")


@app.command()
def rollback(
    name: NameArgument,
    version: Annotated[int | None, typer.Option("--version", min=1, help="which; default: the one before")] = None,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Let the name stand for an earlier version again."""
    speech = Speech(as_json=as_json)
    body: dict[str, Any] = {} if version is None else {"json": {"version": version}}
    with speech.ending(), ServerLink(url) as link:
        found = link.json("POST", tables.address(name, "rollback"), **body)
        speech.tell(found, f"{name} is version {found['version']} ({found['digest'][:19]}..)")


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
)
def verify(context: typer.Context) -> None:
    """Run an adapter's prompts through peft and through the server's own code, and compare (see verify --help)."""
    from peft_serve.verify.command import app as verifying  # it loads a base, so it is imported here

    verifying(["verify", *context.args], prog_name="peft-serve adapters", standalone_mode=True)


_SOURCES: Final = ("hf://", "s3://", "gs://", "az://", "file:")
_MOVES: Final = {
    "pin": ("Keep an adapter on the device from its next request on.", "is pinned"),
    "unpin": ("Let a pinned adapter be evicted again.", "is no longer pinned"),
    "load": ("Bring an adapter to the host's memory now.", "is being brought to the host"),
    "unload": ("Give an adapter's memory back.", "gives its memory back"),
}


def _move(act: str, said: str) -> Callable[..., None]:
    def move(name: NameArgument, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
        speech = Speech(as_json=as_json)
        with speech.ending(), ServerLink(url) as link:
            found = link.json("POST", tables.address(name, act))
            speech.tell(found, f"{name} {said} (now on: {found['residency']})")

    return move


for _act, (_help, _said) in _MOVES.items():
    app.command(_act, help=_help)(_move(_act, _said))


def _last_step(source: str) -> str:
    """What a source is called when nobody says otherwise: its last step, without a revision."""
    return source.rstrip("/").rpartition("/")[2].partition("@")[0].removeprefix("file:")


def etag(given: str) -> str:
    """The entity tag of a version, from a digest (`sha256:..`), from a tag with or without its quotes, or `*`."""
    bare = given.strip('"').replace(":", "-")
    if given != "*" and not bare.startswith("sha256-"):
        raise CommandFailed(
            Exit.USAGE, f"--if-match {given}: is no digest; `peft-serve adapters show` tells it (sha256:..)"
        )
    return given if given == "*" else f'"{bare}"'
