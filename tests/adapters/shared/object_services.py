"""Servers that speak S3: one that keeps what it is given, and one that answers as it is told."""

from __future__ import annotations

import http.client
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moto.server import ThreadedMotoServer


def environment(address: str) -> dict[str, str]:
    """What a server is told of an object store at `address`."""
    return {
        "AWS_ENDPOINT": address,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "hush",
        "AWS_REGION": "us-east-1",
    }


@contextmanager
def object_service() -> Iterator[str]:
    """The address of a server that speaks S3, with the bucket `bucket`."""
    service = ObjectService()
    service.come()
    make_bucket(service.address)
    yield service.address
    service.go()


def make_bucket(address: str) -> None:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    connection.request(
        "PUT",
        "/bucket",
        headers={
            "Authorization": "AWS4-HMAC-SHA256 Credential=k/20260101/us-east-1/s3/aws4_request, "
            "SignedHeaders=host, Signature=0"
        },
    )
    assert connection.getresponse().status == 200
    connection.close()


class ObjectService:
    """A server that speaks S3, which keeps what it has while it is stopped."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.port = 0
        self._server: ThreadedMotoServer | None = None
        self._silent: socket.socket | None = None
        self._refusing: Service | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def come(self) -> None:
        self._close_others()
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]

    def go(self) -> None:
        self._close_others()
        if self._server is not None:
            self._server.stop()
        self._server = None

    def fall_silent(self) -> None:
        self.go()
        self._silent = socket.create_server(("127.0.0.1", self.port), backlog=200)

    def expire(self) -> None:
        self.go()
        self._refusing = Service(self.port)
        self._refusing.says(400, "ExpiredToken")

    def _close_others(self) -> None:
        if self._silent is not None:
            self._silent.close()
        if self._refusing is not None:
            self._refusing.stop()
        self._silent = self._refusing = None


class Service:
    """Answers every request alike."""

    def __init__(self, port: int = 0) -> None:
        self.status, self.body = 200, b""
        service = self

        class Answers(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("content-length") or 0))
                self.send_response(service.status)
                self.send_header("content-length", str(len(service.body)))
                self.end_headers()
                self.wfile.write(service.body)

            do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                """Nobody reads it."""

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Answers)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def says(self, status: int, code: str) -> None:
        region = "<Region>eu-west-7</Region>"
        self.status = status
        self.body = f"<Error><Code>{code}</Code><Message>secret words</Message>{region}</Error>".encode()
