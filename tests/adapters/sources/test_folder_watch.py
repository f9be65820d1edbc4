"""Watched folders, with a clock of the test's own."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from peft_serve.adapters.members import UploadLimits
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.sources.watch import RETRY_S, FolderWatch, WatchProblem
from peft_serve.core import AdapterId
from peft_serve.errors import AdapterInvalid, Refusal, ServeError, StoreFull
from tests.adapters.sources.source_fakes import FILES, put

SETTLE_S = 5.0
_TICK_S = 0.02  # beyond the grain of a disk's times


@dataclass
class FakeShelf:
    names: dict[str, list[tuple[AdapterId, str]]] = field(default_factory=dict)
    acts: list[str] = field(default_factory=list)
    error: ServeError | None = None

    def ids(self, name: str) -> frozenset[AdapterId]:
        return frozenset(id_ for id_, _ in self.names.get(name, []))

    def came_from(self, prefix: str) -> Iterable[str]:
        return [name for name, versions in self.names.items() if versions[-1][1] == f"{prefix}{name}"]

    def publish_watched(self, name: str, files: CheckpointFiles, source: str) -> None:
        self.acts.append(f"read {name}")
        if self.error is not None:
            raise self.error
        self.names.setdefault(name, []).append((files.digest(), source))

    def remove_watched(self, name: str, source: str) -> bool:
        self.acts.append(f"remove {name}")
        return self.names.pop(name, None) is not None


@dataclass
class Scene:
    """A watched folder, a shelf, and the time."""

    root: Path
    shelf: FakeShelf = field(default_factory=FakeShelf)
    now: float = 1e9
    watch: FolderWatch = field(init=False)

    def __post_init__(self) -> None:
        self.root.mkdir(exist_ok=True)
        self.restart()

    def restart(self, roots: Sequence[Path] = (), **options: Any) -> None:
        self.watch = FolderWatch(
            roots or [self.root],
            self.shelf,
            limits=UploadLimits(),
            now=lambda: self.now,
            settle_s=SETTLE_S,
            interval_s=1.0,
            **options,
        )

    def write(self, name: str, files: dict[str, bytes] = FILES) -> Path:
        """Write a folder's files now, as a program does that saves them one by one."""
        time.sleep(_TICK_S)
        return put(self.root / name, files)

    def poll(self, *, after_s: float = 1.0) -> list[str]:
        """What one look does, some time later."""
        self.now += after_s
        self.shelf.acts.clear()
        self.watch.poll()
        return self.shelf.acts


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "incoming")


def test_a_folder_is_read_when_it_was_still_for_the_settle_time(scene: Scene) -> None:
    place = scene.write("one")
    assert scene.poll() == []
    assert scene.poll(after_s=3.0) == []
    time.sleep(_TICK_S)
    (place / "adapter_model.safetensors").write_bytes(b"\x10more")
    assert scene.poll(after_s=3.0) == [], "it changed: the time begins again"
    assert scene.poll(after_s=3.0) == []
    assert scene.poll(after_s=2.0) == ["read one"]
    assert scene.poll() == []
    assert scene.shelf.names["one"][0][1] == "watch:incoming/one"


def test_a_folder_moved_in_whole_is_read_at_once(scene: Scene) -> None:
    scene.write(".one.tmp")
    scene.write("two.partial")
    assert scene.poll(after_s=60.0) == [], "hidden and partial folders are passed over"
    time.sleep(_TICK_S)
    (scene.root / ".one.tmp").rename(scene.root / "one")
    assert scene.poll() == ["read one"]
    scene.write("one", {"adapter_model.safetensors": b"\x10half"})
    assert scene.poll() == [], "a file was written after the move"
    assert scene.poll(after_s=SETTLE_S) == ["read one"]


def test_what_changes_is_a_new_version_and_what_returns_too(scene: Scene) -> None:
    scene.write("one")
    scene.poll()
    scene.poll(after_s=SETTLE_S)
    scene.write("one", {**FILES, "adapter_model.safetensors": b"\x10second"})
    scene.poll()
    assert scene.poll(after_s=SETTLE_S) == ["read one"]
    scene.write("one")
    scene.poll()
    assert scene.poll(after_s=SETTLE_S) == ["read one"], "the first files again are what is wanted now"
    assert len(scene.shelf.names["one"]) == 3


def test_a_restart_publishes_nothing_that_the_name_has_had(scene: Scene) -> None:
    scene.write("one")
    scene.poll()
    assert scene.poll(after_s=SETTLE_S) == ["read one"]
    scene.shelf.names["one"].append((AdapterId("sha256:another"), ""))
    scene.restart()
    scene.poll()
    assert scene.poll(after_s=SETTLE_S) == []
    scene.write("one", {**FILES, "adapter_model.safetensors": b"\x10second"})
    scene.poll()
    assert scene.poll(after_s=SETTLE_S) == ["read one"]


def test_what_lay_there_long_before_the_start_is_read_at_once(scene: Scene) -> None:
    scene.write("one")
    scene.now = (scene.root / "one").stat().st_mtime + SETTLE_S
    assert scene.poll(after_s=0.1) == ["read one"]


