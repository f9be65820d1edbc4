"""AdapterHub's files through every door: an archive, a form, a folder, the store."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from peft_serve.adapters.archive import files_from_parts, read_upload
from peft_serve.adapters.filesystem import DiskFileSystem
from peft_serve.adapters.folders import CheckpointFolders
from peft_serve.adapters.records import (
    CONFIG_FILE,
    HEAD_CONFIG_FILE,
    HEAD_WEIGHTS_FILE,
    HUB_WEIGHTS_FILE,
    WEIGHTS_FILE,
    CheckpointFiles,
)
from peft_serve.adapters.store import AdapterStore
from peft_serve.errors import MalformedUpload
from tests.adapters.adapterhub.served import GOLDEN, files_of
from tests.adapters.store.store_fakes import manifest_of

WITH_HEAD = GOLDEN / "bert" / "head_classification"
FILES = files_of("bert", "head_classification")


def parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"mine/{name}", content)
    return buffer.getvalue()


def test_an_archive_and_a_form_hold_what_the_folder_held() -> None:
    assert files_from_parts(parts(WITH_HEAD)) == FILES
    assert read_upload(zipped(parts(WITH_HEAD)), "application/zip") == FILES
    assert FILES.head_config is not None
    assert FILES.head_weights is not None


def test_the_head_counts_in_the_digest_and_peft_s_digests_stay() -> None:
    bare = CheckpointFiles(config=FILES.config, weights=FILES.weights)
    assert bare.digest() != FILES.digest()
    assert FILES.num_bytes == bare.num_bytes + len(FILES.head_config or b"") + len(FILES.head_weights or b"")
    assert CheckpointFiles(config=b"{}", weights=b"w").digest() == (
        "sha256:b65262d8a9390b253cfbc3ce2d47d7c16feade9edb04af5f25b286ee03265b1e"
    )


def test_a_pickle_is_refused_with_the_way_out() -> None:
    members = parts(WITH_HEAD)
    members["pytorch_adapter.bin"] = members.pop(HUB_WEIGHTS_FILE)
    with pytest.raises(
        MalformedUpload, match=r"pytorch_adapter\.bin but no adapter\.safetensors.*use_safetensors=True"
    ):
        read_upload(zipped(members), None)
    members[HUB_WEIGHTS_FILE] = b"\x80\x04" + b"x" * 20
    with pytest.raises(MalformedUpload, match=r"adapter\.safetensors is a pickle.*use_safetensors=True"):
        read_upload(zipped(members), None)


def test_a_fusion_layer_alone_is_refused_by_name() -> None:
    members = {"adapter_fusion_config.json": b"{}", "model_adapter_fusion.safetensors": b"x"}
    with pytest.raises(MalformedUpload, match="AdapterFusion"):
        read_upload(zipped(members), None)


def test_beside_peft_s_weights_the_files_of_adapterhub_are_not_read() -> None:
    files = files_from_parts({CONFIG_FILE: b"{}", WEIGHTS_FILE: b"w", HUB_WEIGHTS_FILE: b"v", HEAD_CONFIG_FILE: b"{}"})
    assert (files.weights, files.head_config, files.ignored) == (b"w", None, (HUB_WEIGHTS_FILE, HEAD_CONFIG_FILE))


def test_the_store_gives_back_what_it_was_given(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, DiskFileSystem())
    store.put_blob(FILES.digest(), FILES, manifest_of(FILES))
    assert store.read_blob(FILES.digest()) == FILES
    store.close()


def test_a_folder_is_served_where_it_lies_and_a_changed_head_is_seen(tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    for name, content in parts(WITH_HEAD).items():
        (place / name).write_bytes(content)
    folders = CheckpointFolders([tmp_path], DiskFileSystem(), base_name="demo")
    stamp, files = folders.read("mine")
    assert files == FILES
    (place / HEAD_WEIGHTS_FILE).write_bytes(b"other")
    assert folders.stamp("mine") != stamp
    assert folders.read("mine")[1].head_weights == b"other"
    (place / HEAD_WEIGHTS_FILE).unlink()
    assert folders.read("mine")[1].head_weights is None
