"""How many replicas and fronts there may be, and what settings are like in another process."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_serve.cluster.plan import Layout, absolute
from peft_serve.config import Settings


def test_several_fronts_need_a_store_that_they_share() -> None:
    Layout(fronts=1).require_possible(Settings(model="demo-llama"))
    for shared in (Settings(model="demo-llama", store_shared=True), Settings(model="demo-llama", store="s3://b/p")):
        Layout(fronts=2).require_possible(shared)
    with pytest.raises(ValueError, match=r"--fronts 2: .*--store-shared"):
        Layout(fronts=2).require_possible(Settings(model="demo-llama", store="here"))


def test_replicas_are_so_many_or_scaled() -> None:
    assert Layout(min_replicas=1, max_replicas=2).most_replicas == 2
    with pytest.raises(ValueError, match=r"--replicas: .* leave it out"):
        Layout(replicas=2, min_replicas=1, max_replicas=2)


def test_another_process_finds_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute(Settings(model="demo-llama", store="here")).store == str(tmp_path / "here")
    for kept in ("/somewhere", "s3://bucket/prefix", None):
        assert absolute(Settings(model="demo-llama", store=kept)).store == kept
