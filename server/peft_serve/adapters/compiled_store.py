"""The compiled store: adapters as they were compiled, on a disk, so that none is compiled twice for one base.

    <parts>.<key>    an adapter; `parts` begins the digest of each checkpoint that it was made of
    shared.<key>     factors that the maps of many adapters share (VeRA, RandLoRA), once for all of them

A cache: every file can be made again, is checked whole when it is read, and is deleted when anything about it is odd.
What the disk refuses is told once and done without: nothing here raises. Writing is done on a thread of its own.
What is made of a checkpoint that is being uploaded is a draft: it is found here, and nothing is written, and no other
file deleted for it, before the upload took place.
Files are read into memory and not mapped: a disk that fails then raises an error where a mapping would end the
process, and what is in memory stays there, so that no step waits for a disk. How an adapter is made, and how the
folder is kept within its budget, is not known here.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from functools import partial
from typing import Final
from weakref import WeakValueDictionary

from torch import Tensor

from peft_serve.adapters.bounded_folder import BoundedFolder
from peft_serve.adapters.combined import parts_of
from peft_serve.adapters.compiled_files import CompiledFiles, NotReadable, Place
from peft_serve.adapters.errands import Errands
from peft_serve.adapters.primitives import Adapter, Affine
from peft_serve.adapters.shared_primitives import SharedMap
from peft_serve.core import AdapterId

MIN_SHARED_BYTES: Final = 64 << 10
"""Shared factors that take less are written with each adapter: a file of their own costs more than it saves."""

MAX_WAITING_BYTES: Final = 256 << 20
"""Adapters that wait to be written take so much at most, or there is one alone: memory that no other budget counts."""

_SHARED: Final = "shared"
_LOG: Final = logging.getLogger(__name__)


class CompiledEvent(StrEnum):
    """What can be counted here."""

    HIT = "hit"
    MISS = "miss"
    WRITTEN = "written"
    PASSED_OVER = "passed_over"  # not written, as too much waits to be
    EVICTED = "evicted"
    DAMAGED = "damaged"
    FAILED = "failed"  # the disk refused


class CompiledStore:
    """Owner of a folder of compiled adapters. Safe from any thread; nothing raises; `get` and `settle` take time.

    `compiled_for` digests what an adapter's compile depends on beside its id. No folder: nothing is kept.
    """

    def __init__(
        self,
        folder: BoundedFolder | None,
        *,
        compiled_for: str,
        on_event: Callable[[CompiledEvent], None] = lambda _event: None,
        on_thread_start: Callable[[], None] = lambda: None,
        min_shared_bytes: int = MIN_SHARED_BYTES,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
    ) -> None:
        self._folder = folder
        self._compiled_for = compiled_for
        self._on_event = on_event
        self._min_shared_bytes = min_shared_bytes
        self._max_waiting_bytes = max_waiting_bytes
        self._errands = Errands(name="compiled-store", on_thread_start=on_thread_start)
        self._files = CompiledFiles(Adapter)
        self._lock = threading.Lock()
        self._waiting: dict[AdapterId, Adapter] = {}  # to be written
        self._drafts: dict[AdapterId, Adapter] = {}  # to be written if their uploads take place
        self._waiting_bytes = 0  # of both
        self._uploads: Counter[AdapterId] = Counter()  # that have not been settled, by checkpoint
        self._shared: WeakValueDictionary[Place, Tensor] = WeakValueDictionary()  # as long as an adapter has them
        self._is_failing = False

    # asking

    def get(self, adapter: AdapterId) -> Adapter | None:
        """The adapter as it was kept; None if it is not here, or not whole."""
        if self._folder is None:
            return None
        with self._lock:
            found: object | None = self._waiting.get(adapter) or self._drafts.get(adapter)
        if found is None:
            found = self._read(self._folder, self._name(adapter), self._label(adapter))
        if isinstance(found, Adapter):
            self._on_event(CompiledEvent.HIT)
            return found
        self._on_event(CompiledEvent.MISS)
        return None

    def has(self, adapter: AdapterId) -> bool:
        """Whether a file of the adapter is here, or is about to be; it may turn out to be damaged."""
        with self._lock:
            if adapter in self._waiting or adapter in self._drafts:
                return True
        try:
            return self._folder is not None and self._name(adapter) in self._folder
        except OSError as error:
            self._note_failure(error)
            return False

    def _read(self, folder: BoundedFolder, name: str, label: str) -> object | None:
        """What a file holds; None if it is not there, cannot be read, or is not whole: then it is deleted."""
        try:
            content = folder.read(name)
            return None if content is None else self._files.decode(content, label=label, fetch=self._factors)
        except NotReadable as error:
            _LOG.warning("compiled adapter %s will be compiled again: %s", name, error)
            self._on_event(CompiledEvent.DAMAGED)
            self._remove(folder, name)
        except _NotHereError:
            pass
        except OSError as error:
            self._note_failure(error)
        return None

    def _factors(self, key: str) -> Sequence[Tensor]:
        """Shared factors by key, the very tensors that other adapters have."""
        assert self._folder is not None, "a file names them"
        with self._lock:
            held = [tensor for number in (0, 1) if (tensor := self._shared.get((key, number))) is not None]
        if len(held) == 2:
            self._folder.touch(_shared_name(key))
            return held
        read = self._read(self._folder, _shared_name(key), _shared_label(key))
        if not isinstance(read, tuple):
            raise _NotHereError
        factors = [tensor.clone() for tensor in read]  # each in memory that holds nothing else
        with self._lock:
            self._shared.update({(key, number): tensor for number, tensor in enumerate(factors)})
        return factors

    # keeping

    def keep(self, adapter: Adapter) -> None:
        """Have an adapter written, unless it is about to be, or too much waits already. Returns at once."""
        folder = self._folder
        if folder is None:
            return
        num_bytes = _num_bytes(adapter)
        with self._lock:
            if adapter.id in self._waiting or adapter.id in self._drafts:
                return
            has_room = not self._waiting_bytes or self._waiting_bytes + num_bytes <= self._max_waiting_bytes
            is_draft = bool(self._uploads) and any(part.id in self._uploads for part in parts_of(adapter.id))
            if has_room:
                (self._drafts if is_draft else self._waiting)[adapter.id] = adapter
                self._waiting_bytes += num_bytes
        if not has_room:
            self._on_event(CompiledEvent.PASSED_OVER)
        elif not is_draft:
            self._errands.put(lambda: self._write(folder, adapter))

    def withhold(self, checkpoint: AdapterId) -> None:
        """From now on what is kept of a checkpoint is a draft, until as many `settle_upload` have come."""
        with self._lock:
            self._uploads[checkpoint] += 1

    def settle_upload(self, checkpoint: AdapterId, *, took_place: bool) -> None:
        """Have the drafts of a checkpoint written, or drop them when nobody else uploads it. Returns at once."""
        folder = self._folder
        with self._lock:
            self._uploads[checkpoint] -= 1
            is_last = not self._uploads[checkpoint]
            if is_last:
                del self._uploads[checkpoint]
            due = {}
            if took_place or is_last:
                due = {id_: made for id_, made in self._drafts.items() if _is_of(checkpoint, id_)}
            self._drafts = {id_: made for id_, made in self._drafts.items() if id_ not in due}
            if took_place:
                self._waiting |= due
            else:
                self._waiting_bytes -= sum(map(_num_bytes, due.values()))
        if took_place and folder is not None:
            for made in due.values():
                self._errands.put(partial(self._write, folder, made))

    def forget(self, adapter: AdapterId) -> None:
        """Have everything deleted that was made of a checkpoint, whatever it was compiled for. Returns at once."""
        folder = self._folder
        if folder is not None:
            self._errands.put(lambda: self._delete(folder, _mark(adapter)))

    def settle(self, timeout_s: float = 10.0) -> bool:
        """Wait until what was asked for is on the disk, or given up; False if it takes longer than that."""
        return self._errands.settle(timeout_s)

    # on the writing thread

    def _write(self, folder: BoundedFolder, adapter: Adapter) -> None:
        try:
            places: dict[int, Place] = {}
            for key, factors in self._shared_factors(adapter):
                places.update({id(tensor): (key, number) for number, tensor in enumerate(factors)})
                self._write_factors(folder, key, factors)
            content = self._files.encode(adapter, label=self._label(adapter.id), elsewhere=places)
            folder.write(self._name(adapter.id), content)
            self._on_event(CompiledEvent.WRITTEN)
            for _ in range(folder.make_room()):
                self._on_event(CompiledEvent.EVICTED)
            self._is_failing = False
        except (OSError, TypeError) as error:
            self._note_failure(error)
        finally:
            with self._lock:
                del self._waiting[adapter.id]
                self._waiting_bytes -= _num_bytes(adapter)

    def _shared_factors(self, adapter: Adapter) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """The factors that are written apart, with a key that says what they are; the same ones may come twice."""
        for edit in adapter.sites.values():
            for each in edit.maps if isinstance(edit, Affine) else ():
                if isinstance(each, SharedMap) and sum(t.nbytes for t in each.factors) >= self._min_shared_bytes:
                    facts = [(str(tensor.dtype), tuple(tensor.shape)) for tensor in each.factors]
                    yield _digest(f"{self._compiled_for} {each.key} {facts}"), each.factors

    def _write_factors(self, folder: BoundedFolder, key: str, factors: tuple[Tensor, Tensor]) -> None:
        name = _shared_name(key)
        if name in folder:
            folder.touch(name)
        else:
            folder.write(name, self._files.encode(factors, label=_shared_label(key), elsewhere={}))

    def _delete(self, folder: BoundedFolder, mark: str) -> None:
        try:
            for name in [name for name in folder.names() if mark in name.partition(".")[0].split("-")]:
                folder.remove(name)
        except OSError as error:
            self._note_failure(error)

    # names

    def _label(self, adapter: AdapterId) -> str:
        return f"{self._compiled_for} {adapter}"

    def _name(self, adapter: AdapterId) -> str:
        marks = dict.fromkeys(_mark(part.id) for part in parts_of(adapter))
        return f"{'-'.join(marks)}.{_digest(self._label(adapter))}"

    # what goes wrong

    def _remove(self, folder: BoundedFolder, name: str) -> None:
        try:
            folder.remove(name)
        except OSError as error:
            self._note_failure(error)

    def _note_failure(self, error: Exception) -> None:
        self._on_event(CompiledEvent.FAILED)
        if not self._is_failing:
            self._is_failing = True
            _LOG.warning("compiled adapters cannot be kept, and are compiled whenever they are loaded: %s", error)


class _NotHereError(Exception):
    """A file names shared factors that are gone."""


def _num_bytes(adapter: Adapter) -> int:
    return sum(tensor.nbytes for tensor in adapter.tensors())


def _is_of(checkpoint: AdapterId, adapter: AdapterId) -> bool:
    return any(part.id == checkpoint for part in parts_of(adapter))


def _mark(checkpoint: AdapterId) -> str:
    """The beginning of a checkpoint's digest, in names of files."""
    return checkpoint.removeprefix("sha256:")[:16]


def _shared_name(key: str) -> str:
    return f"{_SHARED}.{key}"


def _shared_label(key: str) -> str:
    return f"{_SHARED} {key}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:40]
