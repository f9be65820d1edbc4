"""`peft-serve doctor`: mistakes planted in an installation, each found with its rule and a way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft_serve.adapters.filesystem import DiskFileSystem
from peft_serve.adapters.store import AdapterStore
from peft_serve.commands.checkup.finding import Finding, State
from peft_serve.commands.checkup.installation import look_at_installation
from peft_serve.commands.checkup.machine import Machine
from peft_serve.config import GIB, Settings
from tests.commands.checkup_fakes import GoodMachine, bad, found
from tests.commands.conftest import run


def installation(tmp_path: Path, machine: Machine | None = None, **settings: Any) -> list[Finding]:
    return list(look_at_installation(machine or GoodMachine(), Settings(**settings), tmp_path / "store"))


def test_a_good_installation_has_nothing_wrong(tmp_path: Path) -> None:
    assert bad(installation(tmp_path)) == []


def test_an_old_python_and_old_or_missing_packages(tmp_path: Path) -> None:
    found(installation(tmp_path, GoodMachine(python=(3, 9))), "python", "3.9", "3.11", "newer Python")
    found(
        installation(tmp_path, GoodMachine(versions={"rich": None})),
        "rich",
        "not installed",
        "pip install 'rich>=13.9'",
    )
    old = GoodMachine(versions={"torch": "2.1.0"})
    found(installation(tmp_path, old), "torch", "2.1.0", ">=2.11", "pip install -U")


def test_a_missing_extra(tmp_path: Path) -> None:
    words = ("--quantisation", "bitsandbytes", "peft-serve[quantised]")
    found(installation(tmp_path, quantisation="bnb-nf4"), *words)
    words = ("--otlp-traces-endpoint", "opentelemetry-sdk", "peft-serve[otel]")
    found(installation(tmp_path, otlp_traces_endpoint="http://collector:4318/v1/traces"), *words)
    found(installation(tmp_path, allow_source=["hf://org/*", "s3://bucket"]), "--allow-source", "peft-serve[objects]")


def test_a_torch_that_is_not_for_this_machine(tmp_path: Path) -> None:
    found(installation(tmp_path, device="cuda"), "--device", "build for CPUs", "download.pytorch.org/whl/cu")
    no_device = GoodMachine(torch_cuda=("13.0", False))
    found(installation(tmp_path, no_device, device="cuda"), "finds no device", "nvidia-smi")
    driver = GoodMachine(has_nvidia=True)
    found(installation(tmp_path, driver), "NVIDIA driver", "build for CPUs", state=State.ODD)
    assert bad(installation(tmp_path, GoodMachine(torch_cuda=("13.0", True)), device="cuda")) == []


def test_more_threads_than_cores(tmp_path: Path) -> None:
    found(installation(tmp_path, num_threads=64), "--num-threads", "64 threads on 8 cores", state=State.ODD)


def test_too_little_memory_and_disk(tmp_path: Path) -> None:
    found(installation(tmp_path, GoodMachine(free_memory=GIB)), "memory", "4.0 GiB", "--kv-cache-bytes")
    found(installation(tmp_path, GoodMachine(free_disk=1 << 20)), "disk", "507", "make room")
    found(installation(tmp_path, GoodMachine(free_disk=GIB)), "disk", "--compiled-cache-bytes", state=State.ODD)


def test_a_store_that_cannot_be_used(tmp_path: Path) -> None:
    found(installation(tmp_path, GoodMachine(can_write=False)), "--store", "cannot be written")
    store = tmp_path / "store"
    (store / "quarantine" / "ab").mkdir(parents=True)
    found(installation(tmp_path), "1 adapters were set aside", "upload them again", state=State.ODD)
    (store / "quarantine" / "ab").rmdir()
    running = AdapterStore(store, DiskFileSystem())
    found(installation(tmp_path), "in use by a server that runs", "--store of its own")
    running.close()
    assert bad(installation(tmp_path)) == [], "and a store at rest is left as it is"
    blocked = tmp_path / "file"
    blocked.write_text("")
    found(look_at_installation(GoodMachine(), Settings(port=0), blocked), "is a file")


def test_folders_of_adapters_and_ports(tmp_path: Path) -> None:
    found(installation(tmp_path, adapters=[tmp_path / "typo"]), "--adapters", "no such folder")
    (tmp_path / "empty").mkdir()
    found(installation(tmp_path, adapters=[tmp_path / "empty"]), "holds no checkpoint", "adapter_config.json")
    (tmp_path / "full" / "one").mkdir(parents=True)
    (tmp_path / "full" / "one" / "adapter_config.json").write_text("{}")
    assert bad(installation(tmp_path, adapters=[tmp_path / "full"])) == []
    taken = GoodMachine(can_listen="Address already in use")
    found(installation(tmp_path, taken), "--port", "Address already in use", "another --port")


def test_this_machine_tells_its_facts(tmp_path: Path) -> None:
    machine = Machine()
    assert machine.num_cores() >= 1
    assert machine.version("rich")
    assert machine.version("no-such-package-here") is None
    assert any(text.startswith("torch") for text in machine.requirements())
    assert (machine.free_disk(tmp_path / "not" / "yet") or 0) > 0
    assert machine.can_write(tmp_path / "not" / "yet")
    assert machine.can_listen("127.0.0.1", 0) == ""
    assert machine.is_locked(tmp_path / "no-lock") is False


def test_a_wrong_setting_is_found_before_anything_else(tmp_path: Path) -> None:
    said = run("doctor", "--port", "0", env={"PEFT_SERVE_MAX_RNK": "8"})
    assert said.code == 1
    assert "PEFT_SERVE_MAX_RNK: is no setting" in said.all
    assert "→ did you mean PEFT_SERVE_MAX_RANK?" in said.all


def test_what_is_not_fine_has_a_way_out() -> None:
    with pytest.raises(AssertionError, match="needs a way out"):
        Finding(place="x", state=State.WRONG, fact="bad")
