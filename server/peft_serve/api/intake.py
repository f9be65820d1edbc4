"""How checkpoints that the server takes by itself come in: fetched from a source, or found in a watched folder.

They go the way of every upload, through the gate and the trial to the catalog, and are counted like one. Owns the jobs
and the watch; knows no request.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import Final

from peft_serve.adapters.changes import Published
from peft_serve.adapters.findings import Inspection, Proof
from peft_serve.adapters.members import UploadLimits
from peft_serve.adapters.names import check_name
from peft_serve.adapters.ownership import OPERATOR, Publisher
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.sources.jobs import FetchJobs, Job
from peft_serve.adapters.sources.watch import FolderWatch, WatchProblem
from peft_serve.api.trial import Trial
from peft_serve.core import AdapterId
from peft_serve.engine.letting_go import let_go
from peft_serve.engine.parts import ServerParts
from peft_serve.errors import ServeError, UnknownAdapter

MAX_OPEN_JOBS: Final = 32

_log = logging.getLogger(__name__)


class Intake:
    """One for each application. `trial` gives what tries adapters out, made before the first checkpoint comes."""

    def __init__(
        self,
        parts: ServerParts,
        trial: Callable[[], Trial],
        *,
        now: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        settings = parts.settings
        limits = UploadLimits(max_bytes=settings.max_adapter_bytes)
        self._parts = parts
        self._trial = trial
        self._jobs = FetchJobs(
            parts.sources,
            self.publish,
            limits=limits,
            clock=parts.clock,
            new_id=new_id,
            timeout_s=settings.fetch_timeout_s,
            max_open=MAX_OPEN_JOBS,
        )
        self._watch = FolderWatch(
            settings.watch,
            self,
            limits=limits,
            now=now,
            settle_s=settings.watch_settle_s,
            interval_s=settings.watch_interval_s,
            removes=settings.watch_removes,
        )

    def start(self) -> None:
        """Begin to watch, if there is a folder for it. The trial is made."""
        if self._parts.settings.watch:
            self._watch.start()

    def close(self) -> None:
        """Take nothing in any more; returns at once."""
        self._watch.stop()
        self._jobs.close()

    @property
    def problems(self) -> tuple[WatchProblem, ...]:
        """What lies in watched folders and is not served."""
        return self._watch.problems

    def fetch(self, name: str, source: str, *, create_only: bool = False, publisher: Publisher = OPERATOR) -> Job:
        """Begin to fetch a checkpoint; raises InvalidParameter, Forbidden, QueueFull and Unavailable."""
        check_name(name, base_name=self._parts.base.name)
        locator = self._parts.sources.locate(source)
        return self._jobs.submit(name, locator, create_only=create_only, publisher=publisher)

    def job(self, id_: str) -> Job:
        """Raises NotFound."""
        return self._jobs.get(id_)

    def publish(
        self,
        name: str,
        files: CheckpointFiles,
        source: str,
        *,
        create_only: bool = False,
        on_trying: Callable[[], None] = lambda: None,
        publisher: Publisher = OPERATOR,
    ) -> Published:
        """Make fetched files a version of a name. For every thread but the event loop's; raises as the catalog does."""

        def prove(found: Inspection) -> Proof:
            on_trying()
            return self._trial().prove(name, found)

        try:
            published = self._parts.catalog.changes.publish(
                name, files, create_only=create_only, prove=prove, source=source, publisher=publisher
            )
        except ServeError as error:
            self._parts.metrics.observe_upload("refused" if error.status < 500 else "failed")
            raise
        self._parts.metrics.observe_upload("created" if published.created else "unchanged")
        if published.created:
            _log.info("adapter %s: version %d is from %s", name, published.version.number, source)
        return published

    def remove(
        self, name: str, *, force: bool = False, if_match: str | None = None, publisher: Publisher = OPERATOR
    ) -> int:
        """Delete a name with all its versions, here and on the device; gives how many requests still run on them.

        Reads the disk; raises as the catalog does."""
        catalog, engine = self._parts.catalog, self._parts.engine
        ids = frozenset(version.id for version in catalog.versions(name))
        in_flight = catalog.changes.delete(name, force=force, if_match=if_match, publisher=publisher)
        ids = catalog.unnamed(ids)  # another name may stand for the same files
        with contextlib.suppress(ServeError):  # the name is gone; what is left of a pin goes with the next start
            catalog.pins.remove(ids)
        let_go(engine, ids)
        return in_flight

    # what a watched folder's checkpoints are put on

    def ids(self, name: str) -> frozenset[AdapterId]:
        with contextlib.suppress(UnknownAdapter):
            return frozenset(version.id for version in self._parts.catalog.versions(name))
        return frozenset()

    def came_from(self, prefix: str) -> Iterable[str]:
        entries = self._parts.catalog.list()
        return [e.name for e in entries if e.version is not None and e.version.source == f"{prefix}{e.name}"]

    def publish_watched(self, name: str, files: CheckpointFiles, source: str) -> None:
        self.publish(name, files, source)

    def remove_watched(self, name: str, source: str) -> bool:
        try:
            version = self._parts.catalog.get(name).version
        except UnknownAdapter:
            return False
        if version is None or version.source != source:
            return False
        self.remove(name)
        return True
