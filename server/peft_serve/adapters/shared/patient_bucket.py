"""A bucket that may not answer: one act at a time waits for it then, and all others are told at once.

Each act has its own limit of time, but acts come many at once, one behind another's lock. Where each of them waited
for a store that says nothing, the last would be told minutes later, and every thread would be taken meanwhile. Knows
no bucket by its kind.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from peft_serve.adapters.shared.bucket import Bucket, Found

REST_S: Final = 2.0
"""After an act without an answer nobody asks for so long: who stood in line behind it need not wait as it did."""

NO_ANSWER: Final = frozenset({errno.ETIMEDOUT, errno.EHOSTUNREACH})


class PatientBucket:
    """`bucket`, as the protocol says. `clock` gives monotonic seconds."""

    def __init__(self, bucket: Bucket, *, clock: Callable[[], float]) -> None:
        self._bucket = bucket
        self._clock = clock
        self._lock = threading.Lock()
        self._away: OSError | None = None  # what the last act was told that had no answer
        self._rests_until_s = 0.0
        self._is_tried = False  # somebody waits for it, although it was away

    @contextmanager
    def _asked(self) -> Iterator[None]:
        tries = self._begun()
        away: OSError | None = None
        try:
            yield
        except OSError as error:
            away = error if error.errno in NO_ANSWER else None
            raise
        finally:
            with self._lock:
                self._away = away
                if away is not None:
                    self._rests_until_s = self._clock() + REST_S
                if tries:
                    self._is_tried = False

    def _begun(self) -> bool:
        """Whether this act is the one that tries a bucket that was away; raises OSError where it is not to."""
        with self._lock:
            if self._away is None:
                return False
            if self._is_tried or self._clock() < self._rests_until_s:
                raise OSError(self._away.errno, self._away.strerror) from self._away
            self._is_tried = True
            return True

    def get(self, key: str, *, max_bytes: int) -> Found | None:
        with self._asked():
            return self._bucket.get(key, max_bytes=max_bytes)

    def put(self, key: str, content: bytes) -> None:
        with self._asked():
            self._bucket.put(key, content)

    def put_new(self, key: str, content: bytes) -> str | None:
        with self._asked():
            return self._bucket.put_new(key, content)

    def replace(self, key: str, content: bytes, tag: str) -> str | None:
        with self._asked():
            return self._bucket.replace(key, content, tag)

    def tags(self, prefix: str) -> dict[str, str]:
        with self._asked():
            return self._bucket.tags(prefix)

    def remove(self, key: str) -> None:
        with self._asked():
            self._bucket.remove(key)

    def require_room(self, num_bytes: int) -> None:
        with self._asked():
            self._bucket.require_room(num_bytes)

    def tidy(self) -> None:
        with self._asked():
            self._bucket.tidy()
