"""Fetches beside the requests: their states, their bounds, and what becomes of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from peft_serve.adapters.changes import Published
from peft_serve.adapters.members import UploadLimits
from peft_serve.adapters.ownership import OPERATOR, Publisher
from peft_serve.adapters.records import CheckpointFiles, Version
from peft_serve.adapters.sources.jobs import MAX_ENDED, NUM_THREADS, FetchJobs, Job, JobState
from peft_serve.adapters.sources.opening import Sources
from peft_serve.errors import (
    AdapterInvalid,
    FetchFailed,
    Internal,
    NotFound,
    QueueFull,
    Refusal,
    ServeError,
    Unavailable,
)
from tests.adapters.sources.source_fakes import put


@dataclass
class Desk:
    """Publishes what it is given, when it is let."""

    go: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    published: list[tuple[str, str]] = field(default_factory=list)
    states: list[JobState] = field(default_factory=list)
    job: Job | None = None

    def __call__(
        self,
        name: str,
        files: CheckpointFiles,
        source: str,
        *,
        create_only: bool,
        on_trying: Callable[[], None],
        publisher: Publisher,
    ) -> Published:
        assert publisher == OPERATOR, "nobody else has asked for it"
        assert self.go.wait(10)
        if self.job is not None:
            self.states.append(self.job.state)
            on_trying()
            self.states.append(self.job.state)
        if self.error is not None:
            raise self.error
        self.published.append((name, source))
        version = Version(name=name, number=1, id=files.digest(), created="", summary=None, source=source)
        return Published(version=version, created=True, previous=None)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def made(root: Path, desk: Desk, **options: Any) -> tuple[FetchJobs, Sources]:
    sources = Sources([f"file:{root}"])
    ids = iter(range(10**6))
    settings: dict[str, Any] = {"limits": UploadLimits(), "clock": Clock(), "timeout_s": 60.0, "max_open": 4}
    return FetchJobs(sources, desk, new_id=lambda: f"job-{next(ids)}", **(settings | options)), sources


def outcome(job: Job) -> Published | ServeError:
    """What the job came to, once every one of its marks is set."""
    error = job.ended.exception(10)
    while job.state not in (JobState.DONE, JobState.FAILED):
        time.sleep(0.001)
    assert error is None or isinstance(error, ServeError)
    return error or job.ended.result()


def test_a_job_goes_from_state_to_state(tmp_path: Path) -> None:
    put(tmp_path / "one")
    desk = Desk()
    jobs, sources = made(tmp_path, desk)
    job = jobs.submit("name", sources.locate(f"file:{tmp_path}/one"))
    desk.job = job
    desk.go.set()
    published = outcome(job)
    assert isinstance(published, Published)
    assert desk.states == [JobState.CHECKING, JobState.TRYING]
    view = jobs.get(job.id).view()
    assert (view.state, view.name, view.source) == (JobState.DONE, "name", f"file:{tmp_path.name}/one")
    assert view.num_bytes == view.total_bytes
    assert view.num_bytes > 0
    assert (view.error, view.published) == (None, published)


@pytest.mark.parametrize(
    ("error", "code"),
    [(AdapterInvalid([Refusal("a", "b")]), "adapter_invalid"), (RuntimeError("a path /srv/x"), "internal")],
)
def test_a_job_that_fails_says_why_and_the_next_one_runs(tmp_path: Path, error: Exception, code: str) -> None:
    put(tmp_path / "one")
    desk = Desk(error=error)
    desk.go.set()
    jobs, sources = made(tmp_path, desk)
    job = jobs.submit("name", sources.locate(f"file:{tmp_path}/one"))
    refusal = outcome(job)
    view = job.view()
    assert isinstance(refusal, ServeError)
    assert (refusal.code, view.state, view.error, view.published) == (code, JobState.FAILED, refusal, None)
    assert "/srv" not in refusal.message
    missing = jobs.submit("name", sources.locate(f"file:{tmp_path}/two"))
    assert isinstance(outcome(missing), NotFound)
    desk.error = None
    assert isinstance(outcome(jobs.submit("name", sources.locate(f"file:{tmp_path}/one"))), Published)


def test_the_same_fetch_is_one_job_and_there_are_so_many_at_most(tmp_path: Path) -> None:
    for name in "abcde":
        put(tmp_path / name)
    desk = Desk()
    jobs, sources = made(tmp_path, desk)
    begun = [jobs.submit("name", sources.locate(f"file:{tmp_path}/{name}")) for name in "abcd"]
    assert jobs.submit("name", sources.locate(f"file:///{str(tmp_path)[1:]}/a/")) is begun[0]
    with pytest.raises(QueueFull, match="4 fetches") as refused:
        jobs.submit("name", sources.locate(f"file:{tmp_path}/e"))
    assert refused.value.retry_after_s
    assert sum(job.state is JobState.QUEUED for job in begun) >= len(begun) - NUM_THREADS
    desk.go.set()
    assert all(isinstance(outcome(job), Published) for job in begun)
    assert len(desk.published) == 4
    assert isinstance(outcome(jobs.submit("name", sources.locate(f"file:{tmp_path}/e"))), Published)


def test_a_source_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    class Ticking(Clock):
        def __call__(self) -> float:
            self.now += 10.0
            return self.now

    put(tmp_path / "one")
    jobs, sources = made(tmp_path, Desk(), clock=Ticking(), timeout_s=15.0)
    error = outcome(jobs.submit("name", sources.locate(f"file:{tmp_path}/one")))
    assert isinstance(error, FetchFailed)
    assert "15 seconds" in error.message


def test_the_last_jobs_are_remembered(tmp_path: Path) -> None:
    desk = Desk()
    desk.go.set()
    jobs, sources = made(tmp_path, desk)
    locator = sources.locate(f"file:{tmp_path}/none")
    ended = [jobs.submit("name", locator) for _ in range(1)]
    for _ in range(MAX_ENDED):
        assert isinstance(outcome(ended[-1]), NotFound)
        ended.append(jobs.submit("name", locator))
    outcome(ended[-1])
    with pytest.raises(NotFound, match="no such job"):
        jobs.get(ended[0].id)
    assert jobs.get(ended[-1].id) is ended[-1]


def test_a_server_that_stops_begins_nothing(tmp_path: Path) -> None:
    put(tmp_path / "one")
    desk = Desk()
    jobs, sources = made(tmp_path, desk)
    running = jobs.submit("name", sources.locate(f"file:{tmp_path}/one"))
    jobs.close()
    desk.go.set()
    assert isinstance(outcome(running), Published | Unavailable)
    with pytest.raises(Unavailable, match="stopping"):
        jobs.submit("name", sources.locate(f"file:{tmp_path}/one"))
    assert not isinstance(outcome(running), Internal)
