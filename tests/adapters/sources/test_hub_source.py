"""The hub: a fake of what is asked of it, and once the library itself against a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from peft_serve.adapters.members import UploadLimits
from peft_serve.adapters.sources.folder import Mark, Progress, fetch
from peft_serve.adapters.sources.hub import HubFolder, RepoState
from peft_serve.adapters.sources.locator import parse_locator
from peft_serve.errors import FetchFailed, Forbidden, NotFound, PayloadTooLarge, ServeError
from tests.adapters.sources.source_fakes import FILES

LIMITS = UploadLimits(max_bytes=1000)
COMMIT = "c0ffee" * 6 + "beef"


class FakeHub:
    """One repository; `error` is raised by the next question."""

    def __init__(self, root: Path, files: dict[str, bytes]) -> None:
        self._root = root
        self.files = files
        self.error: Exception | None = None
        self.asked: list[tuple[str, str | None]] = []
        self.downloads: list[str] = []

    def look(self, repo: str, revision: str | None, paths: Iterable[str]) -> RepoState:
        self.asked.append((repo, revision))
        if self.error is not None:
            raise self.error
        return RepoState(commit=COMMIT, files={path: Mark(len(c), "") for path, c in self.files.items()})

    def download(
        self, repo: str, revision: str | None, commit: str, path: str, on_bytes: Callable[[int], None]
    ) -> Path:
        assert (repo, commit) == ("org/repo", COMMIT)
        self.downloads.append(path)
        on_bytes(len(self.files[path]))
        place = self._root / str(len(self.downloads))
        place.write_bytes(self.files[path])
        return place


def test_a_revision_becomes_a_commit_and_only_what_is_needed_is_downloaded(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path, {f"sub/{name}": c for name, c in FILES.items()} | {"sub/deep/adapter_config.json": b"{}"})
    folder, progress = HubFolder(parse_locator("hf://org/repo@v1/sub"), hub), Progress()
    assert fetch(folder, LIMITS, progress).weights == FILES["adapter_model.safetensors"]
    assert hub.asked == [("org/repo", "v1")]
    assert sorted(hub.downloads) == ["sub/adapter_config.json", "sub/adapter_model.safetensors"]
    assert folder.provenance == f"hf://org/repo@{COMMIT}/sub"
    assert progress.num_bytes == progress.total_bytes


def test_a_repository_too_large_is_not_downloaded(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path, {**FILES, "adapter_model.safetensors": b"x" * 1001})
    with pytest.raises(PayloadTooLarge, match="1001"):
        fetch(HubFolder(parse_locator("hf://org/repo"), hub), LIMITS, Progress())
    assert hub.downloads == []


def test_a_folder_that_the_repository_lacks(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such folder"):
        HubFolder(parse_locator("hf://org/repo/none"), FakeHub(tmp_path, dict(FILES))).listing()


class _Response:
    """The little that the library's errors want of a response."""

    status_code = 503
    headers: dict[str, str] = {}  # noqa: RUF012  # as httpx has it, an attribute
    request = None


def made(kind: type[Exception]) -> Exception:
    if issubclass(kind, HfHubHTTPError):
        error = kind.__new__(kind)
        error.args = ("https://hub.internal/api/models/org/repo answered",)
        error.response = _Response()
        return error
    return kind("https://hub.internal/ refused")


@pytest.mark.parametrize(
    ("kind", "refusal", "words"),
    [
        (GatedRepoError, Forbidden, "gated"),
        (RepositoryNotFoundError, NotFound, "HF_TOKEN"),
        (RevisionNotFoundError, NotFound, "no such revision"),
        (HfHubHTTPError, FetchFailed, "the hub answered 503"),
        (OfflineModeIsEnabled, FetchFailed, "does not hold it"),
        (LocalEntryNotFoundError, FetchFailed, "does not hold it"),
        (TimeoutError, FetchFailed, "cannot be read"),
        (ConnectionResetError, FetchFailed, "cannot be read"),
    ],
)
def test_what_goes_wrong_is_said_without_an_address(
    tmp_path: Path, kind: type[Exception], refusal: type[ServeError], words: str
) -> None:
    hub = FakeHub(tmp_path, dict(FILES))
    hub.error = made(kind)
    with pytest.raises(refusal, match=words) as refused:
        HubFolder(parse_locator("hf://org/repo@v1"), hub).listing()
    assert "hf://org/repo@v1" in refused.value.message
    assert "hub.internal" not in refused.value.message


class _Endpoint(BaseHTTPRequestHandler):
    """Model info and files of org/repo, for those with the token."""

    seen: list[str] = []  # noqa: RUF012  # one server in one test

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:  # the library's own name
        self.seen.append(f"{self.command} {self.path}")

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if self.headers.get("authorization") != "Bearer hf_secret":
            self._send(401, b"", {"x-error-code": "RepoNotFound"}, with_body=with_body)
        elif path == "/api/models/org/repo/revision/v1":
            siblings = [{"rfilename": n, "size": len(c), "blobId": f"{len(c):040x}"} for n, c in FILES.items()]
            info = {"id": "org/repo", "sha": COMMIT, "siblings": siblings}
            self._send(200, json.dumps(info).encode(), {"content-type": "application/json"}, with_body=with_body)
        elif path.startswith((f"/org/repo/resolve/{COMMIT}/", "/org/repo/resolve/v1/")):
            content = FILES[path.rpartition("/")[2]]
            headers = {"x-repo-commit": COMMIT, "etag": f'"{len(content):040x}"'}
            self._send(200, content, headers, with_body=with_body)
        else:
            self._send(404, b"", {"x-error-code": "EntryNotFound"}, with_body=with_body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], *, with_body: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"content-length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)


@pytest.fixture
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Endpoint) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join(5)


_SCRIPT = """
from peft_serve.adapters.members import UploadLimits
from peft_serve.adapters.sources.folder import Progress, fetch
from peft_serve.adapters.sources.hub import HubFolder, HuggingFaceHub
from peft_serve.adapters.sources.locator import parse_locator
from peft_serve.errors import ServeError
folder, progress = HubFolder(parse_locator("hf://org/repo@v1"), HuggingFaceHub()), Progress()
try:
    files = fetch(folder, UploadLimits(), progress)
except ServeError as error:
    print(type(error).__name__, error.message)
else:
    print(folder.provenance, files.digest(), progress.num_bytes == progress.total_bytes)
"""


def _run(endpoint: str, cache: Path, **environment: str) -> str:
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_library_itself_with_a_token_then_offline(endpoint: str, tmp_path: Path) -> None:
    digest = fetch(
        HubFolder(parse_locator("hf://org/repo"), FakeHub(tmp_path, dict(FILES))), LIMITS, Progress()
    ).digest()
    fetched = f"hf://org/repo@{COMMIT} {digest} True"
    assert "HF_TOKEN" in _run(endpoint, tmp_path / "hub", HF_TOKEN="hf_wrong")
    assert "does not hold it" in _run(endpoint, tmp_path / "hub", HF_HUB_OFFLINE="1")
    assert _run(endpoint, tmp_path / "hub", HF_TOKEN="hf_secret") == fetched
    assert not any("README" in line for line in _Endpoint.seen)
    assert _run(endpoint, tmp_path / "hub", HF_HUB_OFFLINE="1") == fetched
