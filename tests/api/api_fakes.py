"""A server's inside without a model: an engine whose every token depends on adapter, prompt and seed."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peft_serve.adapters.catalog import Catalog
from peft_serve.adapters.combined import parts_of
from peft_serve.adapters.filesystem import DiskFileSystem
from peft_serve.adapters.folders import CheckpointFolders
from peft_serve.adapters.profile import parse_profile
from peft_serve.adapters.records import CheckpointFiles, HeadFacts, Profile, Summary
from peft_serve.adapters.store import AdapterStore
from peft_serve.adapters.vocabulary import Vocabulary
from peft_serve.config import Settings
from peft_serve.core import (
    BASE,
    AdapterId,
    BeamsEvent,
    Continuation,
    Event,
    FinishEvent,
    FinishReason,
    PromptEvent,
    Reading,
    ReadingEvent,
    Request,
    RequestId,
    ScoresEvent,
    TokenEvent,
)
from peft_serve.engine.parts import BaseCard, ServerParts
from peft_serve.engine.snapshot import EngineSnapshot, EngineState
from peft_serve.errors import AdapterInvalid, QueueFull, Refusal, Unavailable
from peft_serve.metrics import Metrics
from peft_serve.scheduling.slots import Resident
from peft_serve.text import TextCodec

BASE_NAME = "tiny-base"
EOS = 1
MAX_CONTEXT = 512
HIDDEN = 6
LETTERS = "abcdefghijklmnop "


def digest_int(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


@dataclass
class Live:
    request: Request
    left: list[int]
    index: int = 0


def obedient(request: Request) -> list[int]:
    """A random walk through what the request's answer may look like, up to its end or its length."""
    assert request.constraint is not None
    matcher, ids = request.constraint.start(), list[int]()
    for i in range(request.sampling.max_new_tokens):
        mask = matcher.mask()
        allowed = [id_ for id_ in range(len(mask) * 8) if mask[id_ // 8] >> (id_ % 8) & 1]
        ends = [id_ for id_ in allowed if id_ in request.eos_ids]
        ids.append(ends[0] if ends else allowed[digest_int(request.prompt, request.sampling.seed, i) % len(allowed)])
        if ends:
            break
        matcher.accept(ids[-1])
    return ids


class FakeEngine:
    """Runs on its own thread, one token of every live request a step, as the real one does."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._deliver: Callable[[Sequence[Event]], None] = lambda _: None
        self._live: dict[RequestId, Live] = {}
        self._ends: list[FinishEvent] = []
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._is_stopped = False
        self.state = EngineState.RUNNING
        self.stalled_s = 0.0
        self.step_s = 0.0
        self.held = False  # plan nothing
        self.max_queue = 10_000
        self.fails: dict[AdapterId, Exception] = {}
        self.fails_after: dict[AdapterId, Exception] = {}  # after two tokens
        self.says: dict[str, str] = {}  # what is answered to a prompt, instead of letters
        self.seen: list[Request] = []
        self.cancelled: list[tuple[RequestId, FinishReason]] = []
        self.commands: list[tuple[str, AdapterId]] = []
        self.resident: dict[AdapterId, bool] = {}
        self.num_labels: dict[AdapterId, int] = {}  # of the heads, by the adapter that brings them; BASE: its own
        self.reads: Callable[[Request], Sequence[Sequence[float]]] = self._read

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._news:
            self._is_stopped = True
            self._news.notify()
        self._thread.join(5)

    @property
    def num_live(self) -> int:
        with self._news:
            return len(self._live)

    def connect(self, deliver: Callable[[Sequence[Event]], None]) -> None:
        self._deliver = deliver

    def submit(self, request: Request) -> None:
        if self.state is not EngineState.RUNNING:
            raise Unavailable(f"the engine is {self.state.value}", retry_after_s=2.0)
        with self._news:
            if len(self._live) >= self.max_queue:
                raise QueueFull("the queue is full; come back later", retry_after_s=3.0)
            self.seen.append(request)
            self._live[request.id] = Live(request, self._answer(request))
            self._news.notify()

    def cancel(self, request: RequestId, reason: FinishReason) -> None:
        with self._news:
            self.cancelled.append((request, reason))
            live = self._live.pop(request, None)
            if live is not None:
                self._ends.append(FinishEvent(request=request, reason=reason))
            self._news.notify()

    def load(self, adapter: AdapterId) -> None:
        self.commands.append(("load", adapter))
        self.resident.setdefault(adapter, False)

    def unload(self, adapter: AdapterId) -> None:
        self.commands.append(("unload", adapter))
        self.resident.pop(adapter, None)

    def set_pinned(self, adapter: AdapterId, *, pinned: bool) -> None:
        self.commands.append(("pin" if pinned else "unpin", adapter))
        if adapter in self.resident:
            self.resident[adapter] = pinned

    def snapshot(self) -> EngineSnapshot:
        resident = [
            Resident(adapter=a, slot=i + 1, num_bytes=10, num_leases=0, is_pinned=p)
            for i, (a, p) in enumerate(self.resident.items())
        ]
        return EngineSnapshot(
            state=self.state,
            resident=tuple(resident),
            pinned=frozenset(each.adapter for each in resident if each.is_pinned),
            stalled_s=self.stalled_s,
            num_slots=8,
            block_size=16,
            num_blocks=99,
            num_running=len(self._live),
        )

    def _answer(self, request: Request) -> list[int]:
        if request.constraint is not None:
            return obedient(request)
        said = self.says.get(self._codec.decode(request.prompt))
        if said is not None:
            ids = list(self._codec.encode(said))
        else:
            sampling = request.sampling
            seed = sampling.seed if sampling.do_sample else None
            draws = [digest_int(request.adapter, request.prompt, seed, i) for i in range(5 + sampling.min_new_tokens)]
            ids = list(self._codec.encode("".join(LETTERS[d % len(LETTERS)] for d in draws)))
        if request.sampling.ignore_eos:
            return (ids * request.sampling.max_new_tokens)[: request.sampling.max_new_tokens]
        return [*ids, EOS]

    def _main(self) -> None:
        while True:
            with self._news:
                while not self._is_stopped and not self._ends and (self.held or not self._live):
                    self._news.wait(0.02)
                if self._is_stopped:
                    return
                events: list[Event] = [*self._ends]
                self._ends.clear()
                for live in [] if self.held else list(self._live.values()):
                    events += self._advance(live)
            self._deliver(events)
            if self.step_s:
                time.sleep(self.step_s)

    def _advance(self, live: Live) -> list[Event]:
        request = live.request
        error = self.fails.get(request.adapter)
        if error is None and live.index == 2:
            error = self.fails_after.get(request.adapter)
        if error is not None:
            return [self._finish(live, FinishReason.FAILED, error)]
        if request.reading is not None:
            rows = tuple(tuple(row) for row in self.reads(request))
            return [ReadingEvent(request=request.id, rows=rows), self._finish(live, FinishReason.READ)]
        if request.choices:
            token_logprobs = tuple(
                tuple(
                    -(digest_int(request.adapter, request.prompt, id_, j) % 300 + 1) / 100 for j, id_ in enumerate(ids)
                )
                for ids in request.choices
            )
            scores = ScoresEvent(
                request=request.id, logprobs=tuple(map(sum, token_logprobs)), token_logprobs=token_logprobs
            )
            return [scores, self._finish(live, FinishReason.EOS)]
        sampling = request.sampling
        told: list[Event] = []
        if request.prompt_logprobs is not None and live.index == 0:
            told = [self._prompt(request, request.prompt_logprobs)]
        if sampling.max_new_tokens == 0:
            return [*told, self._finish(live, FinishReason.LENGTH)]
        if sampling.num_beams > 1:
            found = BeamsEvent(request=request.id, continuations=self._beams(request, live.left))
            return [*told, found, self._finish(live, FinishReason.EOS)]
        token = live.left.pop(0)
        logprob = -0.25 if sampling.logprobs else None
        top = tuple((token + k, -0.25 - k) for k in range(sampling.num_top_logprobs))
        events: list[Event] = [
            *told,
            TokenEvent(request=request.id, index=live.index, token=token, logprob=logprob, top=top),
        ]
        live.index += 1
        if token in request.eos_ids:
            events.append(self._finish(live, FinishReason.EOS))
        elif live.index == sampling.max_new_tokens or not live.left:
            events.append(self._finish(live, FinishReason.LENGTH))
        return events

    def _prompt(self, request: Request, count: int) -> PromptEvent:
        ids = (request.decoder_prompt or request.prompt)[1:]
        return PromptEvent(
            request=request.id,
            logprobs=tuple(-1.0 - i for i in range(len(ids))),
            tops=tuple(tuple((id_ + k, -1.0 - i - k) for k in range(count)) for i, id_ in enumerate(ids)),
        )

    def _beams(self, request: Request, ids: list[int]) -> tuple[Continuation, ...]:
        """Of falling scores, each begun a token later."""
        return tuple(
            Continuation(
                tokens=tuple(ids[i:]),
                score=-0.5 - i,
                logprobs=(-0.25,) * len(ids[i:]),
                tops=((),) * len(ids[i:]),
                is_ended=True,
            )
            for i in range(request.sampling.num_sequences)
        )

    def _read(self, request: Request) -> list[list[float]]:
        """As many rows, and as wide, as the real engine reads; every value depends on adapter, prompt and place."""
        num_rows, width = 1, HIDDEN
        if request.reading in (Reading.TOKENS, Reading.SPANS):
            num_rows = len(request.prompt)
        if request.reading is Reading.SPANS:
            width = 2
        elif request.reading in (Reading.SEQUENCE, Reading.TOKENS):
            ids = [BASE] if request.adapter == BASE else [part.id for part in parts_of(request.adapter)]
            width = next(self.num_labels[id_] for id_ in (*ids, BASE) if id_ in self.num_labels)
        seen = (request.adapter, request.prompt, request.segments, request.reading)
        return [[digest_int(seen, i, j) % 1000 / 250 - 2 for j in range(width)] for i in range(num_rows)]

    def _finish(self, live: Live, reason: FinishReason, error: Exception | None = None) -> FinishEvent:
        del self._live[live.request.id]
        return FinishEvent(
            request=live.request.id,
            reason=reason,
            error=error,
            queue_s=0.001,
            num_prompt_tokens=len(live.request.prompt),
            num_output_tokens=live.index,
        )


@dataclass(frozen=True, kw_only=True)
class FakeInspected:
    id: AdapterId
    summary: Summary
    profile: Profile
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    cues: tuple[int, ...] = ()


def fake_gate(files: CheckpointFiles) -> FakeInspected:
    """Accepts any weights; a config that says `bad` is refused in its words."""
    config = json.loads(files.config)
    head = config.get("head")
    if "bad" in config:
        raise AdapterInvalid([Refusal("q_proj.lora_A", config["bad"]), Refusal("q_proj.lora_B", "has a twin")])
    return FakeInspected(
        id=files.digest(),
        summary=Summary(
            peft_type=config.get("peft_type", "LORA"),
            task_type="CAUSAL_LM",
            base=None,
            rank=8,
            num_bytes=files.num_bytes,
            num_tensors=4,
            num_sites=2,
            modules=("q_proj", "v_proj"),
            num_virtual_tokens=config.get("num_virtual_tokens", 0),
            head=None if head is None else HeadFacts(*head),
            num_tasks=config.get("num_tasks", 1),
            ignores_segments=config.get("ignores_segments", False),
        ),
        profile=Profile() if files.profile is None else parse_profile(files.profile),
        cues=tuple(config.get("cues", ())),
    )


def checkpoint(text: str = "one", *, profile: dict[str, Any] | None = None, **config: Any) -> dict[str, bytes]:
    """The files of an adapter; `text` makes its weights differ from others'."""
    files = {
        "adapter_config.json": json.dumps({"peft_type": "LORA", **config}).encode(),
        "adapter_model.safetensors": b"\x10" + text.encode(),
    }
    if profile is not None:
        files["peft_serve.json"] = json.dumps(profile).encode()
    return files


def zipped(files: dict[str, bytes], *, folder: str = "") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(folder + name, content)
    return buffer.getvalue()


def checkpoint_files(files: dict[str, bytes]) -> CheckpointFiles:
    return CheckpointFiles(
        config=files["adapter_config.json"],
        weights=files["adapter_model.safetensors"],
        profile=files.get("peft_serve.json"),
    )


@dataclass
class World:
    """One server's inside, and handles on its fakes."""

    parts: ServerParts
    engine: FakeEngine
    catalog: Catalog
    adapters: dict[str, AdapterId] = field(default_factory=dict)

    def publish(self, name: str, files: dict[str, bytes]) -> AdapterId:
        published = self.catalog.changes.publish(name, checkpoint_files(files))
        self.adapters[name] = published.version.id
        head = None if published.version.summary is None else published.version.summary.head
        if head is not None:
            self.engine.num_labels[published.version.id] = head.num_labels
        return published.version.id

    @property
    def num_held(self) -> int:
        return sum(self.catalog.in_flight(adapter) for adapter in self.adapters.values())


def make_world(
    tokenizer: Any,
    root: Path,
    *,
    is_encoder_decoder: bool = False,
    folders: Sequence[Path] = (),
    card: Mapping[str, Any] = MappingProxyType({}),
    **settings: Any,
) -> World:
    """`card` changes what the base is; `settings` are the server's."""
    codec = TextCodec(tokenizer, is_encoder_decoder=is_encoder_decoder)
    engine = FakeEngine(codec)
    fs = DiskFileSystem()
    catalog = Catalog(
        AdapterStore(root / "store", fs),
        CheckpointFolders(list(folders), fs, base_name=BASE_NAME),
        fake_gate,
        checked_for="test",
        base_name=BASE_NAME,
        now=lambda: datetime(2026, 1, 2, tzinfo=UTC),
    )
    facts: dict[str, Any] = {
        "name": BASE_NAME,
        "family": "tiny",
        "class_name": "TinyForCausalLM",
        "dtype": "float32",
        "device": "cpu",
        "num_parameters": 1000,
        "is_encoder_decoder": is_encoder_decoder,
        "vocab_size": len(tokenizer),
        "max_context": MAX_CONTEXT,
        "eos_ids": frozenset({EOS}),
        "decoder_start": (0,) if is_encoder_decoder else (),
    }
    base = BaseCard(**{**facts, **card})
    if base.head is not None:
        engine.num_labels[BASE] = base.head.num_labels
    parts = ServerParts(
        settings=Settings(max_new_tokens=256, max_body_bytes=1 << 20, max_inputs=16, **settings),
        base=base,
        codec=codec,
        catalog=catalog,
        inspect=fake_gate,
        engine=engine,
        metrics=Metrics(),
        clock=time.monotonic,
        check_base=lambda: True,
    )
    return World(parts=parts, engine=engine, catalog=catalog)
