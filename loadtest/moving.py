"""A name that moves: its adapter is exchanged under the requests that use it.

A request is sent and, as soon as the server has admitted it, its name is given other content or deleted. The answer
must be that of the adapter the name had when the request came.
"""

import json
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtest.routes import Native
from loadtest.sse import EventSplitter
from loadtest.trace import TraceRequest
from loadtest.upload import zip_of

NAME = "moving"


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """One request to the name, the folder of the adapter it had then, and the answer's token ids."""

    request: TraceRequest
    adapter: Path
    tokens: tuple[int, ...]


class MovingName:
    """Plays requests one after the other on the server at `url`, and moves the name under each."""

    def __init__(self, url: str, folders: Sequence[Path], *, api_key: str | None = None) -> None:
        self._url = url
        self._folders = folders
        self._zips = [zip_of(folder) for folder in folders]
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this machine

    def play(self, requests: Sequence[TraceRequest]) -> Iterator[Moved]:
        """The answers; OSError if the server refuses anything."""
        self._upload(0)
        for number, request in enumerate(requests):
            asked = self._ask(request)
            with self._opener.open(asked, timeout=600) as stream:  # open once the headers are there: it is admitted
                if number % 3 == 2:
                    self._send("DELETE", f"/adapters/{NAME}", None)
                self._upload(number + 1)
                pieces = EventSplitter().feed(stream.read())
            tokens = token_ids(pieces)
            yield Moved(request=request, adapter=self._folders[number % len(self._folders)], tokens=tokens)

    def _ask(self, request: TraceRequest) -> urllib.request.Request:
        ask = Native().ask(request)
        headers = {"Content-Type": "application/json", **self._headers}
        url = f"{self._url}{ask.path}?adapter={NAME}"
        return urllib.request.Request(url, data=json.dumps(ask.body).encode(), headers=headers)

    def _upload(self, number: int) -> None:
        self._send("PUT", f"/adapters/{NAME}", self._zips[number % len(self._zips)])

    def _send(self, method: str, path: str, body: bytes | None) -> None:
        headers = {"Content-Type": "application/zip", **self._headers}
        asked = urllib.request.Request(f"{self._url}{path}", data=body, method=method, headers=headers)
        with self._opener.open(asked, timeout=120) as answer:
            answer.read()


def token_ids(pieces: Sequence[bytes]) -> tuple[int, ...]:
    """The token ids in the events of ``/generate_stream``; an error event has none."""
    events = [json.loads(piece) for piece in pieces]
    return tuple(event["token"]["id"] for event in events if "token" in event)


@contextmanager
def moving(name: MovingName, requests: Sequence[TraceRequest]) -> Iterator[list[Moved]]:
    """Play beside whatever the block does, on a thread of its own, and wait for it at the end. The list fills as
    answers come; RuntimeError if the server refused something."""
    found: list[Moved] = []
    failures: list[Exception] = []

    def work() -> None:
        try:
            found.extend(name.play(requests))
        except (OSError, ValueError) as problem:
            failures.append(problem)

    thread = threading.Thread(target=work, name="moving")
    thread.start()
    try:
        yield found
    finally:
        thread.join()
    if failures:
        raise RuntimeError(f"a name that moves could not be played: {failures[0]}") from failures[0]
