"""Adapters among the KV blocks: copied there while passes run, in and out of the same blocks, again and again.

Each adapter's tokens are held against those of a runner whose adapters and KV blocks have memory of their own. Passes
that choose nothing do not make the host wait, so that the copies behind them come while they still run. Beside the
checks stands what a step takes that brings an adapter along.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from loadtest.gpu.ground import Ground
from loadtest.gpu.memory_checks import little_memory
from loadtest.gpu.random_adapters import lora, on_host
from loadtest.gpu.results import Check, Figures, Found
from loadtest.gpu.rows import BLOCK_SIZE, Steps
from loadtest.gpu.shapes import decoder, make
from loadtest.gpu.timing import Act, in_turns
from loadtest.work import Load
from peft_serve.adapters.primitives import Adapter
from peft_serve.core import AdapterId, Install, Row, Step, StepResult
from peft_serve.engine.device_memory import DeviceMemory, device_memory
from peft_serve.engine.gpu_kernels import speed_up
from peft_serve.model.base import ResidentBase
from peft_serve.model.carrier import Carrier
from peft_serve.model.runner import StepRunner
from peft_serve.model.wire import DirectWire

_LOAD: Final = Load(num_rows=4, context=32)
_ROUNDS: Final = 24  # of adapters that come and go
_RANKS: Final = (4, 16, 64)
_MOST_S: Final = 3.0  # of repeats


@dataclass(frozen=True, slots=True, kw_only=True)
class _Budget:
    """What `device_memory` asks of settings, which are not at hand here: they take packages that serve HTTP."""

    device_memory_bytes: int | None = 256 << 20
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int = 64 << 20
    device_adapter_bytes: int = 64 << 20
    pinned_adapter_bytes: int = 256 << 20
    max_adapter_bytes: int = 512 << 20
    max_resident_adapters: int = 64
    max_rows: int = 64
    max_step_tokens: int = 1024
    block_size: int = BLOCK_SIZE


def one_budget(ground: Ground) -> Found:
    """On a small base of its own."""
    base = ResidentBase(make(decoder(is_quick=True), ground.device), name="small")
    speed_up("auto", base, lambda _: None)
    trial = _Trial(ground, base)
    checks = [trial.adapters_come_and_go()]
    if ground.is_gpu:
        checks.append(_less_than_it_says(ground, base))
    return Found(checks=tuple(checks), figures=(trial.costs(),))


class _Trial:
    """Two runners for one base: of plain memory, and of an arena."""

    def __init__(self, ground: Ground, base: ResidentBase) -> None:
        self._ground = ground
        self._base = base
        self._known: dict[AdapterId, Adapter] = {}
        self._worn = [on_host(lora(base, f"rank {rank}", rank, seed=rank)) for rank in _RANKS]
        self._known.update({adapter.id: adapter for adapter in self._worn})
        self._memory = _budgeted(base)
        assert self._memory.carrier is not None, "there is a budget"
        self._carrier = self._memory.carrier
        self._spacing = self._memory.sizes.spacing
        self._rows = Steps(base, [_LOAD]).decoding(_LOAD)
        self._num_own = 1 + max(block for row in self._rows for block in row.blocks)

    def _runner(self, carrier: Carrier | None) -> StepRunner:
        num_blocks = self._num_own if carrier is None else self._memory.sizes.num_blocks
        return StepRunner(
            self._base,
            num_blocks=num_blocks,
            num_cross_blocks=0,
            block_size=BLOCK_SIZE,
            adapters=self._known.__getitem__,
            carrier=carrier,
        )

    def _install(self, adapter: Adapter, slot: int = 1) -> Install:
        """Whatever comes into one slot comes into the same blocks."""
        runs = self._carrier.layout(adapter).runs
        most = max(sum(self._carrier.layout(each).runs) for each in self._worn)
        at, pages = self._num_own + (slot - 1) * most, list[int]()
        for length in runs:
            pages.append(at * self._spacing)
            at += length
        return Install(slot=slot, adapter=adapter.id, pages=tuple(pages))

    def _step(self, spacing: int, *, draws: bool = True, slot: int = 1) -> tuple[Row, ...]:
        return tuple(
            replace(
                row,
                slot=slot,
                blocks=tuple(spacing * block for block in row.blocks),
                draw=row.draw if draws else None,
            )
            for row in self._rows
        )

    def adapters_come_and_go(self) -> Check:
        """One after the other in the same blocks; behind each a pass that nobody waits for."""
        expected = {adapter.id: self._alone(adapter) for adapter in self._worn}
        runner, wrong = self._runner(self._carrier), list[str]()
        for number in range(_ROUNDS):
            adapter = self._worn[number % len(self._worn)]
            rows = self._step(self._spacing)
            done = runner.run(Step(id=2 * number, rows=rows, installs=(self._install(adapter),)))
            if _tokens(done) != expected[adapter.id]:
                wrong.append(f"{adapter.id} in round {number}")
            quiet = self._step(self._spacing, draws=False)
            runner.run(Step(id=2 * number + 1, rows=quiet))
            runner.run(Step(id=2 * number + 1, rows=(), removes=(1,)))
        return Check(name="adapters in the blocks of those before them", passed=not wrong, note="; ".join(wrong[:3]))

    def _alone(self, adapter: Adapter) -> list[int | None]:
        runner = self._runner(None)
        install = Install(slot=1, adapter=adapter.id)
        done = runner.run(Step(id=1, rows=self._step(1), installs=(install,)))
        runner.run(Step(id=2, rows=(), removes=(1,)))
        return _tokens(done)

    def costs(self) -> Figures:
        """What a step takes with an adapter that is there, that is copied while it runs, and that is copied first."""
        adapter = self._worn[-1]
        direct = Carrier(self._carrier.arena, DirectWire(), order=tuple(self._base.adapted.specs))
        ways = (
            ("is there", self._carrier, False),
            ("is copied while the step runs", self._carrier, True),
            ("is copied before it", direct, True),
        )
        acts = {name: self._act(number, adapter, *way) for number, (name, *way) in enumerate(ways, 1)}
        times = in_turns(self._ground, acts, most_s=_MOST_S)
        return Figures(
            title="a step with an adapter that ...",
            columns=("the adapter", "rank", "MB", "ms a step", "spread"),
            rows=tuple(
                (name, adapter.max_rank, _num_bytes(adapter) / 1e6, 1e3 * found.median_s, found.words)
                for name, found in times.items()
            ),
            notes=("the base is small, so that copies weigh more than they do elsewhere",),
        )

    def _act(self, slot: int, adapter: Adapter, carrier: Carrier, brings: bool) -> Act:
        """A step of a runner with a slot and blocks of its own."""
        runner, install = self._runner(carrier), self._install(adapter, slot)
        rows = self._step(self._spacing, slot=slot)
        runner.run(Step(id=1, rows=rows, installs=(install,)))
        step = Step(id=2, rows=rows, installs=(install,) if brings else (), removes=(slot,) if brings else ())
        return lambda: runner.run(step)


def _budgeted(base: ResidentBase) -> DeviceMemory:
    return device_memory(_Budget(max_adapter_bytes=64 << 20), base, base.shape.max_positions, lambda _: None)


def _less_than_it_says(ground: Ground, base: ResidentBase) -> Check:
    """A server starts with what there is where that is a little less than it was told."""
    said: list[str] = []
    with little_memory(ground, 224 << 20):
        memory = device_memory(_Budget(pinned_adapter_bytes=0), base, 1 << 20, said.append)
        assert memory.carrier is not None
        found = memory.carrier.arena.memory.nbytes
    passed = 128 << 20 < found <= 224 << 20 and len(said) > 1
    return Check(name="a start with less memory than it was told", passed=passed, note=f"{found >> 20} MiB; {said[0]}")


def _num_bytes(adapter: Adapter) -> int:
    return sum(tensor.nbytes for tensor in adapter.tensors())


def _tokens(done: StepResult) -> Sequence[int | None]:
    return [one.token for one in done.rows]
