"""The catalog against a small model of it: any order of acts, restarts among them."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from peft_serve.adapters.changes import etag
from peft_serve.adapters.store import AdapterStore
from peft_serve.core import AdapterId
from peft_serve.errors import PreconditionFailed, UnknownAdapter
from tests.adapters.store.store_fakes import UnsyncedFileSystem, checkpoint, make_catalog

NAMES = st.sampled_from(["a", "A", "b.c", "x" * 64])
SEEDS = st.integers(0, 4)
IDS = [checkpoint(seed).digest() for seed in range(5)]


class CatalogMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name)
        self.versions: dict[str, dict[int, AdapterId]] = {}  # of names that are not deleted
        self.current: dict[str, int] = {}
        self.counter: dict[str, int] = {}
        self.held: list[AdapterId] = []
        self.open()

    def open(self) -> None:
        self.store = AdapterStore(self.root, UnsyncedFileSystem())
        self.catalog = make_catalog(self.root, store=self.store)

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    def current_id(self, name: str) -> AdapterId | None:
        return self.versions[name][self.current[name]] if name in self.current else None

    @rule(name=NAMES, seed=SEEDS, create_only=st.booleans(), match=st.none() | SEEDS)
    def publish(self, name: str, seed: int, create_only: bool, match: int | None) -> None:
        if_match = None if match is None else etag(IDS[match])
        before = self.current_id(name)
        if (create_only and before) or (match is not None and before != IDS[match]):
            with pytest.raises(PreconditionFailed):
                self.catalog.changes.publish(name, checkpoint(seed), if_match=if_match, create_only=create_only)
            return
        outcome = self.catalog.changes.publish(name, checkpoint(seed), if_match=if_match, create_only=create_only)
        assert outcome.created == (before != IDS[seed])
        if outcome.created:
            self.counter[name] = number = self.counter.get(name, 0) + 1
            self.versions.setdefault(name, {})[number] = IDS[seed]
            self.current[name] = number
        assert outcome.version.number == self.current[name]
        assert (outcome.previous.id if outcome.previous else None) == before

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        if name not in self.current:
            with pytest.raises(UnknownAdapter):
                self.catalog.changes.delete(name)
            return
        ids = set(self.versions.pop(name).values())
        del self.current[name]
        assert self.catalog.changes.delete(name) == sum(adapter in ids for adapter in self.held)

    @rule(name=NAMES, number=st.integers(1, 6))
    def rollback(self, name: str, number: int) -> None:
        if number not in self.versions.get(name, {}):
            with pytest.raises(UnknownAdapter):
                self.catalog.changes.rollback(name, number)
            return
        assert self.catalog.changes.rollback(name, number).id == self.versions[name][number]
        self.current[name] = number

    @rule(name=NAMES)
    def hold(self, name: str) -> None:
        if name in self.current:
            self.held.append(self.catalog.resolve(name, hold=True).id)

    @rule(index=st.integers(0, 100))
    def release(self, index: int) -> None:
        if self.held:
            self.catalog.release(self.held.pop(index % len(self.held)))

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.held.clear()
        self.open()
        self.catalog.changes.collect()

    @invariant()
    def names_stand_for_what_the_model_says(self) -> None:
        for name in ("a", "A", "b.c", "x" * 64):
            if name not in self.current:
                with pytest.raises(UnknownAdapter):
                    self.catalog.resolve(name)
                continue
            found = self.catalog.resolve(name)
            assert (found.number, found.id) == (self.current[name], self.current_id(name))
            for number, adapter in self.versions[name].items():
                assert self.catalog.resolve(f"{name}@{number}").id == adapter
        assert {entry.name for entry in self.catalog.list()} == self.current.keys()

    @invariant()
    def the_disk_holds_what_is_named_or_held_and_nothing_else(self) -> None:
        named = {adapter for versions in self.versions.values() for adapter in versions.values()}
        assert set(self.store.blob_ids()) == named | set(self.held)
        for adapter in self.held:
            assert self.catalog.files(adapter).digest() == adapter
        assert list((self.root / "tmp").iterdir()) == []
        self.catalog.check()


CatalogMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestCatalogMachine = CatalogMachine.TestCase
