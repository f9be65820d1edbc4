"""Where a server's adapters are: the store of uploads, opened before anything slow, and the read-only folders.

The store is a folder of this server alone, a folder that several servers share, or a place in an object store. Knows
the settings that name them; what is in them is the catalog's.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import peft_serve
from peft_serve.adapters.catalog import Catalog
from peft_serve.adapters.filesystem import DiskFileSystem
from peft_serve.adapters.findings import Gate
from peft_serve.adapters.folders import CheckpointFolders
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.shared.bucket import Bucket
from peft_serve.adapters.shared.folder_bucket import FolderBucket
from peft_serve.adapters.shared.object_bucket import SCHEME, ObjectBucket
from peft_serve.adapters.shared.object_words import ObjectStoreError
from peft_serve.adapters.shared.patient_bucket import PatientBucket
from peft_serve.adapters.shared.reading import read_current
from peft_serve.adapters.shared.store import SharedStore
from peft_serve.adapters.store import AdapterStore
from peft_serve.adapters.store_protocol import Store
from peft_serve.config import Settings
from peft_serve.engine.client import EngineThread
from peft_serve.engine.following import StoreFollower
from peft_serve.errors import AdapterUnavailable, Unavailable
from peft_serve.model.loader import DEMO_NAMES

SHARED_FOLDER: Final = "shared"
"""In the folder of a shared store; what is compiled of its adapters lies beside it."""

_WRONG_PLACES: Final = (FileExistsError, NotADirectoryError, PermissionError)
_NAME_ANOTHER: Final = "name a folder that this user may read and write"


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


def local_folder(settings: Settings, base_name: str) -> Path:
    """The folder on this machine that goes with the store: the store itself, or, of one in an object store, where what
    is compiled of its adapters is kept. Servers may share it."""
    if settings.store is None or _is_object_store(settings):
        return default_store(base_name)
    return Path(settings.store)


def open_store(settings: Settings, root: Path) -> Store:
    """The store of uploads: of this server alone in `root`, with its lock, else the one that it shares with others.

    Raises ValueError for a place that is none or not this user's, and Unavailable where another process holds the lock,
    or the place does not answer: that is told to who starts the server, with the place and why."""
    if _is_object_store(settings):
        assert settings.store is not None
        return _opened(settings, f"--store {settings.store}", lambda: _object_bucket(settings.store or ""))
    shared, alone = root / SHARED_FOLDER, root / "names"
    if settings.store_shared:
        if _has_entries(alone):
            raise ValueError(f"--store {root}: is the store of one server; give --store-shared a folder of its own")
        return _opened(settings, f"--store {root}", lambda: _folder_bucket(settings, shared))
    if shared.is_dir():
        raise ValueError(f"--store {root}: is shared by several servers; start this one with --store-shared, too")
    return _open_alone(settings, root)


def _is_object_store(settings: Settings) -> bool:
    return settings.store is not None and settings.store.startswith(SCHEME)


def _has_entries(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _object_bucket(url: str) -> PatientBucket:
    return PatientBucket(ObjectBucket.at(url), clock=time.monotonic)


def _folder_bucket(settings: Settings, folder: Path) -> FolderBucket:
    return FolderBucket(
        folder,
        DiskFileSystem(),
        clock=time.monotonic,
        new_name=_new_name,
        grace_s=settings.store_grace_s,
        min_free_bytes=settings.store_reserve_bytes,
    )


def _opened(settings: Settings, what: str, open_bucket: Callable[[], Bucket]) -> SharedStore:
    """A shared store that answers."""
    try:
        return SharedStore(open_bucket(), clock=time.monotonic, new_name=_new_name, grace_s=settings.store_grace_s)
    except (OSError, Unavailable) as error:
        cause = _cause(error)
        if isinstance(cause, _WRONG_PLACES):
            raise ValueError(f"{what}: {cause.strerror or type(cause).__name__}; {_NAME_ANOTHER}") from error
        raise Unavailable(f"{what}: {_why(error)} (the store has to answer when a server starts)") from error


def _cause(error: OSError | Unavailable) -> BaseException | None:
    return error if isinstance(error, OSError) else error.__cause__


def _why(error: OSError | Unavailable) -> str:
    """What the place said, and the way out."""
    cause = _cause(error)
    why = cause.strerror if isinstance(cause, OSError) and cause.strerror else type(cause).__name__
    way_out = cause.way_out if isinstance(cause, ObjectStoreError) else "check the place and its rights"
    return f"{why}; {way_out}"


def _new_name() -> str:
    return uuid.uuid4().hex


def make_follower(settings: Settings, catalog: Catalog, engine: EngineThread) -> StoreFollower | None:
    """What learns of other servers' changes; None where there are no others."""
    if not catalog.is_shared:
        return None
    return StoreFollower(catalog, engine, poll_s=settings.store_poll_s, draw=random.Random().random)


def _open_alone(settings: Settings, root: Path) -> AdapterStore:
    try:
        return AdapterStore(root, DiskFileSystem(), min_free_bytes=settings.store_reserve_bytes)
    except Unavailable as error:
        if not isinstance(error.__cause__, OSError) or "cannot be opened" not in error.message:
            raise
        why = error.__cause__.strerror or type(error.__cause__).__name__
        kind = ValueError if isinstance(error.__cause__, _WRONG_PLACES) else Unavailable
        raise kind(f"--store {root}: {why}; {_NAME_ANOTHER}") from error


def open_store_to_read(settings: Settings, root: Path) -> Store:
    """The same for a process beside those that write: it takes no lock and changes nothing."""
    if settings.store_shared or _is_object_store(settings):
        return open_store(settings, root)
    return AdapterStore(root, DiskFileSystem(), min_free_bytes=settings.store_reserve_bytes, writes=False)


def read_shared(store: str | Path, name: str) -> CheckpointFiles | None:
    """What a name stands for now in a store that servers share, without becoming one of them; None if that is nothing,
    or `store` is no such place. Raises AdapterUnavailable, and ValueError for a place that is none."""
    settings = Settings(store=str(store), store_shared=True)
    if _is_object_store(settings):
        bucket: Bucket = _object_bucket(str(store))
    elif (Path(store) / SHARED_FOLDER).is_dir():
        bucket = _folder_bucket(settings, Path(store) / SHARED_FOLDER)
    else:
        return None
    try:
        return read_current(bucket, name)
    except AdapterUnavailable as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise AdapterUnavailable(f"--store {store}: {_why(error)}") from error


def make_catalog(
    settings: Settings,
    store: Store,
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
    kept = "read from" if store.is_read_only else "shared in" if store.is_shared else "kept in"
    place = settings.store or root
    say(f"adapters: {len(folders.names())} found in {len(paths)} folders; uploads are {kept} {place}")
    return Catalog(
        store,
        folders,
        gate.check,
        checked_for=checked_for,
        base_name=base_name,
        now=lambda: datetime.now(UTC),
        drafts=gate,
    )
