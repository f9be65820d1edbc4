"""A store that many processes write to: in a folder they share, or in an object store.

    blobs/sha256/<hex>/   checkpoints by their digest (`blobs`)
    names/<stem>.json     the record of one name (`names`)
    marks/<writer>.json   what each process has changed last (`marks`)
    pins.json             the versions that are to be kept on the device

There is no lock. Records and pins are replaced on condition of what they replace, so that a change is decided on what
is true; files never change. Removing what nobody names is the `collector`'s, later. What was read is remembered, so
that a store out of reach keeps nobody from what this process knows.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Final

from peft_serve.adapters.manifest import Manifest
from peft_serve.adapters.name_record import NameRecord
from peft_serve.adapters.names import is_id
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.sealed import SealError
from peft_serve.adapters.shared.blob_paper import paper_of
from peft_serve.adapters.shared.blobs import Blobs
from peft_serve.adapters.shared.bucket import Bucket
from peft_serve.adapters.shared.collector import Collector
from peft_serve.adapters.shared.documents import Documents
from peft_serve.adapters.shared.marks import Marks
from peft_serve.adapters.shared.names import NameRecords, key_of, name_of
from peft_serve.adapters.shared.words import reached
from peft_serve.adapters.store_folder import BEFORE_THE_STORE
from peft_serve.adapters.store_protocol import News, PinsMoved
from peft_serve.adapters.store_words import NO_WRITING
from peft_serve.core import AdapterId
from peft_serve.errors import ServeError

_LOG: Final = logging.getLogger(__name__)

PINS_KEY: Final = "pins.json"
RELIST_S: Final = 60.0
"""All names are listed so often, for changes of a process that died before it told of them."""


class SharedStore:
    """A `Store`; see the module. Methods may be called from any thread.

    `clock` gives monotonic seconds, `new_name` letters and digits that no process gives again. Files that no name
    stands for are kept for `grace_s`, which is longer than any upload.
    """

    def __init__(
        self, bucket: Bucket, *, clock: Callable[[], float], new_name: Callable[[], str], grace_s: float
    ) -> None:
        """Raises Unavailable where the bucket does not answer."""
        self._bucket = bucket
        self._clock = clock
        self._grace_s = grace_s
        self._on_detach: Callable[[AdapterId], None] = lambda _adapter: None
        self._on_change: Callable[[], None] = lambda: None
        self._documents = Documents(bucket, new_name)
        self._names = NameRecords(bucket, self._documents)
        self._blobs = Blobs(bucket, self._documents, clock=clock, new_name=new_name, grace_s=grace_s)
        self._marks = Marks(bucket, new_name())
        self._collector = Collector(bucket, self._documents, self._names, clock=clock, grace_s=grace_s)
        self._asking = threading.Lock()  # one asks for news, and one tidies, at a time
        self._listed_s: float | None = None  # when all names were last compared
        self._untold: frozenset[str] = frozenset()  # keys that others have changed, and nobody here knows
        self._tidied_s = clock()
        self._pins: tuple[str | None, dict[AdapterId, str]] | None = None  # as they were last read or written
        with reached("read"):
            self._marks.news()
        self._begin()

    def _begin(self) -> None:
        try:
            self._marks.begin()
        except OSError as error:
            if error.errno not in NO_WRITING:
                with reached("written"):
                    raise
            _LOG.warning(
                "the adapter store may not be written to by this server: none can be uploaded, changed or deleted here"
            )

    @property
    def is_read_only(self) -> bool:
        return False

    @property
    def is_shared(self) -> bool:
        return True

    def require_writable(self) -> None:
        """Whether it may be written to is found when it is."""

    @contextmanager
    def told_first(self) -> Iterator[None]:
        """As the protocol says; the store is asked whether it answers."""
        try:
            yield
        except ServeError as error:
            if error.status < 500 and error.code not in BEFORE_THE_STORE:
                with reached("written"):
                    self._marks.settle()
                    self._bucket.tags("marks/")
            raise

    def tell_of_detached(self, listener: Callable[[AdapterId], None]) -> None:
        self._on_detach = listener

    def tell_of_changes(self, listener: Callable[[], None]) -> None:
        self._on_change = listener

    def close(self) -> None:
        """Tell what is left to be told."""
        with suppress(OSError):
            self._marks.settle()

    # blobs

    def put_blob(self, adapter: AdapterId, files: CheckpointFiles, manifest: Manifest) -> None:
        assert adapter == files.digest(), "a blob's id is the digest of its files"
        with reached("written"):
            is_mended = self._blobs.put(adapter, files, manifest)
        if is_mended:  # others may think it damaged
            self._tell(paper_of(adapter))

    def has_blob(self, adapter: AdapterId) -> bool:
        with reached("read"):
            return self._blobs.has(adapter)

    def blob_ids(self) -> list[AdapterId]:
        with reached("read"):
            return self._blobs.ids()

    def read_blob(self, adapter: AdapterId) -> CheckpointFiles:
        return self._blobs.read(adapter)

    def read_manifest(self, adapter: AdapterId) -> Manifest | None:
        try:
            return self._blobs.manifest(adapter)
        except OSError:
            return None

    def detach_blob(self, adapter: AdapterId) -> Callable[[], None]:
        """Forget it here: whether another process names it is not known, and it is the collector that removes it."""
        self._blobs.forget(adapter)
        return lambda: self._on_detach(adapter)

    # names

    def names(self) -> list[str]:
        return self._names.names()

    def read_name(self, name: str) -> NameRecord:
        return self._names.read(name)

    def write_name(self, record: NameRecord, *, replaces: NameRecord | None = None) -> None:
        with reached("written"):
            self._blobs.renew(record.ids - (frozenset() if replaces is None else replaces.ids))
            self._names.write(record, replaces)
        self._tell(key_of(record.name))

    def _tell(self, key: str) -> None:
        """Others learn of a change at their next look; where that cannot be told now, at ours."""
        with suppress(OSError):
            self._marks.add(key)
            self._on_change()

    # pins

    def read_pins(self) -> dict[AdapterId, str]:
        with reached("read"):
            found = self._documents.read(PINS_KEY)
        pins = {} if found is None else _pins_in(found.body)
        self._pins = (None if found is None else found.tag, pins or {})
        if pins is None:
            raise SealError("not a list of pins")
        return dict(pins)

    def write_pins(self, pins: Mapping[AdapterId, str], *, replaces: Mapping[AdapterId, str] | None = None) -> None:
        if self._pins is None or (replaces is not None and self._pins[1] != replaces):
            with suppress(SealError):
                self.read_pins()
        assert self._pins is not None, "what was read is known"
        tag, there = self._pins
        if replaces is not None and there != replaces:
            raise PinsMoved
        with reached("written"):
            written = self._documents.swap(PINS_KEY, {"pins": dict(sorted(pins.items()))}, tag)
        if written is None:
            self._pins = None
            raise PinsMoved
        self._pins = (written, dict(pins))
        self._tell(PINS_KEY)

    # others

    def news(self) -> News:
        """One listing while nothing changes; every `RELIST_S` all names are listed."""
        with self._asking, reached("read"):
            now_s = self._clock()
            self._marks.settle()
            told = self._marks.news()
            if told is None:
                self._listed_s = None
            else:
                self._untold |= told
            if self._listed_s is None or now_s - self._listed_s >= RELIST_S:
                self._untold |= {PINS_KEY, *map(key_of, self._names.moved())}
                self._listed_s = now_s
            keys, self._untold = self._untold, frozenset()
            if keys:
                self._blobs.look_again()
        names = frozenset(name for key in keys if (name := name_of(key)) is not None)
        return News(names=names, has_pins=PINS_KEY in keys)

    def tidy(self) -> int:
        """Twice in the time of grace, and not sooner than that after the start; raises Unavailable."""
        now_s = self._clock()
        if now_s - self._tidied_s < self._grace_s / 2:
            return 0
        self._tidied_s = now_s
        with reached("written"):
            num_gone = self._collector.collect()
            self._bucket.tidy()
        return num_gone


def _pins_in(body: Mapping[str, object] | None) -> dict[AdapterId, str] | None:
    """The list in a document; None for what is none."""
    pins = None if body is None else body.get("pins")
    if not isinstance(pins, dict) or not all(is_id(each) and isinstance(pins[each], str) for each in pins):
        return None
    return {AdapterId(each): name for each, name in pins.items()}
