"""A checkpoint made ready to travel: a folder packed into a zip in a temporary file, or an archive as it is.

Takes the files that a server reads and leaves the rest at home (optimizer states, READMEs). Whether they are any good
is for the server to say; what is plainly not a checkpoint is refused before a byte is sent.
"""

from __future__ import annotations

import base64
import hashlib
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, cast

from peft_serve.commands.exits import CommandFailed, Exit

CHUNK: Final = 1 << 20
_CONFIG: Final = "adapter_config.json"
_MEDIA_TYPES: Final = {
    ".zip": "application/zip", ".tar": "application/x-tar", ".gz": "application/gzip", ".tgz": "application/gzip",
}  # fmt: skip
_FILES: Final = (
    _CONFIG, "adapter_model.safetensors", "adapter.safetensors", "peft_serve.json", "head_config.json",
    "model_head.safetensors", "chat_template.jinja", "tokenizer_config.json", "added_tokens.json", "tokenizer.json",
    "tokenizer_tokens.json",
)  # fmt: skip
"""The files of a checkpoint that a server reads; a test holds this list against the server's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """An archive that is open for reading, and what is said about it beside it."""

    file: BinaryIO
    num_bytes: int
    media_type: str
    digest: str  # a Content-Digest header's value
    name: str  # what the adapter is called if nobody says otherwise

    def chunks(self, sent: Callable[[int], None]) -> Iterator[bytes]:
        """The archive in pieces; `sent` is told the size of each once it was taken."""
        while piece := self.file.read(CHUNK):
            yield piece
            sent(len(piece))


@contextmanager
def parcel(path: Path) -> Iterator[Parcel]:
    """The checkpoint at `path`; raises CommandFailed when there is none."""
    if path.is_dir():
        with tempfile.TemporaryFile() as spool:
            file = cast(BinaryIO, spool)
            _pack(path, file)
            yield _of(file, "application/zip", path.resolve().name)
        return
    media_type = _MEDIA_TYPES.get(path.suffix.lower())
    if not path.exists():
        raise CommandFailed(Exit.USAGE, f"{path}: there is no such folder or file; check the path", code="checkpoint")
    if media_type is None:
        raise CommandFailed(
            Exit.USAGE,
            f"{path}: is neither a folder nor a .zip, .tar or .tar.gz; give the folder that save_pretrained wrote",
            code="checkpoint",
        )
    with path.open("rb") as file:
        yield _of(file, media_type, path.name.partition(".")[0])


def _pack(folder: Path, file: BinaryIO) -> None:
    found = [folder / name for name in _FILES if (folder / name).is_file()]
    if folder / _CONFIG not in found:
        inside = sorted(each.parent.name for each in folder.glob(f"*/{_CONFIG}"))
        advice = (
            f"did you mean {folder / inside[0]}?" if inside else "give the folder that peft's save_pretrained wrote"
        )
        raise CommandFailed(Exit.USAGE, f"{folder}: holds no {_CONFIG}; {advice}", code="checkpoint")
    _check_weights(folder, {each.name for each in found})
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:  # weights do not get smaller
        for each in found:
            archive.write(each, each.name)


def _check_weights(folder: Path, names: set[str]) -> None:
    if names & {"adapter_model.safetensors", "adapter.safetensors"}:
        return
    pickles = sorted(each.name for each in folder.iterdir() if each.suffix in (".bin", ".pt", ".pth"))
    found = f"holds {pickles[0]}, a pickle, whose reading can run code, and" if pickles else "holds"
    raise CommandFailed(
        Exit.USAGE,
        f"{folder}: {found} no adapter_model.safetensors; save the adapter again with peft's "
        "save_pretrained(folder, safe_serialization=True), the default",
        code="checkpoint",
    )


def _of(file: BinaryIO, media_type: str, name: str) -> Parcel:
    file.seek(0)
    digest, num_bytes = hashlib.sha256(), 0
    while piece := file.read(CHUNK):
        digest.update(piece)
        num_bytes += len(piece)
    file.seek(0)
    told = f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    return Parcel(file=file, num_bytes=num_bytes, media_type=media_type, digest=told, name=name)
