"""Keys and their file: what is read, what is refused, and what a change of the file does."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_serve.api.app import create_app
from peft_serve.api.key_file import MAX_FILE_BYTES, NO_KEYS, KeyFileInvalid, hash_of, read_keys
from peft_serve.api.key_watch import watched_keys
from peft_serve.api.keyring import Keyring, Mark, open_keyring
from peft_serve.api.principal import ANYONE, Quota, Reach, Scope
from peft_serve.config import Settings
from tests.api.api_fakes import make_world
from tests.api.keyed import entry, token, write_keys

SECRET = "psk_" + "s" * 43


def test_a_file_says_who_may_do_what() -> None:
    content = f"""
tenants:
  acme: {{weight: 2, requests_per_s: 1.5, burst: 4, tokens_per_min: 600, max_adapters: 3, max_bytes: 1000}}
keys:
  - {{tenant: acme, key: "sha256:{hash_of("one").hex()}", scopes: [infer, upload], adapters: ["a-*", b], base: false}}
  - tenant: other
    key: sha256:{hash_of("two").hex()}
    scopes: [admin]
    note: of the night shift
"""
    found = read_keys(content.encode())
    one, two = found[hash_of("one")], found[hash_of("two")]
    assert one.tenant.name == "acme"
    assert one.tenant.weight == 2
    assert one.tenant.quota == Quota(requests_per_s=1.5, burst=4, tokens_per_min=600, max_adapters=3, max_bytes=1000)
    assert one.scopes == {Scope.INFER, Scope.UPLOAD}
    assert [one.sees(name) for name in ("a-x", "a-", "b", "bb", "A-x", "a", "")] == [1, 1, 1, 0, 0, 0, 0]
    assert not one.may_ask_base
    assert (two.tenant.weight, two.tenant.quota, two.scopes) == (1.0, Quota(), {Scope.ADMIN})
    assert two.may_ask_base
    assert not two.sees("a-x")
    assert not two.is_operator


def test_a_reach_of_everything_is_known_for_one() -> None:
    assert Reach.of(["*"]).is_everything
    assert Reach.of(["*"]).covers("anything")
    assert not Reach.of(["a*"]).is_everything
    assert not Reach().covers("")
    assert ANYONE.is_operator
    one = Reach.of(["a-*", "x"])
    assert not one.is_everything


def key(**more: Any) -> dict[str, Any]:
    return {"tenant": "a", "key": f"sha256:{'0' * 64}", "scopes": ["infer"], **more}


BROKEN: dict[str, Any] = {
    "no yaml": "keys: [",
    "not utf-8": b"\xff\xfe\x00keys",
    "nothing": b"",
    "a comment": "# the keys of before were here",
    "null": "null",
    "no keys": {},
    "cut off behind the tenants": {"tenants": {"a": {}}},
    "cut off behind the name": "keys:",
    "a list": [1],
    "a word": SECRET,
    "unknown part": {"key": []},
    "keys no list": {"keys": {"a": 1}},
    "unknown field": {"keys": [key(scope="infer")]},
    "no scope": {"keys": [key(scopes=[])]},
    "other scope": {"keys": [key(scopes=["root"])]},
    "a token for its hash": {"keys": [key(key=SECRET)]},
    "a token as a field": {"keys": [key(**{SECRET: 1})]},
    "no name of a tenant": {"tenants": {"a b": {}}, "keys": []},
    "short hash": {"keys": [key(key="sha256:00")]},
    "upper case": {"keys": [key(key=f"sha256:{'A' * 64}")]},
    "twice": {"keys": [key(), key(tenant="b")]},
    "tenant": {"keys": [key(tenant="a b")]},
    "tenant too": {"keys": [key(tenant="")]},
    "pattern": {"keys": [key(adapters=["a*b"])]},
    "pattern too": {"keys": [key(adapters=["*a"])]},
    "path": {"keys": [key(adapters=["../x"])]},
    "adapters no list": {"keys": [key(adapters="*")]},
    "weight": {"tenants": {"a": {"weight": 0}}, "keys": [key()]},
    "weight too": {"tenants": {"a": {"weight": float("nan")}}, "keys": [key()]},
    "rate": {"tenants": {"a": {"requests_per_s": -1}}, "keys": [key()]},
    "bytes": {"tenants": {"a": {"max_bytes": -1}}, "keys": [key()]},
    "burst alone": {"tenants": {"a": {"burst": 1}}, "keys": [key()]},
    "said twice": "keys: []\nkeys: []",
    "alias": "keys: &a []\ntenants: {x: *a}",
    "deep": "[" * 1_500,
    "list as a name": "? [a]\n: b",
    "tag": "!!python/object/apply:os.system [id]",
    "long": b"#" * (MAX_FILE_BYTES + 1),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_refused_and_quoted_nowhere(what: str) -> None:
    given = BROKEN[what]
    content = given if isinstance(given, bytes) else given if isinstance(given, str) else yaml.safe_dump(given)
    with pytest.raises(KeyFileInvalid) as caught:
        read_keys(content.encode() if isinstance(content, str) else content)
    assert "sss" not in str(caught.value)
    assert 0 < len(str(caught.value)) < 500


def test_a_token_in_the_place_of_a_tenant_is_noted_and_not_quoted() -> None:
    notes: list[str] = []
    assert read_keys(yaml.safe_dump({"tenants": {SECRET: {}}, "keys": []}).encode(), note=notes.append) == {}
    assert notes[0] == NO_KEYS
    assert len(notes) == 2
    assert SECRET not in notes[1]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty; it has to say `keys:`"),
        (b"[]", "is a list; it has to be a mapping with `keys:`"),
        (b"5", "is one value; it has to be a mapping"),
        (b"tenants: {}", "has no `keys:`; list the keys below it"),
    ],
)
def test_a_file_without_keys_is_told_what_it_has_to_be(content: bytes, told: str) -> None:
    with pytest.raises(KeyFileInvalid) as caught:
        read_keys(content)
    assert told in str(caught.value)
    assert "KeyFile" not in str(caught.value)


@pytest.mark.parametrize(("own", "told"), [(None, NO_KEYS), (token("own"), f"{NO_KEYS} but that of --api-key")])
def test_every_key_is_withdrawn_by_saying_so_only(own: str | None, told: str, caplog: pytest.LogCaptureFixture) -> None:
    disk = OtherDisk(listed("a"))
    ring = Keyring(own, path=Path("keys.yaml"), files=disk)
    read: list[bool] = []
    ring.on_read = read.append
    for disk.content in (b"", b"tenants: {}\n"):
        disk.stamp += 1
        assert not ring.renew()
        assert ring.find(token("a")) is not None
    assert not any(read)
    assert len(read) == 2
    assert caplog.text.count("the keys of before go on") == 2
    disk.content, disk.stamp = b"keys: []", 9
    assert ring.renew()
    assert ring.find(token("a")) is None
    warned = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert warned == [f"--api-keys-file keys.yaml: {told}"]


def test_withdrawing_a_tenants_last_key_withdraws_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_keys(tmp_path / "keys.yaml", [entry("a"), entry("b", "other")], tenants={"other": {"weight": 2}})
    ring = Keyring(path=path)
    assert ring.find(token("b")) is not None
    write_keys(path, [entry("a")], tenants={"other": {"weight": 2}})
    assert ring.renew(is_forced=True)
    assert ring.find(token("b")) is None
    assert ring.find(token("a")) is not None
    assert "tenants.other: no key is this tenant's" in caplog.text


def test_it_is_named_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    for make, reason in (
        (lambda: path.write_text("keys: ["), "is not YAML"),
        (lambda: path.write_text("keys: [{}]"), "keys.0.tenant"),
        (lambda: path.write_text(""), "is empty"),
        (path.unlink, "cannot be read"),
    ):
        make()
        with pytest.raises(ValueError, match=reason):
            open_keyring(Settings(api_keys_file=path))
    with pytest.raises(ValueError, match="is empty"):
        open_keyring(Settings(api_key=" "))  # type: ignore[arg-type]


def test_a_key_is_found_by_the_whole_of_it(tmp_path: Path) -> None:
    ring = Keyring(token("own"), write_keys(tmp_path / "keys.yaml", [entry("a"), entry("b", "other")]))
    found = [ring.find(token(name)) for name in ("own", "a", "b", "c")]
    assert [None if each is None else each.tenant.name for each in found] == ["operator", "acme", "other", None]
    assert ring.find(token("a")[:-1]) is None
    assert ring.find("") is None
    assert ring.find(hash_of(token("a")).hex()) is None, "the hash of a key is no key"


def test_a_guessable_key_is_warned_of_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    Keyring("hunter2")
    assert "can be guessed" in caplog.text
    assert "hunter2" not in caplog.text


def test_a_file_that_others_can_read_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_keys(tmp_path / "keys.yaml", [entry("a")])
    ring = Keyring(path=path)
    assert not caplog.records
    path.chmod(0o644)
    ring.renew(is_forced=True)
    ring.renew(is_forced=True)
    assert caplog.text.count("everybody on this machine can read it") == 1


class OtherDisk:
    """A disk whose clock and troubles the test sets."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.stamp = 1
        self.error: OSError | None = None
        self.num_reads = 0

    def read(self, path: Path) -> bytes:
        self.num_reads += 1
        if self.error is not None:
            raise self.error
        return self.content

    def look(self, path: Path) -> Mark:
        return Mark(changed_ns=self.stamp, num_bytes=7, inode=7, is_private=True)


