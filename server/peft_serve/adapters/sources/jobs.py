"""Fetches that go on beside the requests: queued, a few at a time, each to a version of a name or to an error.

Owns the threads and what is told about a fetch while it runs and for a while after. How a checkpoint is published is
given to it; it knows no HTTP.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from peft_serve.adapters.changes import Published
from peft_serve.adapters.members import UploadLimits
from peft_serve.adapters.ownership import OPERATOR, Publisher
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.sources.folder import Progress, fetch
from peft_serve.adapters.sources.locator import Locator
from peft_serve.adapters.sources.opening import Sources
from peft_serve.errors import FetchFailed, Internal, NotFound, QueueFull, ServeError, Unavailable

NUM_THREADS: Final = 2
MAX_ENDED: Final = 256
_RETRY_S: Final = 10.0
_Key = tuple[str, str, bool, Publisher]

_log = logging.getLogger(__name__)


class JobState(StrEnum):
    QUEUED = "queued"
    FETCHING = "fetching"
    CHECKING = "checking"  # the gate reads it, and it is written to the store
    TRYING = "trying"  # the trial prompt runs
    DONE = "done"
    FAILED = "failed"


class Publish(Protocol):
    """Makes fetched files a version of a name, by the way every upload goes; raises ServeError."""

    def __call__(
        self,
        name: str,
        files: CheckpointFiles,
        source: str,
        *,
        create_only: bool,
        on_trying: Callable[[], None],
        publisher: Publisher,
    ) -> Published: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """A job as it was at one moment."""

    id: str
    name: str
    source: str  # with the commit, once that is known
    state: JobState
    num_bytes: int
    total_bytes: int | None  # None: not looked at yet
    error: ServeError | None
    published: Published | None


class Job:
    """One fetch. `ended` is done when it is, with what was published or the error."""

    def __init__(
        self,
        id_: str,
        name: str,
        locator: Locator,
        check: Callable[[], None],
        *,
        create_only: bool,
        publisher: Publisher,
    ) -> None:
        self.id = id_
        self.name = name
        self.locator = locator
        self.create_only = create_only
        self.publisher = publisher
        self.source = str(locator)
        self.state = JobState.QUEUED
        self.progress = Progress(check)
        self.ended: Future[Published] = Future()
        self.ended.set_running_or_notify_cancel()  # nobody who waits for it can cancel it

    @property
    def key(self) -> _Key:
        """Two jobs with one key do the same."""
        return self.name, str(self.locator), self.create_only, self.publisher

    def view(self) -> JobView:
        error = self.ended.exception() if self.state is JobState.FAILED else None
        return JobView(
            id=self.id,
            name=self.name,
            source=self.source,
            state=self.state,
            num_bytes=self.progress.num_bytes,
            total_bytes=self.progress.total_bytes,
            error=error if isinstance(error, ServeError) else None,
            published=self.ended.result() if self.state is JobState.DONE else None,
        )


def no_such_job() -> NotFound:
    return NotFound("no such job; the last 256 that ended are remembered until the server restarts")


class FetchJobs:
    """Every job of a server. Thread-safe; no thread runs before the first job."""

    def __init__(
        self,
        sources: Sources,
        publish: Publish,
        *,
        limits: UploadLimits,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        timeout_s: float,
        max_open: int,
    ) -> None:
        """`timeout_s` bounds the reading of one source; `max_open` jobs wait or run, and more are refused."""
        self._sources = sources
        self._publish = publish
        self._limits = limits
        self._clock = clock
        self._new_id = new_id
        self._timeout_s = timeout_s
        self._max_open = max_open
        self._lock = threading.Lock()
        self._open: dict[_Key, Job] = {}
        self._ended: dict[str, Job] = {}  # the last ones, oldest first
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._is_closed = False

    def submit(self, name: str, locator: Locator, *, create_only: bool = False, publisher: Publisher = OPERATOR) -> Job:
        """Begin a fetch, or give the one that is under way for the same; raises QueueFull and Unavailable."""
        with self._lock:
            if self._is_closed:
                raise Unavailable("the server is stopping; no fetch begins")
            job = self._made(name, locator, create_only=create_only, publisher=publisher)
            known = self._open.get(job.key)
            if known is not None:
                return known
            if len(self._open) >= self._max_open:
                raise QueueFull(
                    f"{self._max_open} fetches of adapters wait or run, as many as this server takes; come back later",
                    retry_after_s=_RETRY_S,
                )
            self._open[job.key] = job
            if len(self._threads) < min(NUM_THREADS, len(self._open)):
                thread = threading.Thread(target=self._main, name=f"fetch-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._waiting.put(job)
        return job

    def get(self, id_: str) -> Job:
        """A job that runs, or one of the last that ended; raises NotFound."""
        with self._lock:
            found = next((job for job in self._open.values() if job.id == id_), self._ended.get(id_))
        if found is None:
            raise no_such_job()
        return found

    def close(self) -> None:
        """Let nothing begin any more and give up what is being read; returns at once."""
        with self._lock:
            self._is_closed = True
            for _ in self._threads:
                self._waiting.put(None)

    def _made(self, name: str, locator: Locator, *, create_only: bool, publisher: Publisher) -> Job:
        deadline: list[float] = []  # begins when the job does

        def check() -> None:
            if self._is_closed:
                raise Unavailable("the server is stopping; ask again when it runs")
            if not deadline:
                deadline.append(self._clock() + self._timeout_s)
            elif self._clock() > deadline[0]:
                raise FetchFailed(f"the source was not read within {self._timeout_s:g} seconds (--fetch-timeout-s)")

        return Job(self._new_id(), name, locator, check, create_only=create_only, publisher=publisher)

    def _main(self) -> None:
        while (job := self._waiting.get()) is not None:
            try:
                published = self._run(job)
            except ServeError as error:
                _log.info("adapter %s: %s was not fetched: %s", job.name, job.source, error.message)
                self._end(job, error)
            except Exception:  # noqa: BLE001  # whatever it is, it is this job's alone
                _log.exception("adapter %s: fetching %s failed", job.name, job.source)
                self._end(job, Internal("an error on the server's side; its log says more"))
            else:
                self._end(job, published)

    def _run(self, job: Job) -> Published:
        job.state = JobState.FETCHING
        folder = self._sources.open(job.locator)
        files = fetch(folder, self._limits, job.progress)
        job.source = folder.provenance
        job.state = JobState.CHECKING

        def on_trying() -> None:
            job.state = JobState.TRYING

        return self._publish(
            job.name,
            files,
            job.source,
            create_only=job.create_only,
            on_trying=on_trying,
            publisher=job.publisher,
        )

    def _end(self, job: Job, outcome: Published | ServeError) -> None:
        with self._lock:
            del self._open[job.key]
            self._ended[job.id] = job
            if len(self._ended) > MAX_ENDED:
                del self._ended[next(iter(self._ended))]
        if isinstance(outcome, ServeError):
            job.ended.set_exception(outcome)
            job.state = JobState.FAILED
        else:
            job.ended.set_result(outcome)
            job.state = JobState.DONE
