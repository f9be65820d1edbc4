"""The gate as the front has it: some replica is asked, as it has the base. Blocks; for every thread but the loop's."""

from __future__ import annotations

import asyncio
from typing import Final

from peft_serve.adapters.records import CheckpointFiles
from peft_serve.cluster.replicas import ReplicaLost, Replicas
from peft_serve.cluster.wire import Found, Told, heard
from peft_serve.core import AdapterId
from peft_serve.errors import Unavailable

_RETRY_S: Final = 1.0
_NUM_ATTEMPTS: Final = 2


class RemoteGate:
    """An `adapters.findings.Gate`. What a replica made of an upload stays in its cache, of the bytes that it may have:
    there is nothing to settle."""

    def __init__(self, replicas: Replicas, loop: asyncio.AbstractEventLoop) -> None:
        self._replicas = replicas
        self._loop = loop

    def check(self, files: CheckpointFiles) -> Found:
        """Raises what the gate does, and Unavailable where no replica answers."""
        for _ in range(_NUM_ATTEMPTS):
            asked = asyncio.run_coroutine_threadsafe(self._replicas.inspect(files), self._loop)
            try:
                found = asked.result()
            except ReplicaLost:
                continue
            if isinstance(found, Told):
                raise heard(found)
            return found
        raise Unavailable("no replica can check an adapter now; try again shortly", retry_after_s=_RETRY_S)

    def draft(self, files: CheckpointFiles) -> Found:
        """As `check`."""
        return self.check(files)

    def settle(self, adapter: AdapterId, *, is_named: bool) -> None:
        """Nothing was kept for it."""
