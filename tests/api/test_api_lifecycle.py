"""Any order of uploads, replacements, deletes, rollbacks, aliases, pins, evictions and requests, against a model.

The default is 200 runs; `PEFT_SERVE_LIFECYCLE_RUNS=2000` makes more. A run that differs from the model is shrunk to
the fewest acts that do, and printed as a program.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from peft_serve.core import RequestId
from tests.api.api_fakes import checkpoint, checkpoint_files, zipped
from tests.api.lifecycle_model import Model
from tests.api.lifecycle_model import Target as ModelTarget
from tests.api.lifecycle_server import Call, Server

NUM_RUNS: Final = int(os.environ.get("PEFT_SERVE_LIFECYCLE_RUNS", "200"))
_MUST_SEE: Final = (
    "answered", "by alias", "streamed", "left", "left in a stream",
    "delete 202", "delete 204", "delete 409", "delete 404",
)  # fmt: skip
T = TypeVar("T")

NAMES = st.sampled_from(["a", "b", "c"])
ALL_NAMES = st.sampled_from(["a", "b", "c", "p", "q"])
ALIASES = st.sampled_from(["p", "q", "a"])
NUMBERS = st.integers(1, 3)
TARGETS = st.lists(st.tuples(NAMES, st.none() | NUMBERS), min_size=1, max_size=3, unique=True)
_ARCHIVES: Final = [zipped(checkpoint(f"seed {i}")) for i in range(4)]
_DIGESTS: Final = [checkpoint_files(checkpoint(f"seed {i}")).digest() for i in range(4)]


class LifecycleMachine(RuleBasedStateMachine):
    """One server for all runs; each has names of its own, and leaves nothing behind."""

    server: ClassVar[Server]
    loop: ClassVar[asyncio.AbstractEventLoop]
    num_runs: ClassVar[int] = 0
    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        type(self).num_runs += 1
        self.prefix = f"r{self.num_runs}-"
        self.model = Model()
        self.flying: dict[int, tuple[Call, Any]] = {}
        self.number = 0

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Call:
        async def asked() -> Call:
            return await self.server.call(method, path, body, **headers).ended()

        return self.do(asked())

    def name(self, name: str) -> str:
        return self.prefix + name

    # names

    @initialize()
    def begin_with_two(self) -> None:
        self.upload("a", 0)
        self.upload("b", 1)
        self.point("p", [("a", None), ("b", 1)])

    @rule(name=ALL_NAMES, seed=st.integers(0, 3))
    def upload(self, name: str, seed: int) -> None:
        expected = self.model.upload(name, _DIGESTS[seed])
        path = f"/adapters/{self.name(name)}"
        answer = self.ask("PUT", path, _ARCHIVES[seed], **{"content-type": "application/zip"})
        assert answer.status == expected, answer.content
        if expected < 300:
            assert (answer.json["version"], answer.json["digest"]) == (self.model.current[name], _DIGESTS[seed])

    @rule(name=ALL_NAMES, force=st.booleans())
    def delete(self, name: str, force: bool) -> None:
        expected = self.model.delete(name, force=force)
        answer = self.ask("DELETE", f"/adapters/{self.name(name)}?force={int(force)}")
        self.seen[f"delete {expected}"] += 1
        assert answer.status == expected, answer.content

    @rule(name=ALL_NAMES, number=NUMBERS)
    def roll_back(self, name: str, number: int) -> None:
        expected = self.model.rollback(name, number)
        answer = self.ask("POST", f"/adapters/{self.name(name)}/rollback", {"version": number})
        assert answer.status == expected, answer.content

    @rule(name=ALIASES, points_to=TARGETS)
    def point(self, name: str, points_to: list[ModelTarget]) -> None:
        expected = self.model.put_alias(name, points_to)
        body = {"targets": [{"adapter": self.name(adapter), "version": n} for adapter, n in points_to]}
        answer = self.ask("PUT", f"/aliases/{self.name(name)}", body)
        assert answer.status == expected, answer.content

    @rule(name=ALIASES, number=NUMBERS)
    def roll_alias_back(self, name: str, number: int) -> None:
        expected = self.model.roll_alias_back(name, number)
        answer = self.ask("POST", f"/aliases/{self.name(name)}/rollback", {"revision": number})
        assert answer.status == expected, answer.content

    @rule(name=ALIASES)
    def forget(self, name: str) -> None:
        expected = self.model.forget(name)
        assert self.ask("DELETE", f"/aliases/{self.name(name)}").status == expected

    # places

    @rule(name=NAMES, act=st.sampled_from(["load", "unload"]))
    def move(self, name: str, act: str) -> None:
        """Evictions, also of what is in use: it goes when it is no longer."""
        status = self.ask("POST", f"/adapters/{self.name(name)}/{act}").status
        assert status == (202 if name in self.model.current else 404)

    @rule(name=NAMES)
    def pin_and_unpin(self, name: str) -> None:
        self.end_all()
        expected = 202 if name in self.model.current else 404
        assert self.ask("POST", f"/adapters/{self.name(name)}/pin").status == expected
        if expected == 202:
            assert self.generate(name) is not None
            snapshot = self.server.engine.snapshot()
            digest = self.model.versions[name][self.model.current[name]]
            assert digest in snapshot.pinned
            assert self.ask("POST", f"/adapters/{self.name(name)}/unload").status == 412
            assert self.ask("POST", f"/adapters/{self.name(name)}/unpin").status == 202
            self.generate(name)
            assert not self.server.engine.snapshot().pinned

    # requests

    @rule(name=ALL_NAMES, number=st.none() | NUMBERS)
    def ask_whole(self, name: str, number: int | None) -> None:
        self.end_all()
        self.generate(name, number)

    def generate(self, name: str, number: int | None = None) -> Call | None:
        self.server.gate.open()
        begun = self.begun(name, number)
        if begun is None:
            return None
        self.finish(begun)
        return begun[0]

    @rule(name=ALL_NAMES, number=st.none() | NUMBERS, stream=st.booleans(), steps=st.integers(0, 3))
    def begin(self, name: str, number: int | None, stream: bool, steps: int) -> None:
        """A request that stays in flight, after so many more steps of all."""
        if len(self.flying) >= 4:
            return
        self.server.gate.open(0)
        begun = self.begun(name, number, stream=stream)
        if begun is None:
            return
        self.number += 1
        self.flying[self.number] = begun
        self.model.held[self.number] = begun[1].adapter
        self.advance(steps)

    @rule(steps=st.integers(1, 3))
    def advance(self, steps: int) -> None:
        """Steps of whoever is in flight; some may end."""

        async def advanced() -> None:
            self.server.gate.open(steps)
            while self.server.gate.left > 0 and any(not call.task.done() for call, _ in self.flying.values()):
                await asyncio.sleep(0.0003)
            self.server.gate.open(0)
            await self.server.rest()

        self.do(advanced())
        self.collect()

    @rule()
    def end_all(self) -> None:
        self.server.gate.open()
        for number in list(self.flying):
            self.model.held.pop(number)
            self.finish(self.flying.pop(number))
        self.do(self.server.settle())

    @rule(name=NAMES, steps=st.integers(0, 2), leaves=st.booleans())
    def delete_what_is_in_flight(self, name: str, steps: int, leaves: bool) -> None:
        self.begin(name, None, stream=True, steps=steps)
        self.upload(name, 2)
        self.delete(name, force=True)
        self.upload(name, 3)
        if leaves:
            self.leave(len(self.flying) - 1)

    @rule(place=st.integers(0, 3))
    def leave(self, place: int) -> None:
        """A caller goes away, in the queue, in the middle of a prompt or of a stream."""
        if not self.flying:
            return
        number = sorted(self.flying)[place % len(self.flying)]
        self.model.held.pop(number)
        call, _ = self.flying.pop(number)
        self.seen["left in a stream" if call.content else "left"] += 1
        self.do(call.leave())

    def begun(self, name: str, number: int | None, *, stream: bool = False) -> tuple[Call, Any] | None:
        """A call that is in the engine, and its request; None: there is nobody to answer it."""
        allowed = self.model.answers(name, number)
        ref = self.name(name) + ("" if number is None else f"@{number}")
        body = {
            "inputs": f"hello {self.number}",
            "parameters": {"max_new_tokens": 5, "ignore_eos": True, "details": True},
        }
        server = self.server

        async def begin() -> tuple[Call, Any] | None:
            before = set(server.submitted)
            call = server.call("POST", f"/generate{'_stream' if stream else ''}?adapter={ref}", body)
            while set(server.submitted) == before and not call.task.done():
                await asyncio.sleep(0.0003)
            if not allowed:
                await call.ended()
                assert call.status == 404, call.content
                return None
            (new,) = set(server.submitted) - before
            return call, server.submitted[RequestId(new)]

        found = self.do(begin())
        assert found is None or found[1].adapter in allowed, "another version answers"
        return found

    def finish(self, begun: tuple[Call, Any]) -> None:
        """The call ends with what its request gets alone, on the version that it resolved."""
        call, request = begun
        self.do(call.ended())
        assert call.status == 200, call.content
        tokens = self.server.tokens_alone(request)
        if b"data:" in call.content:
            assert call.content.count(b"data:") == len(tokens)
            self.seen["streamed"] += 1
            return
        assert call.json["adapter"]["digest"] == request.adapter
        assert [token["id"] for token in call.json["details"]["tokens"]] == tokens
        self.seen["answered"] += 1
        self.seen["by alias"] += "x-adapter-alias" in call.headers

    def collect(self) -> None:
        """The calls that have ended meanwhile."""
        for number in [n for n, (call, _) in self.flying.items() if call.task.done()]:
            self.model.held.pop(number)
            self.finish(self.flying.pop(number))

    # what holds all the time

    @invariant()
    def the_list_is_the_model(self) -> None:
        found = self.ask("GET", "/adapters").json
        held = list(self.model.held.values())
        told = {e["name"]: (e["version"], e["digest"], e["in_flight"], e["num_versions"]) for e in found["adapters"]}
        expected = {}
        for name, number in self.model.current.items():
            digest = self.model.versions[name][number]
            expected[self.name(name)] = (number, digest, held.count(digest), len(self.model.versions[name]))
        assert told == expected
        pointed = {e["name"]: [(t["adapter"], t["version"]) for t in e["targets"]] for e in found["aliases"]}
        aliases = self.model.aliases
        assert pointed == {self.name(a): [(self.name(t), n) for t, n in self.model.pointed(a)] for a in aliases}

    @invariant()
    def files_stay_while_they_are_named_or_held(self) -> None:
        named = {digest for versions in self.model.versions.values() for digest in versions.values()}
        assert set(self.server.store.blob_ids()) == named | set(self.model.held.values())

    def teardown(self) -> None:
        self.end_all()
        for name in list(self.model.current):
            self.delete(name, force=True)
        for name in list(self.model.aliases):
            self.forget(name)
        server = self.server
        self.do(server.settle())
        assert server.store.blob_ids() == []
        server.catalog.check()
        server.scheduler.check()
        assert server.slots.num_leases == 0
        server.submitted.clear()


def test_the_server_does_what_the_model_says(tiny_tokenizer: Any, tmp_path: Path) -> None:
    LifecycleMachine.server = Server(tiny_tokenizer, tmp_path)
    LifecycleMachine.loop = asyncio.new_event_loop()
    LifecycleMachine.num_runs = 0
    try:
        run_state_machine_as_test(
            LifecycleMachine,
            settings=settings(
                max_examples=NUM_RUNS,
                stateful_step_count=14,
                deadline=None,
                report_multiple_bugs=False,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            ),
        )
        assert LifecycleMachine.num_runs >= NUM_RUNS
        for what in _MUST_SEE if NUM_RUNS >= 100 else ():
            assert LifecycleMachine.seen[what], f"no run has seen: {what}"
    finally:
        LifecycleMachine.loop.close()
        LifecycleMachine.server.close()
