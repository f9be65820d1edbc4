"""The keys a server knows: from its settings at start, from their file again whenever that has changed.

A file that is broken when it is read again changes nothing: the keys of before go on, the log and a metric say why.
Tokens are compared by their hashes: the table is searched by the hash, whose bits no caller chooses, and what is found
(or a key that nobody has) is compared in constant time. Any thread may read; one at a time renews.
"""

from __future__ import annotations

import hmac
import logging
import stat
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from peft_serve.api.key_file import NO_KEYS, KeyFileInvalid, hash_of, read_keys
from peft_serve.api.principal import Principal, Reach, Scope, Tenant
from peft_serve.config import Settings

ENV_TENANT: Final = "operator"
"""Whose the one key of --api-key is."""
MIN_TOKEN_CHARS: Final = 16
_NO_KEY: Final[tuple[bytes, Principal | None]] = (bytes(32), None)
_Table = Mapping[bytes, tuple[bytes, Principal | None]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What tells one content of a file from another, and whether it is kept from the machine's other users."""

    changed_ns: int
    num_bytes: int
    inode: int
    is_private: bool


class Files(Protocol):
    """What a keyring asks of a disk."""

    def read(self, path: Path) -> bytes: ...

    def look(self, path: Path) -> Mark: ...


class Disk:
    """The machine's own."""

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def look(self, path: Path) -> Mark:
        found = path.stat()
        is_private = not stat.S_IMODE(found.st_mode) & stat.S_IRWXO
        return Mark(changed_ns=found.st_mtime_ns, num_bytes=found.st_size, inode=found.st_ino, is_private=is_private)


class Keyring:
    """`token` is one key with every scope; `path` the file of the others. Without either the server is open.

    Raises KeyFileInvalid and OSError when it is made; later `on_read` is told whether the file was good.
    """

    def __init__(
        self,
        token: str | None = None,
        path: Path | None = None,
        *,
        files: Files | None = None,
    ) -> None:
        self._own = {} if token is None else {hash_of(token): _operator()}
        self._path = path
        self._files = files or Disk()
        self.on_read: Callable[[bool], None] = lambda _: None
        self._lock = threading.Lock()
        self._has_warned = False
        self._problem = ""
        self._mark: Mark | None = None
        self._table: _Table = {known: (known, principal) for known, principal in self._own.items()}
        if token is not None and len(token) < MIN_TOKEN_CHARS:
            _log.warning("--api-key: %d characters can be guessed; `peft-serve keys new` makes a good one", len(token))
        if path is not None:
            self._mark = self._look(path)
            self._table = self._read(path)

    @property
    def is_open(self) -> bool:
        """Whether everybody may do everything: no key was ever asked for."""
        return self._path is None and not self._own

    @property
    def path(self) -> Path | None:
        return self._path

    def __len__(self) -> int:
        return len(self._table)

    def find(self, token: str) -> Principal | None:
        """Whose token this is."""
        wanted = hash_of(token)
        known, principal = self._table.get(wanted, _NO_KEY)
        return principal if hmac.compare_digest(known, wanted) else None

    def renew(self, *, is_forced: bool = False) -> bool:
        """Read the file again if it has changed, or if `is_forced`; gives whether that went well. Reads the disk."""
        if self._path is None:
            return False
        with self._lock:
            try:
                mark = self._look(self._path)
                if mark == self._mark and not is_forced:
                    return False
                self._mark = mark  # a broken file is read again when it changes
                self._table = self._read(self._path)
            except KeyFileInvalid as error:
                return self._failed(str(error), is_forced=is_forced)
            except OSError as error:
                self._mark = None  # a right that is given back leaves no mark on the file: try again each time
                return self._failed(f"cannot be read ({error.strerror})", is_forced=is_forced)
            self._problem = ""
        self.on_read(True)
        _log.info("--api-keys-file %s: read, %d keys", self._path, len(self._table))
        return True

    def _failed(self, problem: str, *, is_forced: bool) -> bool:
        if problem != self._problem or is_forced:
            _log.error("--api-keys-file %s: %s; the keys of before go on", self._path, problem)
        self._problem = problem
        self.on_read(False)
        return False

    def _read(self, path: Path) -> _Table:
        def note(what: str) -> None:
            own = " but that of --api-key" if what == NO_KEYS and self._own else ""
            _log.warning("--api-keys-file %s: %s%s", path, what, own)

        found = {**read_keys(self._files.read(path), note=note), **self._own}
        return {known: (known, principal) for known, principal in found.items()}

    def _look(self, path: Path) -> Mark:
        found = self._files.look(path)
        if not found.is_private and not self._has_warned:
            self._has_warned = True
            _log.warning("--api-keys-file %s: everybody on this machine can read it; chmod 600 it", path)
        return found


def open_keyring(settings: Settings) -> Keyring:
    """The keys that the settings name. Raises ValueError."""
    token = None if settings.api_key is None else settings.api_key.get_secret_value()
    if token is not None and not token.strip():
        raise ValueError("--api-key: is empty; leave it out, or give a key (`peft-serve keys new` makes one)")
    try:
        return Keyring(token, settings.api_keys_file)
    except KeyFileInvalid as error:
        raise ValueError(f"--api-keys-file {settings.api_keys_file}: {error}") from None
    except OSError as error:
        raise ValueError(f"--api-keys-file {settings.api_keys_file}: cannot be read ({error.strerror})") from None


def _operator() -> Principal:
    return Principal(tenant=Tenant(name=ENV_TENANT), scopes=frozenset(Scope), reach=Reach.of(["*"]))
