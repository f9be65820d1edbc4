"""Churn: uploads, re-uploads and deletes that go on in the background while a trace is played.

One upload a second, in a cycle over a name of its own: upload it and ask it, upload other content under the same name
and ask again, upload the same content again and delete it. Zips are made beforehand, so that the client costs the
machine little.
"""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path

from loadtest.acts import Send
from loadtest.upload import zip_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """One thing that was done, and how the server answered; status 0 if it did not."""

    what: str
    status: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the server said yes."""
        return 200 <= self.status < 300


@dataclass(slots=True)
class Churn:
    """What has been done so far."""

    acts: list[Act] = field(default_factory=list)

    @property
    def num_uploads(self) -> int:
        """Uploads that were tried."""
        return sum(act.what.startswith("upload") for act in self.acts)

    @property
    def num_failed(self) -> int:
        """Acts that the server refused or did not answer."""
        return sum(not act.ok for act in self.acts)


def rounds(zips: Sequence[bytes]) -> Iterator[list[tuple[str, str, str, bytes | None, str]]]:
    """What to do, without end; each list holds one upload and what follows it at once: what it is called, method,
    path, body, content type."""
    contents = cycle(zips)
    for number in count():
        path = f"/adapters/churn-{number}"
        one, other = next(contents), next(contents)
        question = json.dumps({"inputs": " abe ban", "parameters": {"max_new_tokens": 2}}).encode()
        ask = ("ask", "POST", f"/generate?adapter=churn-{number}", question, "application/json")
        yield [("upload", "PUT", path, one, "application/zip"), ask]
        yield [("upload over it", "PUT", path, other, "application/zip"), ask]
        delete = ("delete", "DELETE", path, None, "application/json")
        yield [("upload the same", "PUT", path, other, "application/zip"), delete]


@contextmanager
def churning(send: Send, folders: Sequence[Path], *, every_s: float = 1.0) -> Iterator[Churn]:
    """Churn on a thread of its own for as long as the block lasts; the act that runs then is finished."""
    done, stop = Churn(), threading.Event()
    zips = [zip_of(folder) for folder in folders]

    def work() -> None:
        began = time.monotonic()
        for number, acts in enumerate(rounds(zips), start=1):
            for what, method, path, body, content_type in acts:
                before = time.monotonic()
                status = send(method, path, body, content_type)
                done.acts.append(Act(what=what, status=status, seconds=time.monotonic() - before))
            if stop.wait(max(0.0, began + number * every_s - time.monotonic())):
                return

    thread = threading.Thread(target=work, name="churn")
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()
