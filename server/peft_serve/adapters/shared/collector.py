"""Removes from a shared store what no name stands for, while others upload and delete.

A blob goes when its paper has been the same, and no record has named it, from one look to another that is `grace_s`
later by this process's own clock: an upload renews the paper (`blobs`), and names the blob sooner than that. It goes by
replacing the paper, on condition that it is still the same, by one that says it is gone. That paper stays for good; the
files are removed behind it, by then nobody's. Files that no paper names go when they have been seen for as long, and so
do marks of processes that write no more. Any number of processes may do this at the same time.
"""

from __future__ import annotations

from collections.abc import Callable

from peft_serve.adapters.shared.blob_paper import FOLDER, BlobPaper, Lying, folder_of, lying, paper_of
from peft_serve.adapters.shared.bucket import Bucket
from peft_serve.adapters.shared.documents import Documents
from peft_serve.adapters.shared.marks import FOLDER as MARKS
from peft_serve.adapters.shared.names import NameRecords
from peft_serve.core import AdapterId


class Collector:
    """Used by one thread. `clock` gives monotonic seconds."""

    def __init__(
        self,
        bucket: Bucket,
        documents: Documents,
        names: NameRecords,
        *,
        clock: Callable[[], float],
        grace_s: float,
    ) -> None:
        self._bucket = bucket
        self._documents = documents
        self._names = names
        self._clock = clock
        self._grace_s = grace_s
        self._since: dict[tuple[str, str], float] = {}  # what nobody needs (a key or a prefix, a tag), and since when

    def collect(self) -> int:
        """Look once; gives how many blobs went. Raises OSError, Unavailable and AdapterUnavailable: then nothing is
        certain, and nothing went that was not certain before."""
        now_s = self._clock()
        found = lying(self._bucket.tags(FOLDER))
        named = {adapter for record in self._names.all_now() for adapter in record.ids}
        idle = {(key, tag): self._since.get((key, tag), now_s) for key, tag in self._bucket.tags(MARKS).items()}
        num_gone = 0
        for adapter, what in found.items():
            if adapter not in named and what.tag is not None and what.places:
                key = (paper_of(adapter), what.tag)
                idle[key] = self._since.get(key, now_s)
                if self._is_due(idle[key], now_s) and self._gone(adapter, what):
                    num_gone += 1
        self._remove_strays(
            {each: what for each, what in found.items() if each not in named or len(what.places) > 1}, idle, now_s
        )
        for (lying_at, _tag), since_s in idle.items():
            if lying_at.startswith(MARKS) and self._is_due(since_s, now_s):
                self._bucket.remove(lying_at)
        self._since = idle
        return num_gone

    def _is_due(self, since_s: float, now_s: float) -> bool:
        return now_s - since_s >= self._grace_s

    def _gone(self, adapter: AdapterId, what: Lying) -> bool:
        """Say that a blob is gone, if its paper is still the one that was seen, and remove its files."""
        there = self._documents.read(paper_of(adapter))
        if there is None or there.tag != what.tag:
            return False
        paper = BlobPaper.from_json(there.body)
        if paper is not None and paper.is_gone:
            return False
        if self._documents.swap(paper_of(adapter), BlobPaper().to_json(), there.tag) is None:
            return False
        if paper is not None:
            self._bucket.remove(f"{folder_of(adapter)}{paper.place}/")
        return True

    def _remove_strays(self, found: dict[AdapterId, Lying], idle: dict[tuple[str, str], float], now_s: float) -> None:
        """Places that no paper names: of uploads that broke off, that came second, or that mended a damaged one."""
        for adapter, what in found.items():
            if not what.places:
                continue
            there = self._documents.read(paper_of(adapter))
            paper = None if there is None else BlobPaper.from_json(there.body)
            for place in what.places - ({paper.place} if paper is not None else set()):
                key = (f"{folder_of(adapter)}{place}/", "")
                idle[key] = self._since.get(key, now_s)
                if self._is_due(idle[key], now_s):
                    self._bucket.remove(key[0])
