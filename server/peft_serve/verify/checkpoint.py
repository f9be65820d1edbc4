"""Finds the files of the adapter that is to be verified: a folder, an upload in a store, a shipped adapter.

It reads and never owns: the store may belong to a server that runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft_serve.adapters.filesystem import FileSystem
from peft_serve.adapters.folders import CheckpointFolders
from peft_serve.adapters.name_record import NameRecord
from peft_serve.adapters.names import is_name
from peft_serve.adapters.records import CONFIG_FILE, HUB_WEIGHTS_FILE, PROFILE_FILE, WEIGHTS_FILE, CheckpointFiles
from peft_serve.adapters.sealed import unseal
from peft_serve.adapters.store import blob_folder, record_file
from peft_serve.adapters.vocabulary import MAX_BYTES, vocabulary_files
from peft_serve.engine.adapter_places import read_shared
from peft_serve.errors import BadRequest, UnknownAdapter


def find_checkpoint(
    name: str, *, store: Path | str, folders: Sequence[Path], base_name: str, fs: FileSystem
) -> CheckpointFiles:
    """The files that `name` stands for now: a checkpoint folder, else an upload, else an adapter of `folders`.

    `store` is a folder of one server or of several, or `s3://bucket/prefix`. Raises `UnknownAdapter`.
    """
    place = Path(name)
    if fs.stamp(place / CONFIG_FILE) is not None:
        return _read(place, fs)
    if is_name(name):
        uploaded = read_shared(store, name) or _uploaded(name, Path(store), fs)
        if uploaded is not None:
            return uploaded
        found = CheckpointFolders(folders, fs, base_name=base_name)
        if name in found:
            return found.read(name)[1]
    raise UnknownAdapter(
        f"'{name}' is neither a checkpoint folder nor an adapter of {store} or --adapters; "
        "name a folder that holds an adapter_config.json, or give the --store of the server"
    )


def _uploaded(name: str, store: Path, fs: FileSystem) -> CheckpointFiles | None:
    try:
        record = NameRecord.from_json(unseal(fs.read(record_file(store, name))))
    except FileNotFoundError:
        return None
    current = record.current_version
    return None if current is None else _read(blob_folder(store, current.id), fs)


def _read(folder: Path, fs: FileSystem) -> CheckpointFiles:
    """The files of a folder; of one that AdapterHub's library saved, those that are no peft file are left out."""
    names = (CONFIG_FILE, WEIGHTS_FILE, HUB_WEIGHTS_FILE, PROFILE_FILE, *MAX_BYTES)
    found = {name: fs.read(folder / name) for name in names if fs.stamp(folder / name) is not None}
    weights = found.get(WEIGHTS_FILE, found.get(HUB_WEIGHTS_FILE))
    if weights is None:
        raise BadRequest(f"{folder} holds no {WEIGHTS_FILE}; name a folder that peft's save_pretrained wrote")
    return CheckpointFiles(
        config=found[CONFIG_FILE],
        weights=weights,
        profile=found.get(PROFILE_FILE),
        vocabulary=vocabulary_files(found),
    )
