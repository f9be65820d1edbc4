from pathlib import Path

import pytest

from peft_serve.adapters.filesystem import DiskFileSystem
from peft_serve.adapters.folders import CheckpointFolders
from peft_serve.adapters.records import CONFIG_FILE, PROFILE_FILE
from peft_serve.errors import AdapterUnavailable
from tests.adapters.store.store_fakes import checkpoint, write_folder


def folders(*places: Path, max_bytes: int = 10_000, fs: DiskFileSystem | None = None) -> CheckpointFolders:
    return CheckpointFolders(places, fs or DiskFileSystem(), base_name="demo", max_bytes=max_bytes)


class NoReading(DiskFileSystem):
    def read(self, path: Path) -> bytes:
        raise AssertionError(f"{path.name} was read")


def test_sub_folders_with_a_config_are_adapters_and_nothing_is_read(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_folder(tmp_path / name, checkpoint(1))
    (tmp_path / "empty").mkdir()
    (tmp_path / "README.md").write_text("hello")
    found = folders(tmp_path, fs=NoReading())
    assert (found.names(), found.problems) == (("a", "b"), ())
    assert "a" in found
    assert "empty" not in found


def test_a_folder_that_is_a_checkpoint_is_one_adapter(tmp_path: Path) -> None:
    write_folder(tmp_path / "mine", checkpoint(1))
    write_folder(tmp_path / "mine" / "checkpoint-5", checkpoint(2))
    found = folders(tmp_path / "mine")
    assert found.names() == ("mine",)
    assert found.read("mine")[1] == checkpoint(1)


def test_what_cannot_be_served_is_named_and_passed_over(tmp_path: Path) -> None:
    for place in ("one/a", "two/a", "two/has space", "two/base", "two/Demo", "two/ok"):
        write_folder(tmp_path / place, checkpoint(1))
    (tmp_path / "three").mkdir()
    found = folders(tmp_path / "one", tmp_path / "two", tmp_path / "three", tmp_path / "none")
    assert found.names() == ("a", "ok")
    assert len(found.problems) == 6
    text = "\n".join(found.problems)
    for word in ("second folder named 'a'", "has space", "reserved", "'three' holds no", "'none' cannot be listed"):
        assert word in text
    assert str(tmp_path) not in text


def test_links_are_followed(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "cache", checkpoint(1))
    (tmp_path / "adapters" / "a").mkdir(parents=True)
    for file in place.iterdir():
        (tmp_path / "adapters" / "a" / file.name).symlink_to(file)
    (tmp_path / "adapters" / "b").symlink_to(place)
    found = folders(tmp_path / "adapters")
    assert found.names() == ("a", "b")
    assert found.read("a")[1] == found.read("b")[1] == checkpoint(1)


def test_the_stamp_follows_every_file(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "a", checkpoint(1))
    found = folders(tmp_path)
    stamps = [found.stamp("a")]
    (place / PROFILE_FILE).write_text("{}")
    stamps.append(found.stamp("a"))
    (place / CONFIG_FILE).write_text("{ }")
    stamps.append(found.stamp("a"))
    assert len(set(stamps)) == 3
    assert found.read("a")[1].profile == b"{}"


def test_a_folder_that_is_too_large_or_gone_is_unavailable(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "a", checkpoint(1))
    with pytest.raises(AdapterUnavailable, match="--max-adapter-bytes 10"):
        folders(tmp_path, max_bytes=10).read("a")
    found = folders(tmp_path)
    (place / CONFIG_FILE).unlink()
    with pytest.raises(AdapterUnavailable, match=r"adapter 'a': its folder holds no adapter_config\.json"):
        found.read("a")


def test_a_folder_that_is_written_while_it_is_read_is_asked_for_again(tmp_path: Path) -> None:
    class Racing(DiskFileSystem):
        def read(self, path: Path) -> bytes:
            content = super().read(path)
            path.write_bytes(content + b" ")
            return content

    write_folder(tmp_path / "a", checkpoint(1))
    with pytest.raises(AdapterUnavailable, match="being written") as refusal:
        folders(tmp_path, fs=Racing()).read("a")
    assert refusal.value.retry_after_s


def test_a_file_that_cannot_be_read_is_unavailable(tmp_path: Path) -> None:
    class Failing(DiskFileSystem):
        def read(self, path: Path) -> bytes:
            raise PermissionError(13, "Permission denied", str(path))

    write_folder(tmp_path / "a", checkpoint(1))
    with pytest.raises(AdapterUnavailable, match="cannot be read") as refusal:
        folders(tmp_path, fs=Failing()).read("a")
    assert str(tmp_path) not in refusal.value.message
