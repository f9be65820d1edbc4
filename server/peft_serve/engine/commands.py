"""What other threads may ask of the engine: frozen commands, obeyed in the order in which they come."""

from __future__ import annotations

from dataclasses import dataclass

from peft_serve.adapters.primitives import Adapter
from peft_serve.core import AdapterId, FinishReason, Request, RequestId


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    request: RequestId
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Loaded:
    adapter: AdapterId
    outcome: Adapter | Exception


@dataclass(frozen=True, slots=True)
class Load:
    adapter: AdapterId


@dataclass(frozen=True, slots=True)
class Unload:
    adapter: AdapterId


@dataclass(frozen=True, slots=True)
class Pin:
    adapter: AdapterId
    pinned: bool


@dataclass(frozen=True, slots=True)
class GiveUp:
    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    pass


Command = Submit | Cancel | Loaded | Load | Unload | Pin | GiveUp | Stop
