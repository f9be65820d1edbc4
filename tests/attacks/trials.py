"""One hostile upload through the gate and the compiler, judged against the honest checkpoint that it was made of."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, Final

from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.config_schema import OPTIONAL, is_empty
from peft_serve.adapters.gate import Inspected, inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.methods import METHODS
from peft_serve.adapters.primitives import Adapter
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.strict_json import parse_object
from peft_serve.errors import AdapterInvalid, MalformedUpload
from tests.adapters.fake_base import FakeBase
from tests.adapters.same_bits import assert_same_bits
from tests.attacks.hostile import base_of, honest
from tests.attacks.subjects import METHOD_OF, UNCONTRADICTED

LIMITS: Final = GateLimits()
SLOW_S: Final = 0.05


class Outcome(StrEnum):
    """What became of an upload; the last three must not be."""

    REFUSED = "refused"
    SAME = "same"  # let in, and compiled to the very bits of the honest one
    OTHER = "other"  # let in as another adapter, by a field that no tensor can contradict
    ANOTHER_PLAN = "another plan"
    CRASHED = "crashed"
    MUTE = "refused without a place or a reason"


BAD: Final = frozenset({Outcome.ANOTHER_PLAN, Outcome.CRASHED, Outcome.MUTE})


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    outcome: Outcome
    gate_s: float  # time of this thread's own
    detail: str = ""


class Subject:
    """The honest checkpoint of one peft type, and the judge of what is made of it."""

    def __init__(self, peft_type: str, kind: str = "llama") -> None:
        self.peft_type = peft_type
        self._kind = kind
        self.files = honest(METHOD_OF[peft_type], kind)

    @cached_property
    def base(self) -> FakeBase:
        return base_of(self._kind)

    @cached_property
    def adapter(self) -> Adapter:
        return compile_adapter(inspect(self.files, self.base, LIMITS), self.base, LIMITS)

    @cached_property
    def _read(self) -> dict[str, Any]:
        return self._fields_read(self.files.config)

    def judge(self, files: CheckpointFiles) -> Trial:
        """Whatever happens is told, and nothing is raised. One that was slow is judged once more: Python may have
        collected its garbage, and then it is quick."""
        first = self._judged(files)
        return first if first.gate_s < SLOW_S else min(first, self._judged(files), key=lambda trial: trial.gate_s)

    def _judged(self, files: CheckpointFiles) -> Trial:
        started = time.thread_time()
        try:
            inspected = inspect(files, self.base, LIMITS)
        except Exception as error:  # noqa: BLE001 - the judge must hear of all of them
            return Trial(outcome=_refusal(error), gate_s=time.thread_time() - started, detail=_told(error))
        gate_s = time.thread_time() - started
        try:
            return Trial(outcome=self._admitted(files, inspected), gate_s=gate_s)
        except Exception as error:  # noqa: BLE001 - the same
            return Trial(outcome=_refusal(error), gate_s=gate_s, detail=_told(error))

    def _admitted(self, files: CheckpointFiles, inspected: Inspected) -> Outcome:
        adapter = compile_adapter(inspected, self.base, LIMITS)
        try:
            assert_same_bits(replace(adapter, id=self.adapter.id), self.adapter)
        except AssertionError:
            weighs = self.changed_fields(files.config) & UNCONTRADICTED[self.peft_type]
            return Outcome.OTHER if weighs else Outcome.ANOTHER_PLAN
        return Outcome.SAME

    def changed_fields(self, content: bytes) -> frozenset[str]:
        """The fields that decide what is computed and are not the honest ones."""
        read = self._fields_read(content)
        return frozenset(name for name in read.keys() | self._read.keys() if _differs(read, self._read, name))

    def _fields_read(self, content: bytes) -> dict[str, Any]:
        """The fields that decide what is computed, as the file has them."""
        schema = METHODS[self.peft_type].schema
        known = schema.required.keys() | schema.optional.keys() | {"modules_to_save", "task_type"}
        known -= OPTIONAL.keys() - {"modules_to_save", "task_type"}
        fields = parse_object(content, name="config", max_bytes=LIMITS.max_config_bytes)
        return {name: value for name, value in fields.items() if name in known and not is_empty(value)}


def _differs(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    return repr(one.get(name)) != repr(other.get(name))


def _refusal(error: Exception) -> Outcome:
    if isinstance(error, MalformedUpload):
        return Outcome.REFUSED if error.message else Outcome.MUTE
    if isinstance(error, AdapterInvalid):
        is_told = bool(error.errors) and all(e.path and e.reason for e in error.errors)
        return Outcome.REFUSED if is_told else Outcome.MUTE
    return Outcome.CRASHED


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]
