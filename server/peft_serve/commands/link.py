"""The connection of a command to a server: JSON in, JSON out, and every failure as a CommandFailed.

Knows HTTP and the three shapes of the server's refusals, and no route.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Annotated, Any, Final, Self

import httpx
import typer

from peft_serve.commands.exits import CommandFailed, Exit

DEFAULT_URL: Final = "http://127.0.0.1:8000"
KEY_VARIABLE: Final = "PEFT_SERVE_API_KEY"
_CONNECT_S: Final = 5.0
_QUIET_S: Final = 120.0  # a stream says something at least every --keep-alive-s; an upload is tried for 20 s at most

UrlOption = Annotated[str, typer.Option("--url", envvar="PEFT_SERVE_URL", help="address of the server")]


def timeouts() -> httpx.Timeout:
    """Patience with a server that was reached, none with an address where nothing is."""
    return httpx.Timeout(_QUIET_S, connect=_CONNECT_S)


class ServerLink:
    """A context manager over one server's address. `transport` stands in for the network in tests."""

    def __init__(self, url: str, *, transport: httpx.BaseTransport | None = None) -> None:
        self.url = checked_url(url)
        self.client = httpx.Client(
            base_url=self.url, timeout=timeouts(), transport=transport, headers=authorization(os.environ)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()

    def ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        """The answer, whose status is below 400; raises CommandFailed."""
        with reaching(self.url):
            answer = self.client.request(method, path, **request)
        refuse(answer, answer.content)
        return answer

    def json(self, method: str, path: str, **request: Any) -> Any:
        """The answer's JSON; None when it has no body."""
        answer = self.ask(method, path, **request)
        return parsed(answer) if answer.content else None


def authorization(environ: Mapping[str, str]) -> dict[str, str]:
    """The header with the key that every command sends, where the environment has one.

    CommandFailed, which never quotes it, when it cannot be sent as it stands.
    """
    key = environ.get(KEY_VARIABLE, "").strip()
    if not all("!" <= each <= "~" for each in key):
        raise CommandFailed(
            Exit.USAGE,
            f"{KEY_VARIABLE}: holds spaces, line ends or other signs that no key has; give it the key alone, which is "
            "the first line that `peft-serve keys new` writes",
            code="key",
        )
    return {"authorization": f"Bearer {key}"} if key else {}


def checked_url(url: str) -> str:
    """The address without a slash at its end; CommandFailed when it is none."""
    try:
        read = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise CommandFailed(Exit.USAGE, f"--url {url}: {error}; write {DEFAULT_URL}", code="url") from None
    if read.scheme not in ("http", "https") or not read.host:
        raise CommandFailed(Exit.USAGE, f"--url {url}: is no http address; write {DEFAULT_URL}", code="url")
    return url.rstrip("/")


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Turn what happens to a connection into words."""
    try:
        yield
    except httpx.ConnectError:
        raise CommandFailed(
            Exit.UNREACHABLE, f"no server answers at {url}; start one with `peft-serve serve`, or give its --url"
        ) from None
    except httpx.TimeoutException:
        raise CommandFailed(
            Exit.UNREACHABLE,
            f"the server at {url} does not answer in time; `peft-serve doctor --url {url}` looks at it",
        ) from None
    except httpx.TransportError as error:
        raise CommandFailed(Exit.UNREACHABLE, f"the connection to {url} broke: {error}; ask again") from None


def parsed(answer: httpx.Response) -> Any:
    """A body's JSON; CommandFailed when it is none, so when something else than peft-serve answers."""
    try:
        return answer.json()
    except ValueError:
        raise CommandFailed(
            Exit.FAILED, f"{answer.request.url} answers, but not in JSON; is it the address of a peft-serve?"
        ) from None


def refuse(answer: httpx.Response, content: bytes) -> None:
    """Raise CommandFailed for an answer whose status is 400 or more."""
    if answer.status_code < 400:
        return
    try:
        body = json.loads(content)
    except ValueError:
        body = {}
    raise refusal_of(answer.status_code, body if isinstance(body, dict) else {}, retry_after=_wait_of(answer.headers))


def refusal_of(status: int, body: Mapping[str, Any], *, retry_after: str = "") -> CommandFailed:
    """What a native, a TGI or an OpenAI error body says."""
    error = body.get("error")
    inner = error if isinstance(error, dict) else {}
    message = body.get("detail") or inner.get("message") or (error if isinstance(error, str) else "")
    errors = [
        (str(each.get("path", "")), str(each.get("reason", "")))
        for each in body.get("errors") or ()
        if isinstance(each, dict)
    ]
    message = str(message or f"the server answers {status} and does not say why") + retry_after
    if status == 401:
        message += f"; commands send the one in {KEY_VARIABLE}"
    code = str(body.get("code") or inner.get("code") or "refused")
    return CommandFailed(Exit.REFUSED, message, code=code, status=status, errors=errors)


def _wait_of(headers: httpx.Headers) -> str:
    seconds = headers.get("retry-after")
    return f" (come back in {seconds} s)" if seconds else ""


async def events(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a server-sent stream; comments and the closing [DONE] are passed over."""
    async for line in lines:
        if line.startswith("data:"):
            text = line.removeprefix("data:").strip()
            if text and text != "[DONE]":
                yield json.loads(text)
