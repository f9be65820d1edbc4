"""What a compiled adapter depends on beside its checkpoint: it may be used again where all of this is the same.

The base with its weights and its shape, the bounds the gate held it to, the libraries that computed it, and the text
of the code that did: whoever edits a method need not remember to raise a number. Knows no store.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from peft_serve.adapters.base import Base, SiteSpec
from peft_serve.adapters.filesystem import FileSystem
from peft_serve.adapters.limits import GateLimits


def compiled_for(base: Base, limits: GateLimits, *, fingerprint: str, code: str, settings: Iterable[str]) -> str:
    """A digest (hex) of everything a compile reads and a checkpoint does not hold.

    `fingerprint` stands for the base's weights, `code` for ours, `settings` for what else decides how they compute.
    """
    shape = (base.name, base.class_name, base.family, base.shape, base.dtype, base.body_prefix)
    groups = (sorted(base.beside_body), sorted(sorted(group) for group in base.tied))
    digest = hashlib.sha256()
    for fact in (fingerprint, code, *settings, shape, groups, limits, *map(_facts, base.sites.values())):
        digest.update(repr(fact).encode() + b"\n")
    return digest.hexdigest()


def _facts(spec: SiteSpec) -> list[object]:
    values = (getattr(spec, part.name) for part in dataclasses.fields(spec))
    return [sorted(value.items()) if isinstance(value, Mapping) else value for value in values]


def code_digest(fs: FileSystem, folder: Path) -> str:
    """A digest (hex) of the Python sources in a folder; raises OSError."""
    digest = hashlib.sha256()
    for path in _sources(fs, folder):
        content = fs.read(path)
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _sources(fs: FileSystem, folder: Path) -> Iterator[Path]:
    for name in fs.list_dir(folder):
        path = folder / name
        if fs.is_dir(path):
            yield from _sources(fs, path)
        elif name.endswith(".py"):
            yield path
