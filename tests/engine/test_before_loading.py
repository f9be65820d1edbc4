"""Before a base is loaded: settings that cannot be done here are refused, and what is loaded is told by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peft_serve.api.app import create_app
from peft_serve.config import Settings
from peft_serve.engine.assembly import build
from peft_serve.engine.before_loading import check_settings
from peft_serve.errors import Forbidden
from tests.api.test_api_tenants import client_of
from tests.parity.bases import save_tiny_base


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"gpu_kernels": "on"}, r"--gpu-kernels on: the base is on a CPU.*--device cuda; or leave the option out"),
        ({"cuda_graphs": "on"}, r"--cuda-graphs on: the base is on a CPU.*--device cuda; or leave the option out"),
        ({"adapters": [Path("nowhere")]}, r"--adapters nowhere: there is no such folder; check the path"),
    ],
)
def test_what_cannot_be_done_here_is_refused_before_a_weight_is_read(
    given: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    said: list[str] = []
    (tmp_path / "base").mkdir()  # reading this one would fail otherwise
    settings = Settings(model=str(tmp_path / "base"), device="cpu", store=tmp_path / "store", **given)
    with pytest.raises(ValueError, match=reason):
        build(settings, said.append)
    assert said == []
    assert not (tmp_path / "store").exists()


def test_graphs_without_the_kernels_that_they_record_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"--cuda-graphs on: .*leave --gpu-kernels off out"):
        check_settings(Settings(device="cuda", cuda_graphs="on", gpu_kernels="off"))


def test_a_device_that_is_not_here_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device cuda was asked for"):
        check_settings(Settings(device="cuda"))


@pytest.mark.parametrize("quantisation", [None, "int8"])
async def test_what_weights_are_stored_in_is_told_at_start_and_in_info(quantisation: Any, tmp_path: Path) -> None:
    save_tiny_base("llama", tmp_path / "base")
    said: list[str] = []
    store = tmp_path / "store"
    settings = Settings(
        model=str(tmp_path / "base"), device="cpu", store=store, quantisation=quantisation, cpu_kernels="off"
    )
    parts, engine = build(settings, said.append)
    try:
        (line,) = (each for each in said if each.startswith("base base: "))
        assert ("weights in int8" in line) == (quantisation == "int8")
        async with client_of(create_app(parts)) as client:
            answer = await client.get("/info")
        assert answer.json()["base"]["quantisation"] == quantisation
    finally:
        engine.stop()


def test_a_demo_adapter_is_not_said_to_be_in_a_folder_that_nobody_named(tmp_path: Path) -> None:
    said: list[str] = []
    settings = Settings(model="demo-llama", device="cpu", store=tmp_path, cpu_kernels="off", prepack="off")
    parts, engine = build(settings, said.append)
    try:
        with pytest.raises(Forbidden, match="ships with the demo base") as refused:
            parts.catalog.changes.delete("sst2")
        assert "--adapters" not in str(refused.value)
    finally:
        engine.stop()
