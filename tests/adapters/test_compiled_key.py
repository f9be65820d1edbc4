"""What a compiled adapter depends on: a change of any of it is a change of the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peft_serve.adapters.compiled_key import code_digest, compiled_for
from peft_serve.adapters.filesystem import DiskFileSystem
from peft_serve.adapters.limits import GateLimits
from tests.adapters.checkpoints import make_base
from tests.adapters.fake_base import FakeBase

GIVEN: dict[str, Any] = {"fingerprint": "sha256:1", "code": "abc", "settings": ("1.0", "cpu")}


def test_equal_facts_give_equal_keys_in_any_order_of_sets() -> None:
    keys = {compiled_for(FakeBase(make_base("llama_tied")), GateLimits(), **GIVEN) for _ in range(3)}
    assert len(keys) == 1


def test_every_fact_counts() -> None:
    base = FakeBase(make_base("llama"))
    changes = ({}, {"fingerprint": "sha256:2"}, {"code": "abd"}, {"settings": ("1.0", "cuda")}, {"settings": ("1.0",)})
    others = (
        FakeBase(make_base("llama"), dtype=torch.bfloat16),
        FakeBase(make_base("llama"), name="another"),
        FakeBase(make_base("llama_tied")),
        FakeBase(make_base("qwen2")),
    )
    keys = [compiled_for(base, GateLimits(), **{**GIVEN, **change}) for change in changes]
    keys += [compiled_for(base, GateLimits(max_rank=8), **GIVEN)]
    keys += [compiled_for(other, GateLimits(), **GIVEN) for other in others]
    assert len(set(keys)) == len(keys)


def test_the_code_is_every_source_in_the_folder_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "methods" / "b.py").write_text("2")
    first = code_digest(DiskFileSystem(), tmp_path)
    (tmp_path / "notes.txt").write_text("3")
    assert code_digest(DiskFileSystem(), tmp_path) == first
    (tmp_path / "methods" / "b.py").write_text("3")
    second = code_digest(DiskFileSystem(), tmp_path)
    (tmp_path / "methods" / "b.py").rename(tmp_path / "methods" / "c.py")
    assert len({first, second, code_digest(DiskFileSystem(), tmp_path)}) == 3
