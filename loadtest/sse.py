"""Server-sent events: cut a byte stream into the ``data`` fields it carries.

Only what a load client needs: comments (keep-alives) and other fields are dropped, and nothing is parsed as
JSON here, because a client that parses every token would take the processor from the server under test.
"""


class EventSplitter:
    """Feed it chunks as they come; it answers with the payloads of the events that are complete."""

    def __init__(self) -> None:
        """Start with an empty buffer."""
        self._buffer = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The payloads completed by `chunk`, in order."""
        self._buffer += chunk.replace(b"\r", b"")
        *whole, self._buffer = self._buffer.split(b"\n\n")
        return [payload for payload in map(_payload, whole) if payload]


def _payload(event: bytes) -> bytes:
    lines = (line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
    return b"\n".join(lines)
