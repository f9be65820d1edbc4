"""The files of checkpoints in a shared store, by their digest.

    blobs/sha256/<hex>/blob.json        the blob's paper (`blob_paper`): the one thing here that is replaced
    blobs/sha256/<hex>/<place>/<file>   the files of one upload; never changed

An upload puts its files under a fresh place and then the paper, which makes them the blob's. Where the blob is there
already it renews the paper: that changes its tag, so that nobody who meant to remove the blob can do so. The blob is
not collected for `grace_s` from then on (`collector`), and a name stands for it within a quarter of that, or the paper
is renewed first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from peft_serve.adapters.manifest import Manifest, decode_manifest, encode_manifest
from peft_serve.adapters.records import (
    CONFIG_FILE,
    HEAD_CONFIG_FILE,
    HEAD_WEIGHTS_FILE,
    PROFILE_FILE,
    WEIGHTS_FILE,
    CheckpointFiles,
)
from peft_serve.adapters.sealed import SealError
from peft_serve.adapters.shared.blob_paper import FOLDER, BlobPaper, folder_of, lying, paper_of
from peft_serve.adapters.shared.bucket import Bucket, Oversize
from peft_serve.adapters.shared.documents import Documents
from peft_serve.adapters.shared.words import RETRY_AFTER_S, out_of_reach
from peft_serve.adapters.vocabulary import VOCABULARY_FILES
from peft_serve.core import AdapterId
from peft_serve.errors import AdapterDamaged, Unavailable

_MAX_TRIES = 20


class Blobs:
    """Thread-safe; remembers papers and nothing large. Methods raise OSError where the bucket does."""

    def __init__(
        self,
        bucket: Bucket,
        documents: Documents,
        *,
        clock: Callable[[], float],
        new_name: Callable[[], str],
        grace_s: float,
    ) -> None:
        self._bucket = bucket
        self._documents = documents
        self._clock = clock
        self._new_name = new_name
        self._grace_s = grace_s
        self._lock = threading.Lock()
        self._manifests: dict[AdapterId, Manifest | None] = {}  # of blobs that were there; None: unreadable
        self._absent: set[AdapterId] = set()  # found damaged, or forgotten, and others changed nothing since
        self._renewed: dict[AdapterId, float] = {}  # when this process began to put or renew a paper

    # writing

    def put(self, adapter: AdapterId, files: CheckpointFiles, manifest: Manifest) -> bool:
        """Keep `files` as `adapter`, and its paper from being collected for a while; whether that mended a damaged
        blob. Raises Unavailable."""
        place, began_s = "", self._clock()
        for _ in range(_MAX_TRIES):
            looked_s = self._clock()
            paper, tag = self._look(adapter)
            if paper is None or paper.is_gone or not self._is_intact(adapter, paper):
                place = place or self._put_files(adapter, files)
                paper = BlobPaper(place=place, sizes={name: len(each) for name, each in files.contents().items()})
                self._require_soon(began_s)  # else the files may be taken for those of an upload that broke off
            renewed = BlobPaper(place=paper.place, sizes=paper.sizes, manifest=encode_manifest(manifest).decode())
            if self._documents.swap(paper_of(adapter), renewed.to_json(), tag) is not None:
                self._learn(adapter, manifest, looked_s)
                if place and place != renewed.place:  # another upload of the same files came first
                    self._bucket.remove(f"{folder_of(adapter)}{place}/")
                return tag is not None and place == renewed.place
        raise _busy()

    def renew(self, adapters: Iterable[AdapterId]) -> None:
        """Before a record names these: keep them from being collected. Raises Unavailable where one is gone."""
        for adapter in adapters:
            with self._lock:
                since_s = self._renewed.get(adapter)
            if since_s is None or self._clock() - since_s > self._grace_s / 4:
                self._renew(adapter)

    def _renew(self, adapter: AdapterId) -> None:
        for _ in range(_MAX_TRIES):
            began_s = self._clock()
            paper, tag = self._look(adapter)
            if paper is None or paper.is_gone:
                raise Unavailable(
                    "the upload took so long that its files were collected; upload it again",
                    retry_after_s=RETRY_AFTER_S,
                )
            if self._documents.swap(paper_of(adapter), paper.to_json(), tag) is not None:
                self._learn(adapter, _manifest_in(paper), began_s)
                return
        raise _busy()

    def _put_files(self, adapter: AdapterId, files: CheckpointFiles) -> str:
        place = self._new_name()
        contents = files.contents()
        self._bucket.require_room(sum(len(content) for content in contents.values()))
        for name, content in contents.items():
            self._bucket.put(f"{folder_of(adapter)}{place}/{name}", content)
        return place

    def _require_soon(self, began_s: float) -> None:
        if self._clock() - began_s > self._grace_s / 2:
            raise Unavailable(
                "the adapter store is too slow to take the upload; try again", retry_after_s=RETRY_AFTER_S
            )

    def _learn(self, adapter: AdapterId, manifest: Manifest | None, began_s: float) -> None:
        with self._lock:
            self._manifests[adapter] = manifest
            self._renewed[adapter] = began_s
            self._absent.discard(adapter)

    # reading

    def has(self, adapter: AdapterId) -> bool:
        """Whether it is there. The bucket is asked about what is new to this process, and about nothing else: whoever
        asks may hold up others meanwhile."""
        with self._lock:
            if adapter in self._absent:
                return False
            if adapter in self._manifests:
                return True
        self._seen(adapter, self._look(adapter)[0])
        with self._lock:
            return adapter in self._manifests

    def manifest(self, adapter: AdapterId) -> Manifest | None:
        """What the paper says of it; None where it is missing, damaged or another's."""
        if not self.has(adapter):
            return None
        with self._lock:
            return self._manifests.get(adapter)

    def read(self, adapter: AdapterId) -> CheckpointFiles:
        """The files, checked against the digest; raises AdapterDamaged and AdapterUnavailable."""
        try:
            for _ in range(2):  # a second time where an upload mended it meanwhile
                paper, _tag = self._look(adapter)
                files = None if paper is None or paper.is_gone else self._files(adapter, paper)
                if files is not None and files.digest() == adapter:
                    self._seen(adapter, paper)
                    return files
        except OSError as error:
            raise out_of_reach("the adapter's files") from error
        with self._lock:
            self._absent.add(adapter)
            self._manifests.pop(adapter, None)
        raise AdapterDamaged("the adapter's files are damaged or missing; upload it again")

    def ids(self) -> list[AdapterId]:
        """The ids of all blobs that are there; reads their papers."""
        found = lying(self._bucket.tags(FOLDER))
        papers = ((adapter, self._look(adapter)[0]) for adapter in found)
        return [adapter for adapter, paper in papers if paper is not None and not paper.is_gone]

    def forget(self, adapter: AdapterId) -> None:
        """No name that this process knows stands for it: it is not asked for again, until others change something."""
        with self._lock:
            self._manifests.pop(adapter, None)
            self._absent.add(adapter)
            self._renewed.pop(adapter, None)

    def look_again(self) -> None:
        """Others have changed something: what was damaged may be mended, and what was forgotten may have a name."""
        with self._lock:
            self._absent.clear()

    def _look(self, adapter: AdapterId) -> tuple[BlobPaper | None, str | None]:
        found = self._documents.read(paper_of(adapter))
        return (None, None) if found is None else (BlobPaper.from_json(found.body), found.tag)

    def _seen(self, adapter: AdapterId, paper: BlobPaper | None) -> None:
        with self._lock:
            if paper is None or paper.is_gone:
                self._manifests.pop(adapter, None)
            else:
                self._manifests[adapter] = _manifest_in(paper)
                self._absent.discard(adapter)

    def _is_intact(self, adapter: AdapterId, paper: BlobPaper) -> bool:
        files = self._files(adapter, paper)
        return files is not None and files.digest() == adapter

    def _files(self, adapter: AdapterId, paper: BlobPaper) -> CheckpointFiles | None:
        """What lies there, as far as it has the size that the paper tells; None without the two files of every one."""
        config, weights = self._file(adapter, paper, CONFIG_FILE), self._file(adapter, paper, WEIGHTS_FILE)
        if config is None or weights is None:
            return None
        vocabulary = {name: self._file(adapter, paper, name) for name in VOCABULARY_FILES}
        return CheckpointFiles(
            config=config,
            weights=weights,
            profile=self._file(adapter, paper, PROFILE_FILE),
            head_config=self._file(adapter, paper, HEAD_CONFIG_FILE),
            head_weights=self._file(adapter, paper, HEAD_WEIGHTS_FILE),
            vocabulary={name: content for name, content in vocabulary.items() if content is not None},
        )

    def _file(self, adapter: AdapterId, paper: BlobPaper, name: str) -> bytes | None:
        size = paper.sizes.get(name)
        if size is None:
            return None
        try:
            found = self._bucket.get(f"{folder_of(adapter)}{paper.place}/{name}", max_bytes=size)
        except Oversize:
            return None
        return None if found is None else found.content


def _manifest_in(paper: BlobPaper) -> Manifest | None:
    try:
        return decode_manifest(paper.manifest.encode())
    except SealError:
        return None


def _busy() -> Unavailable:
    return Unavailable("others upload these very files all the time; try again", retry_after_s=RETRY_AFTER_S)
