"""Taking a checkpoint out of a folder: what is read, what is bounded, and folders of this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peft_serve.adapters.members import UploadLimits
from peft_serve.adapters.sources.folder import Progress, fetch
from peft_serve.adapters.sources.local import LocalFolder
from peft_serve.errors import FetchFailed, Forbidden, MalformedUpload, NotFound, PayloadTooLarge
from tests.adapters.sources.source_fakes import FILES, MemoryFolder, put

LIMITS = UploadLimits(max_bytes=1000, max_json_bytes=200)


def test_only_the_needed_files_are_read_and_progress_is_told() -> None:
    folder, progress = MemoryFolder(dict(FILES)), Progress()
    files = fetch(folder, LIMITS, progress)
    assert sorted(folder.reads) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (files.config, files.weights) == (FILES["adapter_config.json"], FILES["adapter_model.safetensors"])
    assert files.ignored == ("README.md",)
    assert progress.num_bytes == progress.total_bytes == files.num_bytes


def test_of_a_folder_with_weights_of_two_libraries_pefts_are_read() -> None:
    folder = MemoryFolder({**FILES, "adapter.safetensors": b"x" * 10, "head_config.json": b"{}"})
    fetch(folder, LIMITS, Progress())
    assert "adapter.safetensors" not in folder.reads
    assert "head_config.json" not in folder.reads


def test_sizes_are_compared_before_anything_is_read() -> None:
    for name, num_bytes in (("adapter_model.safetensors", 1001), ("adapter_config.json", 201)):
        folder = MemoryFolder({**FILES, name: b"x" * num_bytes})
        with pytest.raises(PayloadTooLarge, match=str(num_bytes)):
            fetch(folder, LIMITS, Progress())
        assert folder.reads == []


def test_a_folder_without_weights_is_refused_as_an_upload_is() -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.bin": b"PK"}
    with pytest.raises(MalformedUpload, match=r"adapter_model\.bin but no adapter_model\.safetensors"):
        fetch(MemoryFolder(files), LIMITS, Progress())


@pytest.mark.parametrize("change", ["weights", "new file", "gone"])
def test_a_folder_that_changes_while_it_is_read_is_not_taken(change: str) -> None:
    def on_read(name: str) -> None:
        if change == "weights":
            folder.files["adapter_model.safetensors"] = b"other weights"
        elif change == "new file":
            folder.files["peft_serve.json"] = b"{}"
        elif name == "adapter_model.safetensors":
            del folder.files[name]

    folder = MemoryFolder(dict(FILES), on_read)
    with pytest.raises(FetchFailed, match="changed while it was read"):
        fetch(folder, LIMITS, Progress())


def test_a_fetch_is_given_up_where_it_is_told_to() -> None:
    def check() -> None:
        if progress.num_bytes >= 8:
            raise FetchFailed("enough")

    progress = Progress(check)
    with pytest.raises(FetchFailed, match="enough"):
        fetch(MemoryFolder(dict(FILES)), LIMITS, progress)
    assert progress.num_bytes == 8


def test_a_local_folder_and_its_provenance(tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    folder = LocalFolder(root, put(root / "team" / "one"))
    assert fetch(folder, LIMITS, Progress()).weights == FILES["adapter_model.safetensors"]
    assert folder.provenance == "file:adapters/team/one"


def test_links_that_stay_are_followed_and_others_are_not(tmp_path: Path) -> None:
    root, outside = tmp_path / "adapters", put(tmp_path / "outside")
    put(root / "one")
    (root / "link").symlink_to(root / "one")
    assert fetch(LocalFolder(root, root / "link"), LIMITS, Progress()).config == FILES["adapter_config.json"]

    (root / "away").symlink_to(outside)
    put(root / "file-away", {"adapter_config.json": b"{}"})
    (root / "file-away" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    for name in ("away", "file-away"):
        with pytest.raises(Forbidden, match="leads out") as refused:
            fetch(LocalFolder(root, root / name), LIMITS, Progress())
        assert str(tmp_path) not in refused.value.message


def test_a_root_that_is_a_link_is_a_root(tmp_path: Path) -> None:
    real = tmp_path / "real"
    put(real / "one")
    (tmp_path / "root").symlink_to(real)
    folder = LocalFolder(tmp_path / "root", tmp_path / "root" / "one")
    assert fetch(folder, LIMITS, Progress()).config == FILES["adapter_config.json"]


def test_a_link_put_in_after_looking_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between resolving a path and opening it, a folder becomes a link out."""
    root, outside = tmp_path / "adapters", put(tmp_path / "outside")
    put(root / "one")
    resolve = Path.resolve

    def resolving(self: Path, strict: bool = False) -> Path:
        found = resolve(self, strict=strict)
        if self.name == "one" and not self.is_symlink():
            self.rename(root / "moved")
            self.symlink_to(outside)
        return found

    monkeypatch.setattr(Path, "resolve", resolving)
    with pytest.raises(Forbidden, match="leads out"):
        LocalFolder(root, root / "one").listing()


def test_what_is_no_folder_or_no_file(tmp_path: Path) -> None:
    put(tmp_path / "one")
    with pytest.raises(NotFound, match="there is no such folder"):
        LocalFolder(tmp_path, tmp_path / "two").listing()
    with pytest.raises(NotFound, match="is no folder"):
        LocalFolder(tmp_path, tmp_path / "one" / "README.md").listing()
    os.mkfifo(tmp_path / "one" / "peft_serve.json")  # a pipe is passed over, and nobody waits for it
    assert "peft_serve.json" not in LocalFolder(tmp_path, tmp_path / "one").listing()


def test_a_file_that_grows_beyond_its_limit_is_not_read_on(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path, put(tmp_path / "one", {"adapter_config.json": b"x" * 300}))
    with pytest.raises(PayloadTooLarge):
        folder.read("adapter_config.json", 200, lambda _n: None)
