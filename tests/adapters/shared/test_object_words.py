"""What an operator is told of an object store that says no, or nothing: from a server that answers as it is told."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_serve.adapters.shared.bucket import Bucket
from peft_serve.adapters.shared.object_bucket import ObjectBucket, open_objects
from peft_serve.adapters.shared.object_words import ObjectStoreError
from peft_serve.config import Settings
from peft_serve.engine.adapter_places import open_store
from peft_serve.errors import Unavailable
from tests.adapters.shared.object_services import Service, environment

URL = "s3://models/adapters"
CASES = [
    (404, "NoSuchBucket", errno.EIO, "there is no such bucket", "make the bucket"),
    (403, "SignatureDoesNotMatch", errno.EACCES, "credentials are refused", "AWS_SECRET_ACCESS_KEY"),
    (403, "InvalidAccessKeyId", errno.EACCES, "credentials are refused", "AWS_ACCESS_KEY_ID"),
    (400, "ExpiredToken", errno.EACCES, "credentials have expired", "AWS_SESSION_TOKEN"),
    (403, "AccessDenied", errno.EACCES, "may not do that", "s3:ListBucket"),
    (403, "", errno.EACCES, "may not do that", "s3:GetObject"),
    (400, "AuthorizationHeaderMalformed", errno.EIO, "in another region (400 ", "AWS_REGION"),
    (301, "PermanentRedirect", errno.EIO, "in another region", "AWS_REGION"),
    (503, "SlowDown", errno.EIO, "overloaded", "try again"),
    (500, "InternalError", errno.EIO, "has failed (500 InternalError)", "try again"),
    (418, "", errno.EIO, "not answer as an object store does (418", "AWS_ENDPOINT"),
]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment("http://127.0.0.1:9").items():
        monkeypatch.setenv(name, value)


def acts(bucket: Bucket) -> Iterator[ObjectStoreError]:
    """What each act raises."""
    for act in (
        lambda: bucket.tags("marks/"),
        lambda: bucket.get("names/a.json", max_bytes=9),
        lambda: bucket.put("marks/a.json", b"1"),
        lambda: bucket.put_new("names/a.json", b"1"),
        lambda: bucket.replace("names/a.json", b"1", '"1"'),
        lambda: bucket.remove("names/a.json"),
    ):
        with pytest.raises(ObjectStoreError) as raised:
            act()
        yield raised.value


@pytest.mark.parametrize(("status", "code", "number", "what", "way_out"), CASES, ids=lambda each: str(each)[:28])
def test_what_the_service_answers(
    service: Service, monkeypatch: pytest.MonkeyPatch, status: int, code: str, number: int, what: str, way_out: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT", service.address)
    service.says(status, code)
    for told in acts(ObjectBucket.at(URL)):
        assert (told.errno, what in told.strerror, way_out in told.way_out) == (number, True, True), told
        assert not any(secret in told.strerror for secret in ("127.0.0.1", "secret", "hush", "adapters"))
    with pytest.raises(Unavailable) as refused:
        open_store(Settings(store=URL), Path("unused"))
    message = refused.value.message
    assert message.startswith(f"--store {URL}: ")
    assert what in message
    assert way_out in message
    assert len(message) < 240
    assert not any(secret in message for secret in ("127.0.0.1", "secret", "hush", "Generic"))


def test_the_region_of_the_bucket_is_told(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT", service.address)
    service.says(400, "AuthorizationHeaderMalformed")
    with pytest.raises(Unavailable, match="eu-west-7"):
        open_store(Settings(store=URL), Path("unused"))


@pytest.mark.parametrize(
    ("endpoint", "what"),
    [("http://127.0.0.1:9", "nothing listens"), ("http://no-such-host.invalid", "name of .* host is not known")],
)
def test_an_endpoint_that_is_none(monkeypatch: pytest.MonkeyPatch, endpoint: str, what: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT", endpoint)
    with pytest.raises(Unavailable, match=rf"--store {URL}: .*{what}.*AWS_ENDPOINT") as refused:
        open_store(Settings(store=URL), Path("unused"))
    assert endpoint not in refused.value.message


def test_an_address_that_the_library_would_fall_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT", "minio:9000")
    with pytest.raises(ValueError, match=r"AWS_ENDPOINT: .* http://"):
        open_objects(URL)
    monkeypatch.setenv("AWS_ENDPOINT", "http://minio:9000")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "false")
    with pytest.raises(ValueError, match="AWS_ALLOW_HTTP=true"):
        open_objects(URL)


def test_a_store_that_takes_connections_and_says_nothing_does_not_hold_up_a_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=50) as silent:
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began_s = time.monotonic()
        with pytest.raises(Unavailable, match=r"does not answer; .*AWS_ENDPOINT"):
            open_store(Settings(store=URL), Path("unused"))
        assert time.monotonic() - began_s < 9, "no more than one request was waited for, and not tried again"
