"""Object stores, by one that lives in memory."""

from __future__ import annotations

import importlib.util
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import obstore
import pytest
from obstore.store import AzureStore, GCSStore, MemoryStore, S3Store

from peft_serve.adapters.members import UploadLimits
from peft_serve.adapters.sources.folder import Progress, fetch
from peft_serve.adapters.sources.locator import Locator, parse_locator
from peft_serve.adapters.sources.objects import ObjectFolder, open_store
from peft_serve.adapters.sources.opening import Sources
from peft_serve.errors import FetchFailed, Forbidden, NotFound, PayloadTooLarge
from tests.adapters.sources.source_fakes import FILES

LIMITS = UploadLimits(max_bytes=1000)


def stored(files: dict[str, bytes]) -> MemoryStore:
    store = MemoryStore()
    for name, content in files.items():
        obstore.put(store, name, content)
    return store


def folder_of(store: Any) -> ObjectFolder:
    return ObjectFolder(parse_locator("s3://bucket/one"), lambda _locator: store)


def test_a_checkpoint_is_read_from_a_store() -> None:
    folder, progress = folder_of(stored({**FILES, "deeper/adapter_config.json": b"{}"})), Progress()
    files = fetch(folder, LIMITS, progress)
    assert files.weights == FILES["adapter_model.safetensors"]
    assert folder.provenance == "s3://bucket/one"
    assert progress.num_bytes == progress.total_bytes == files.num_bytes


def test_an_empty_folder_and_one_too_large() -> None:
    with pytest.raises(NotFound, match="nothing in this folder"):
        folder_of(MemoryStore()).listing()
    with pytest.raises(PayloadTooLarge, match="1001"):
        fetch(folder_of(stored({**FILES, "adapter_model.safetensors": b"x" * 1001})), LIMITS, Progress())
    with pytest.raises(PayloadTooLarge, match="more than 10"):
        folder_of(stored(FILES)).read("adapter_config.json", 10, lambda _n: None)


def test_a_file_that_is_exchanged_while_it_is_read() -> None:
    store = stored(FILES)

    def exchange() -> None:
        if progress.num_bytes:
            obstore.put(store, "adapter_config.json", b'{"peft_type": "IA3_"}')

    progress = Progress(exchange)
    with pytest.raises(FetchFailed, match="changed while it was read"):
        fetch(folder_of(store), LIMITS, progress)


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("NotFoundError", NotFound),
        ("PermissionDeniedError", Forbidden),
        ("UnauthenticatedError", Forbidden),
        ("GenericError", FetchFailed),
    ],
)
def test_what_goes_wrong_is_said_without_an_address(name: str, refusal: type[Exception]) -> None:
    error = getattr(obstore.exceptions, name)("https://10.0.0.1/bucket said no")

    def fail(_locator: Locator) -> MemoryStore:
        raise error

    with pytest.raises(refusal, match="s3://bucket/one") as refused:
        ObjectFolder(parse_locator("s3://bucket/one"), fail).listing()
    assert "10.0.0.1" not in str(refused.value)


def test_each_kind_has_its_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    for text, kind in (("s3://bucket/a/b", S3Store), ("gs://bucket/a", GCSStore), ("az://container/a", AzureStore)):
        store = open_store(parse_locator(text))
        assert type(store) is kind
        assert store.prefix == "/".join(parse_locator(text).steps[1:])


def test_without_the_extra_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "obstore" else find(name))
    Sources(["hf://org/*"])
    with pytest.raises(ValueError, match=r"pip install 'peft-serve\[objects\]'"):
        Sources(["s3://bucket"])


class _S3(BaseHTTPRequestHandler):
    """As much of S3 as lists one folder of `bucket` and gives its files."""

    seen: list[str] = []  # noqa: RUF012  # one server in one test

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        asked = parse_qs(query)
        if not self.headers.get("authorization", "").startswith("AWS4-HMAC-SHA256 Credential=key/"):
            self._send(403, b"<Error><Code>AccessDenied</Code></Error>")
        elif "list-type" in asked:
            prefix = asked["prefix"][0]
            self._send(200, _listing({f"{prefix}{name}": content for name, content in FILES.items()}))
        elif path.startswith("/bucket/team/one/"):
            self._send(200, FILES[path.rpartition("/")[2]])
        else:
            self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def log_message(self, format: str, *args: object) -> None:  # the library's own name
        self.seen.append(self.path)

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.send_header("etag", f'"{hash(content)}"')
        self.send_header("last-modified", "Sat, 21 Nov 2026 10:00:00 GMT")
        self.end_headers()
        self.wfile.write(content)


def _listing(files: dict[str, bytes]) -> bytes:
    rows = "".join(
        f"<Contents><Key>{key}</Key><Size>{len(content)}</Size><ETag>{hash(content)}</ETag>"
        "<LastModified>2026-11-21T10:00:00.000Z</LastModified></Contents>"
        for key, content in files.items()
    )
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode()


def test_s3_itself_with_the_environments_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _S3) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        locator = parse_locator("s3://bucket/team/one")
        files = fetch(Sources(["s3://bucket"]).open(locator), LIMITS, Progress())
        assert files.weights == FILES["adapter_model.safetensors"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
        with pytest.raises(Forbidden, match="credentials"):
            Sources(["s3://bucket"]).open(locator).listing()
        server.shutdown()
        thread.join(5)
    assert not any("README" in path for path in _S3.seen)
