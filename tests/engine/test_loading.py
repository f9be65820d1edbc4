"""Loading by way of the compiled store: the same adapters, and no checkpoint read, checked or compiled twice."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from peft_serve.adapters.bounded_folder import BoundedFolder
from peft_serve.adapters.catalog import Catalog
from peft_serve.adapters.combined import Part, combined_id
from peft_serve.adapters.compiled_store import CompiledStore
from peft_serve.adapters.findings import Inspection, Proof
from peft_serve.adapters.folders import CheckpointFolders
from peft_serve.adapters.gate import Inspected
from peft_serve.adapters.layout import ALIGNMENT
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.ownership import Publisher
from peft_serve.adapters.primitives import Adapter
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.store import AdapterStore
from peft_serve.config import Settings
from peft_serve.core import AdapterId
from peft_serve.engine.loading import Loading, num_load_threads
from peft_serve.errors import AdapterInvalid, InvalidParameter, Refusal, ServeError, Unavailable
from tests.adapters.checkpoints import make_base, make_checkpoint
from tests.adapters.fake_base import FakeBase
from tests.adapters.same_bits import assert_same_bits
from tests.adapters.store.store_fakes import NOON, UnsyncedFileSystem
from tests.parity.bases import save_tiny_base, words
from tests.parity.served import ServedModel
from tests.parity.test_parity_http import as_zip

LIMITS = GateLimits()


class CountingBase(FakeBase):
    """Counts the weights that are looked at."""

    num_weights = 0

    def weight(self, path: str) -> Tensor:
        self.num_weights += 1
        return super().weight(path)


class Process:
    """Loading as one process has it, over a store that others may have written."""

    def __init__(self, root: Path | None, files: dict[AdapterId, CheckpointFiles], *, max_bytes: int = 1 << 30) -> None:
        self.base = CountingBase(make_base("llama"))
        self.read: list[AdapterId] = []
        self.refusal: Exception | None = None
        self.num_begun = 0
        self._files = files
        folder = None
        if root is not None:
            names = map(str, range(1000))
            folder = BoundedFolder(
                root, UnsyncedFileSystem(), max_bytes=max_bytes, new_name=lambda: next(names), now_s=lambda: 0.0
            )
        self.compiled = CompiledStore(folder, compiled_for="this base", min_shared_bytes=0)
        self.loading = Loading(self.base, LIMITS, self.compiled, speech=self._speech, stand_aside=self._begin)

    def _speech(self, inspected: Inspected) -> Inspected:
        if self.refusal is not None:
            raise self.refusal
        return inspected

    def _begin(self) -> None:
        self.num_begun += 1

    def _files_of(self, adapter: AdapterId) -> CheckpointFiles:
        self.read.append(adapter)
        return self._files[adapter]

    def load(self, adapter: AdapterId) -> Adapter:
        loaded = self.loading.load(adapter, self._files_of)
        assert self.compiled.settle(10)
        assert loaded.id == adapter
        return loaded


METHODS = ("lora", "lora_dora", "vera", "ia3", "multitask_prompt_tuning", "prompt_tuning")


@pytest.fixture(scope="module")
def files() -> dict[str, CheckpointFiles]:
    return {method: make_checkpoint(method, "llama")[0] for method in METHODS}


@pytest.fixture
def by_id(files: dict[str, CheckpointFiles]) -> dict[AdapterId, CheckpointFiles]:
    return {each.digest(): each for each in files.values()}


def ids_of(files: dict[str, CheckpointFiles]) -> Iterator[AdapterId]:
    lora, vera, ia3, tasks, prompt = (
        files[name].digest() for name in ("lora", "vera", "ia3", "multitask_prompt_tuning", "prompt_tuning")
    )
    yield from (lora, vera, files["lora_dora"].digest())
    for parts in (
        [Part(id=tasks, task=1)],
        [Part(id=lora, weight=-0.5)],
        [Part(id=lora), Part(id=vera, weight=2.0), Part(id=ia3)],
        [Part(id=prompt), Part(id=tasks, task=0), Part(id=lora)],
    ):
        yield combined_id(parts)


def test_the_next_process_reads_what_the_first_one_compiled(
    files: dict[str, CheckpointFiles], by_id: dict[AdapterId, CheckpointFiles], tmp_path: Path
) -> None:
    without, first = Process(None, by_id), Process(tmp_path, by_id)
    for id in ids_of(files):
        expected = without.load(id)
        assert_same_bits(first.load(id), expected)
        second = Process(tmp_path, {})
        assert_same_bits(second.load(id), expected)
        assert second.read == []
        assert second.base.num_weights == 0
        assert second.num_begun == 1
    assert len(first.read) < len(without.read), "parts of combinations were found too"


def test_a_combination_of_what_is_there_reads_no_checkpoint_and_keeps_no_file_in_memory(
    files: dict[str, CheckpointFiles], by_id: dict[AdapterId, CheckpointFiles], tmp_path: Path
) -> None:
    Process(tmp_path, by_id).load(files["lora"].digest())
    Process(tmp_path, by_id).load(files["vera"].digest())
    both = combined_id([Part(id=files["lora"].digest()), Part(id=files["vera"].digest())])
    made = Process(tmp_path, {}).load(both)
    assert_same_bits(made, Process(None, by_id).load(both))
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in made.tensors()}
    own = list(made.tensors())
    assert sum(held.values()) < sum(tensor.nbytes for tensor in own) + ALIGNMENT * len(own)


def test_what_does_not_go_together_is_refused_each_time(
    files: dict[str, CheckpointFiles], by_id: dict[AdapterId, CheckpointFiles], tmp_path: Path
) -> None:
    weighted_prompt = combined_id([Part(id=files["prompt_tuning"].digest(), weight=0.5)])
    for _ in range(2):
        with pytest.raises(InvalidParameter):
            Process(tmp_path, by_id).load(weighted_prompt)


def test_a_check_keeps_what_it_compiled_and_the_next_one_compiles_nothing(
    files: dict[str, CheckpointFiles], tmp_path: Path
) -> None:
    first, second = Process(tmp_path, {}), Process(tmp_path, {})
    found = first.loading.check(files["lora_dora"])
    assert first.compiled.settle(10)
    assert first.base.num_weights > 0
    again = second.loading.check(files["lora_dora"])
    assert second.base.num_weights == 0
    assert (found.id, found.summary) == (again.id, again.summary)
    second.load(found.id)
    assert second.read == []


@pytest.mark.parametrize("why", ["not asked to", "refused by what comes after", "several tasks"])
def test_a_check_keeps_nothing_that_is_not_served(why: str, files: dict[str, CheckpointFiles], tmp_path: Path) -> None:
    process = Process(tmp_path, {})
    method = "multitask_prompt_tuning" if why == "several tasks" else "lora"
    if why == "refused by what comes after":
        process.refusal = AdapterInvalid([Refusal("tokenizer", "is another")])
        with pytest.raises(AdapterInvalid, match="is another"):
            process.loading.check(files[method])
    else:
        process.loading.check(files[method], keeps=why != "not asked to")
    assert process.compiled.settle(10)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_check_of_what_is_there_is_still_a_check(files: dict[str, CheckpointFiles], tmp_path: Path) -> None:
    process = Process(tmp_path, {})
    process.loading.check(files["lora"])
    process.refusal = AdapterInvalid([Refusal("tokenizer", "is another")])
    with pytest.raises(AdapterInvalid, match="is another"):
        process.loading.check(files["lora"])
    with pytest.raises(AdapterInvalid):
        process.loading.check(replace(files["lora"], config=b'{"peft_type": "NONE"}'))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_check_that_finds_no_memory_may_come_again(files: dict[str, CheckpointFiles], error: Exception) -> None:
    process = Process(None, {})
    process.refusal = error
    with pytest.raises(Unavailable, match="memory ran out") as refused:
        process.loading.check(files["lora"])
    assert refused.value.retry_after_s
    assert refused.value.__context__ is None, "its frames would keep what was computed"


def test_threads_that_load_are_as_many_as_asked_for() -> None:
    assert num_load_threads(Settings(load_threads=5)) == 5
    assert num_load_threads(Settings()) in (1, 2)


# ---- uploads


class BoundedDisk(UnsyncedFileSystem):
    """A disk for checkpoints, apart from that for what is made of them."""

    free = 1 << 40

    def free_bytes(self, path: Path) -> int:
        return self.free


class Uploads:
    """Two adapters that are there, with room for what two are compiled to, and a third one to upload."""

    def __init__(self, root: Path) -> None:
        self.root = root / "compiled"
        self.disk = BoundedDisk()
        self.files = [make_checkpoint("lora", "llama", seed)[0] for seed in range(3)]
        measured = Process(root / "measured", {})
        measured.loading.check(self.files[0])
        assert measured.compiled.settle(10)
        num_bytes = sum(path.stat().st_size for path in (root / "measured").rglob("*") if path.is_file())
        self.process = Process(self.root, {}, max_bytes=2 * num_bytes + num_bytes // 2)
        self.changes = Catalog(
            AdapterStore(root / "store", self.disk),
            CheckpointFolders([], self.disk, base_name="base"),
            self.process.loading.check,
            checked_for="this base",
            base_name="base",
            now=lambda: NOON,
            drafts=self.process.loading,
        ).changes
        for name, files in zip("ab", self.files, strict=False):
            self.changes.publish(name, files)
        assert len(self.compiled()) == 2

    def compiled(self) -> set[str]:
        assert self.process.compiled.settle(10)
        return {path.name for path in self.root.rglob("*") if path.is_file()}

    def prove(self, found: Inspection) -> Proof:
        assert self.process.load(found.id).id == found.id
        assert self.process.read == [], "what the gate compiled is what is tried"
        return Proof(is_tried=True)

    def refuse(self, found: Inspection) -> Proof:
        self.prove(found)
        raise AdapterInvalid([Refusal("weights", "do not run")])


@pytest.mark.parametrize("why", ["the disk is full", "the trial", "its owner has no room", "it moved", "a dry run"])
def test_an_upload_that_is_refused_takes_nobodys_place(why: str, tmp_path: Path) -> None:
    uploads = Uploads(tmp_path)
    before, owner = uploads.compiled(), Publisher(tenant="t", is_operator=False, max_bytes=10)
    if why == "the disk is full":
        uploads.disk.free = 1000
    options: dict[str, dict[str, Any]] = {
        "the trial": {"prove": uploads.refuse},
        "its owner has no room": {"publisher": owner},
        "it moved": {"if_match": '"sha256-00"'},
        "a dry run": {"dry_run": True},
    }
    with nullcontext() if why == "a dry run" else pytest.raises(ServeError):
        uploads.changes.publish("c", uploads.files[2], **options.get(why, {}))
    assert uploads.compiled() == before
    uploads.disk.free = 1 << 40
    uploads.changes.publish("c", uploads.files[2], prove=uploads.prove)
    assert uploads.compiled() - before, "the upload that took place is there"
    assert before - uploads.compiled(), "and what was not used for longest went for it"


def test_what_the_gate_refuses_is_no_upload_any_more(files: dict[str, CheckpointFiles], tmp_path: Path) -> None:
    process = Process(tmp_path, {})
    process.refusal = AdapterInvalid([Refusal("tokenizer", "is another")])
    with pytest.raises(AdapterInvalid):
        process.loading.draft(files["lora"])
    process.refusal = None
    process.loading.check(files["lora"])
    assert process.compiled.settle(10)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1, "it is written at once"


# ---- a whole server


def _outcomes(served: ServedModel) -> dict[str, float]:
    lines = served.client.get("/metrics").text.splitlines()
    name = 'peft_serve_compiled_cache_total{outcome="'
    counts = {line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)}
    return {outcome: count for outcome, count in counts.items() if count}


def _answer(served: ServedModel, adapter: str) -> Any:
    body = {"inputs": words([9, 30, 12]), "parameters": {"max_new_tokens": 8, "details": True}}
    answer = served.client.post("/generate", params={"adapter": adapter}, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["details"]["tokens"]


def test_a_server_compiles_an_upload_once_and_deletes_what_it_made_of_it(tmp_path: Path) -> None:
    save_tiny_base("llama", tmp_path / "base")
    checkpoints = {name: make_checkpoint(name, "llama")[0] for name in ("lora_dora", "vera")}
    with ServedModel(tmp_path / "base", tmp_path / "store") as served:
        for name, files in checkpoints.items():
            answer = served.client.put(
                f"/adapters/{name}", content=as_zip(files), headers={"content-type": "application/zip"}
            )
            assert answer.status_code == 201, answer.text
        names = [*checkpoints, "lora_dora+vera"]
        expected = {name: _answer(served, name) for name in names}
        assert _outcomes(served).get("miss") == 1, "the combination alone was not there"
    shutil.copytree(tmp_path / "store", tmp_path / "moved")
    with ServedModel(tmp_path / "base", tmp_path / "moved", load_threads=3) as served:
        assert {name: _answer(served, name) for name in names} == expected
        assert _outcomes(served) == {"hit": 3.0}
        assert served.client.delete("/adapters/vera").status_code in (202, 204)
        deadline = time.monotonic() + 20
        compiled = tmp_path / "moved" / "compiled"
        mark = checkpoints["vera"].digest().removeprefix("sha256:")[:16]
        while any(mark in path.name for path in compiled.rglob("*")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert _answer(served, "lora_dora") == expected["lora_dora"]
    with ServedModel(tmp_path / "base", tmp_path / "third", compiled_cache_bytes=0) as served:
        assert not (tmp_path / "third" / "compiled").exists()
        assert _outcomes(served) == {}


def test_another_bound_of_the_gate_is_another_key(tmp_path: Path) -> None:
    save_tiny_base("llama", tmp_path / "base")
    files = make_checkpoint("lora", "llama")[0]
    with ServedModel(tmp_path / "base", tmp_path / "store") as served:
        headers = {"content-type": "application/zip"}
        assert served.client.put("/adapters/a", content=as_zip(files), headers=headers).status_code == 201
        _answer(served, "a")
    shutil.copytree(tmp_path / "store", tmp_path / "moved")
    with ServedModel(tmp_path / "base", tmp_path / "moved", max_rank=2) as served:
        answer = served.client.post("/generate", params={"adapter": "a"}, json={"inputs": words([9])})
        assert answer.status_code >= 400
        assert "max-rank 2" in answer.text
