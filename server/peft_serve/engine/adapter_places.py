"""Where a server's adapters are: the store of uploads, opened before anything slow, and the read-only folders.

Knows the settings that name them; what is in them is the catalog's.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import peft_serve
from peft_serve.adapters.catalog import Catalog
from peft_serve.adapters.filesystem import DiskFileSystem
from peft_serve.adapters.findings import Gate
from peft_serve.adapters.folders import CheckpointFolders
from peft_serve.adapters.store import AdapterStore
from peft_serve.config import Settings
from peft_serve.errors import Unavailable
from peft_serve.model.loader import DEMO_NAMES


def default_store(base_name: str) -> Path:
    """Where the uploads of a base are kept unless --store says otherwise."""
    return Path.home() / ".local" / "share" / "peft-serve" / base_name.replace("/", "--")


def shipped_adapters(model: str) -> Path | None:
    """The folder of adapters that ship with a demo base: in a checkout, or inside an installed wheel."""
    if model not in DEMO_NAMES:
        return None
    package = Path(peft_serve.__file__).parent
    candidates = (package / "demo" / "adapters" / model, package.parent.parent / "adapters" / model)
    return next((path for path in candidates if path.is_dir()), None)


def open_store(settings: Settings, root: Path) -> AdapterStore:
    """The store of uploads in `root`, with its lock; raises Unavailable where another process holds that, or where
    the folder cannot be used: that is told to who starts the server, with the folder and why."""
    try:
        return AdapterStore(root, DiskFileSystem(), min_free_bytes=settings.store_reserve_bytes)
    except Unavailable as error:
        if not isinstance(error.__cause__, OSError) or "cannot be opened" not in error.message:
            raise
        why = error.__cause__.strerror or type(error.__cause__).__name__
        raise Unavailable(f"--store {root}: {why}; name a folder that this user may read and write") from error


def make_catalog(
    settings: Settings,
    store: AdapterStore,
    root: Path,
    base_name: str,
    gate: Gate,
    checked_for: str,
    say: Callable[[str], None],
) -> Catalog:
    """The names of a store and of the folders. They are listed and no file is read, however many there are."""
    shipped = shipped_adapters(settings.model)
    paths = [*settings.adapters, *([] if shipped is None else [shipped])]
    most, disk = settings.max_adapter_bytes, DiskFileSystem()
    folders = CheckpointFolders(paths, disk, base_name=base_name, max_bytes=most, shipped=shipped)
    for problem in folders.problems:
        say(f"adapters: {problem}")
    kept = "read from" if store.is_read_only else "kept in"
    say(f"adapters: {len(folders.names())} found in {len(paths)} folders; uploads are {kept} {root}")
    return Catalog(
        store,
        folders,
        gate.check,
        checked_for=checked_for,
        base_name=base_name,
        now=lambda: datetime.now(UTC),
        drafts=gate,
    )
