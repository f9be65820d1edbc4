"""What a caller writes to name a checkpoint elsewhere: five kinds, one spelling each, and nothing else.

    file:/srv/adapters/one                       a folder of this machine
    hf://org/repo[@revision][/sub/folder]        a model repository of the Hugging Face hub
    s3://bucket/folder, gs://.., az://container/..    a folder of an object store

Owns the grammar. Whether a place may be read is `allowing`'s business, and reading it that of the kind's own module.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from peft_serve.adapters.names import shown
from peft_serve.errors import InvalidParameter

MAX_CHARS: Final = 1024

_STEP: Final = re.compile(r"[^\x00-\x1f\x7f\\]+")
_REPO_STEP: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9._-]{1,62}")
_REVISION: Final = re.compile(r"refs/(?:pr|convert)/[A-Za-z0-9_-]{1,40}|[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HF: Final = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?(?P<folder>(?:/[^/]+)*)/?")


class Kind(StrEnum):
    """What a source is, by the word in front of it."""

    FILE = "file"
    HF = "hf"
    S3 = "s3"
    GS = "gs"
    AZ = "az"


SCHEMES: Final = frozenset(kind.value for kind in Kind)
OBJECT_KINDS: Final = frozenset({Kind.S3, Kind.GS, Kind.AZ})


@dataclass(frozen=True, slots=True, kw_only=True)
class Locator:
    """A place that holds one checkpoint. `str()` spells it so that it is read back the same."""

    kind: Kind
    steps: tuple[str, ...]  # file: of an absolute path; hf: org, repo, folders; else bucket, folders
    revision: str | None = None  # hf only: a branch, a tag or a commit; None: the default branch

    @property
    def repo(self) -> str:
        """hf only: `org/repo`."""
        return "/".join(self.steps[:2])

    def __str__(self) -> str:
        if self.kind is Kind.FILE:
            return "file:/" + "/".join(self.steps)
        if self.kind is not Kind.HF:
            return f"{self.kind}://" + "/".join(self.steps)
        revision = "" if self.revision is None else "@" + self.revision.replace("/", "%2F")
        return f"hf://{self.repo}{revision}" + "".join(f"/{step}" for step in self.steps[2:])


def parse_locator(text: str) -> Locator:
    """Read a source; raises InvalidParameter, with the way it should be written."""
    scheme, colon, rest = text.partition(":")
    if not colon or scheme not in SCHEMES or len(text) > MAX_CHARS:
        raise _refusal(text, "a source begins with file:/, hf://, s3://, gs:// or az://")
    if scheme == Kind.FILE:
        return Locator(kind=Kind.FILE, steps=_path_steps(text, rest))
    if not rest.startswith("//"):
        raise _refusal(text, f"write {scheme}:// with two slashes")
    return _hub_locator(text, rest[2:]) if scheme == Kind.HF else _object_locator(text, Kind(scheme), rest[2:])


def _path_steps(text: str, rest: str) -> tuple[str, ...]:
    path = rest.removeprefix("//") if rest.startswith("///") else rest
    if not path.startswith("/") or path.startswith("//"):
        raise _refusal(text, "write the whole path of a folder, as in file:/srv/adapters/one")
    return _steps(text, path[1:])


def _hub_locator(text: str, rest: str) -> Locator:
    found = _HF.fullmatch(rest)
    if found is None or not all(_REPO_STEP.fullmatch(step) for step in found["repo"].split("/")):
        raise _refusal(text, "write hf://org/repo, hf://org/repo@revision or hf://org/repo@revision/folder")
    revision = found["revision"]
    if revision is not None:
        revision = revision.replace("%2F", "/").replace("%2f", "/")
        if not all(_REVISION.fullmatch(each) for each in _branch_parts(revision)):
            raise _refusal(text, "a revision is a branch, a tag or a commit; write a slash in it as %2F")
    folder = _steps(text, found["folder"][1:]) if found["folder"] else ()
    return Locator(kind=Kind.HF, steps=(*found["repo"].split("/"), *folder), revision=revision)


def _branch_parts(revision: str) -> list[str]:
    return [revision] if revision.startswith("refs/") else revision.split("/")


def _object_locator(text: str, kind: Kind, rest: str) -> Locator:
    bucket, _, folder = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise _refusal(text, f"write {kind}://bucket/folder")
    return Locator(kind=kind, steps=(bucket, *(_steps(text, folder) if folder.rstrip("/") else ())))


def _steps(text: str, path: str) -> tuple[str, ...]:
    steps = tuple(path.removesuffix("/").split("/"))
    if not all(_STEP.fullmatch(step) and step not in (".", "..") for step in steps):
        raise _refusal(text, "a path has plain steps: none is empty, '.' or '..'")
    return steps


def _refusal(text: str, rule: str) -> InvalidParameter:
    return InvalidParameter(f"source {shown(text)}: {rule}", param="source")