def listed(*names: str) -> bytes:
    return yaml.safe_dump({"keys": [entry(name) for name in names]}).encode()


def test_the_file_is_read_when_it_has_changed(caplog: pytest.LogCaptureFixture) -> None:
    disk, told = OtherDisk(listed("a")), list[bool]()
    ring = Keyring(path=Path("keys.yaml"), files=disk)
    ring.on_read = told.append

    def known() -> str:
        return "".join(name for name in "abc" if ring.find(token(name)) is not None)

    assert (ring.renew(), disk.num_reads, known()) == (False, 1, "a")
    disk.content, disk.stamp = listed("b"), 2
    assert (ring.renew(), disk.num_reads, known()) == (True, 2, "b")
    disk.content, disk.stamp = b"keys: [", 3
    assert [ring.renew() for _ in range(3)] == [False, False, False]
    assert (disk.num_reads, known(), told) == (3, "b", [True, False]), "the keys of before go on; it is told of once"
    assert caplog.text.count("the keys of before go on") == 1
    disk.error, disk.stamp = PermissionError(13, "Permission denied"), 4
    assert [ring.renew() for _ in range(3)] == [False, False, False]
    assert caplog.text.count("cannot be read") == 1
    disk.error = None
    disk.content = listed("c")
    assert (ring.renew(), known(), told[-1]) == (True, "c", True), "the right to read leaves no mark on the file"
    disk.content = listed()
    assert ring.renew(is_forced=True)
    assert known() == ""
    assert not ring.is_open, "a file of no keys lets nobody in"


