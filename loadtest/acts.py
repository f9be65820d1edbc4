"""Acts: single requests to a server beside any trace, such as uploads and deletes."""

import urllib.error
import urllib.request
from collections.abc import Callable, Iterable

Send = Callable[[str, str, bytes | None, str], int]
"""Method, path, body, content type to status; 0 if the server did not answer."""


def sender(url: str, *, api_key: str | None = None, timeout_s: float = 120.0) -> Send:
    """Requests to the server at `url`; errors of the connection are status 0."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this machine

    def send(method: str, path: str, body: bytes | None, content_type: str) -> int:
        headers = {"Content-Type": content_type} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        asked = urllib.request.Request(f"{url}{path}", data=body, method=method, headers=headers)
        try:
            with opener.open(asked, timeout=timeout_s) as answer:
                answer.read()
                status: int = answer.status
                return status
        except urllib.error.HTTPError as refusal:
            return refusal.code
        except OSError:
            return 0

    return send


def unload(send: Send, names: Iterable[str]) -> None:
    """Have the server give the memory of these adapters back, so that the next request finds them on disk only;
    RuntimeError if it refuses."""
    for name in names:
        status = send("POST", f"/adapters/{name}/unload", b"", "application/json")
        if not 200 <= status < 300:
            raise RuntimeError(f"adapter {name} was not unloaded: the server answered {status}")
