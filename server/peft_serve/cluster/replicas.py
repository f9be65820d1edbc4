"""What the front needs of the replicas, whatever carries its calls."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from peft_serve.adapters.records import CheckpointFiles
from peft_serve.cluster.wire import Ask, BaseFacts, Found, Item, Report, Told
from peft_serve.core import AdapterId, FinishReason, RequestId

Homes = Mapping[AdapterId, str]
"""Checkpoints that lie in read-only folders, and the names they have there."""


class ReplicaLost(Exception):  # noqa: N818  named as an outcome
    """The replica that had the call died, or cannot be reached, or ends: another one may have it."""


class Call(Protocol):
    """One request at a replica."""

    def items(self) -> AsyncIterator[Item]:
        """What comes of it. Raises ReplicaLost, QueueFull and Internal."""
        ...

    def cancel(self) -> None:
        """End it, wherever it is; returns at once."""
        ...


class Replicas(Protocol):
    """All replicas of the engine. Everything may raise ReplicaLost where nobody can be asked."""

    def generate(self, ask: Ask, avoided: str | None) -> Call:
        """Give a request to the replica that its adapter's placement says, and to another one than `avoided`."""
        ...

    async def stop(self, replica: str, request: RequestId, reason: FinishReason) -> None:
        """End a request at the replica that has it; its last event still comes."""
        ...

    async def load(self, adapter: AdapterId, homes: Homes) -> None:
        """Bring an adapter to the host of the replica it belongs to."""
        ...

    async def unload(self, adapter: AdapterId) -> None:
        """Have every replica give its memory back."""
        ...

    async def set_pinned(self, adapter: AdapterId, *, pinned: bool) -> None:
        """On every replica."""
        ...

    async def reports(self, front: str, sent_s: float) -> Sequence[Report]:
        """How all are, none where there is none; raises ReplicaLost where one does not answer in time."""
        ...

    async def facts(self) -> BaseFacts:
        """Some replica's, as soon as there is one."""
        ...

    async def all_facts(self) -> Sequence[BaseFacts]:
        """Of all that are there."""
        ...

    async def inspect(self, files: CheckpointFiles) -> Found | Told:
        """What some replica's gate says of a checkpoint."""
        ...