async def test_the_watch_sees_a_change_and_a_signal(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys.yaml", [entry("a")])
    ring = Keyring(path=path)
    before = signal.getsignal(signal.SIGHUP)
    async with watched_keys(ring, every_s=0.01):
        write_keys(path, [entry("a"), entry("b")])
        await until(lambda: ring.find(token("b")) is not None)
    assert signal.getsignal(signal.SIGHUP) == before
    if threading.current_thread() is threading.main_thread():
        async with watched_keys(ring, every_s=3600):
            write_keys(path, [entry("c")])
            await asyncio.sleep(0.02)
            assert ring.find(token("c")) is None
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: ring.find(token("c")) is not None)


async def until(is_so: Any) -> None:
    deadline = time.monotonic() + 5
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.01)


async def test_the_application_watches_its_file(tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys.yaml", [entry("a")])
    world = make_world(tiny_tokenizer, tmp_path)
    ring = Keyring(path=path)
    app = create_app(world.parts, keyring=ring)
    async with app.router.lifespan_context(app):
        write_keys(path, [entry("b")])
        await until(lambda: ring.find(token("b")) is not None)
        assert "peft_serve_api_keys_file_ok 1.0" in world.parts.metrics.render().decode()
        path.write_text("")
        await until(lambda: "peft_serve_api_keys_file_ok 0.0" in world.parts.metrics.render().decode())
        assert ring.find(token("b")) is not None, "an empty file is a broken one"