def test_a_broken_folder_is_told_once_and_again_when_it_changes(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "peft_serve")
    scene.shelf.error = AdapterInvalid([Refusal("lora_A", "has rank 900")])
    scene.write("bad")
    scene.poll()
    assert scene.poll(after_s=SETTLE_S) == ["read bad"]
    assert scene.watch.problems == (WatchProblem(source="watch:incoming/bad", problem="lora_A: has rank 900"),)
    assert scene.poll(after_s=3600.0) == []
    assert len(caplog.records) == 1
    scene.shelf.error = None
    scene.write("bad", {**FILES, "adapter_model.safetensors": b"\x10good"})
    scene.poll()
    assert scene.poll(after_s=SETTLE_S) == ["read bad"]
    assert scene.watch.problems == ()


def test_a_folder_without_weights_and_one_that_leads_out(scene: Scene, tmp_path: Path) -> None:
    scene.write("empty", {"adapter_config.json": b"{}"})
    (scene.root / "away").symlink_to(put(tmp_path / "outside"))
    scene.poll()
    assert scene.poll(after_s=1e9) == []
    found = {each.source: each.problem for each in scene.watch.problems}
    assert "adapter_model.safetensors" in found["watch:incoming/empty"]
    assert "leads out" in found["watch:incoming/away"]
    shutil.rmtree(scene.root / "empty")
    scene.poll()
    assert [each.source for each in scene.watch.problems] == ["watch:incoming/away"]


def test_what_fails_for_another_reason_is_tried_again_later(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "peft_serve")
    scene.shelf.error = StoreFull("the disk is full")
    scene.write("one")
    scene.poll()
    assert scene.poll(after_s=SETTLE_S) == ["read one"]
    assert scene.poll() == []
    assert scene.poll(after_s=RETRY_S) == ["read one"]
    assert len(caplog.records) == 1
    scene.shelf.error = None
    assert scene.poll(after_s=RETRY_S) == ["read one"]
    assert scene.watch.problems == ()


@pytest.mark.parametrize("removes", [False, True])
def test_a_folder_that_goes_keeps_its_name_or_takes_it_along(scene: Scene, *, removes: bool) -> None:
    scene.restart(removes=removes)
    scene.write("one")
    scene.poll()
    scene.poll(after_s=SETTLE_S)
    shutil.rmtree(scene.root / "one")
    assert scene.poll() == []
    assert scene.poll(after_s=SETTLE_S) == (["remove one"] if removes else [])
    assert scene.poll(after_s=SETTLE_S) == []
    scene.write("one")
    scene.poll()
    scene.poll(after_s=SETTLE_S)
    assert "one" in scene.shelf.names


def test_a_folder_that_is_exchanged_is_not_gone(scene: Scene) -> None:
    scene.restart(removes=True)
    scene.write("one")
    scene.poll()
    scene.poll(after_s=SETTLE_S)
    shutil.rmtree(scene.root / "one")
    assert scene.poll() == []
    scene.write("one", {**FILES, "adapter_model.safetensors": b"\x10second"})
    assert scene.poll(after_s=SETTLE_S) == []
    assert scene.poll(after_s=SETTLE_S) == ["read one"]


def test_what_went_while_the_server_was_down_goes_too(scene: Scene) -> None:
    scene.shelf.names["gone"] = [(AdapterId("sha256:a"), "watch:incoming/gone")]
    scene.shelf.names["uploaded"] = [(AdapterId("sha256:b"), "")]
    scene.restart(removes=True)
    assert scene.poll() == []
    assert scene.poll(after_s=SETTLE_S) == ["remove gone"]
    assert list(scene.shelf.names) == ["uploaded"]


def test_a_folder_moved_from_one_watched_folder_to_another_keeps_its_name(scene: Scene, tmp_path: Path) -> None:
    """Also where both folders have one name, so that the record does not tell them apart."""
    other = tmp_path / "other" / "incoming"
    other.mkdir(parents=True)
    scene.write("one")
    scene.restart(roots=[scene.root, other], removes=True)
    scene.poll()
    assert scene.poll(after_s=SETTLE_S) == ["read one"]
    (scene.root / "one").rename(other / "one")
    assert scene.poll() == []
    assert scene.poll(after_s=SETTLE_S) == []
    assert "one" in scene.shelf.names


def test_a_root_that_cannot_be_listed_takes_nothing_away(scene: Scene) -> None:
    scene.restart(removes=True)
    scene.write("one")
    scene.poll()
    scene.poll(after_s=SETTLE_S)
    scene.root.rename(scene.root.parent / "elsewhere")
    assert scene.poll(after_s=60.0) == []
    assert scene.poll(after_s=60.0) == []
    assert [(each.source, each.problem[:16]) for each in scene.watch.problems] == [
        ("watch:incoming", "cannot be listed")
    ]
    (scene.root.parent / "elsewhere").rename(scene.root)
    assert scene.poll() == []
    assert scene.watch.problems == ()
