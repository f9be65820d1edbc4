"""Blocks of one arena serve the KV cache and adapters: what lies where, and who reads it when."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from peft_serve.adapters.primitives import Adapter, Affine, Dense, Head, HeadTask, KVPrefix, LowRank, Replace
from peft_serve.core import AdapterId, Install
from peft_serve.model.arena import Arena
from peft_serve.model.base import ResidentBase
from peft_serve.model.carrier import Carrier
from peft_serve.model.layout import lay_out, placed
from peft_serve.model.pools import KVPool, KVShape, places_of
from peft_serve.model.runner import StepRunner
from peft_serve.model.wire import DirectWire, Mark, Ring, wire_to
from tests.kernels.triton.interpreter import IS_INTERPRETED
from tests.model.driver import BLOCK_SIZE, Driver, Job, random_jobs
from tests.model.tiny_models import VOCAB, tiny

CPU = torch.device("cpu")
SHAPE = KVShape(num_layers=3, num_heads=2, head_dim=5)
PARTS = 2 * SHAPE.num_layers
COLD, WARM = AdapterId("sha256:cold"), AdapterId("sha256:warm")


# ---- blocks


def arena(num_blocks: int, shape: KVShape = SHAPE, *, block_size: int = 4) -> Arena:
    parts = 2 * shape.num_layers
    part_bytes = shape.bytes_per_block(block_size, torch.float32) // parts
    return Arena(num_blocks=num_blocks, num_parts=parts, part_bytes=part_bytes, device=CPU)


def pools(num_blocks: int = 8) -> tuple[KVPool, KVPool, Arena]:
    """The same pool twice, with memory of its own and in an arena."""
    shared = arena(num_blocks)

    def made(where: Arena | None) -> KVPool:
        return KVPool(SHAPE, num_blocks=num_blocks, block_size=4, dtype=torch.float32, device=CPU, arena=where)

    return made(None), made(shared), shared


def test_a_pool_in_an_arena_keeps_what_a_pool_of_its_own_keeps() -> None:
    own, shared, _ = pools()
    rng = random.Random(1)
    for _ in range(60):
        blocks = rng.sample(range(1, 8), 3)
        values = torch.randn(3, 2, rng.randint(1, 12), 5)
        act = rng.choice(("store", "copy", "clear", "write"))
        layer, start = rng.randrange(3), rng.randint(0, 8)
        for pool, numbers in ((own, blocks), (shared, [PARTS * block for block in blocks])):
            if act == "store":
                pool.store(numbers, values, -values)
            elif act == "copy":
                pool.copy([(numbers[0], numbers[1])])
            elif act == "clear":
                pool.clear(numbers[:2])
            else:
                kv = values[0].transpose(0, 1)[: 12 - start]
                pool.write(layer, torch.tensor(places_of(numbers, start, len(kv), 4)), kv, 2 * kv)
    every, numbers = list(range(1, 8)), [PARTS * block for block in range(1, 8)]
    for mine, theirs in zip(own.read(every, 28), shared.read(numbers, 28), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.any()
    for layer in range(3):
        gathered = own.gather(layer, torch.tensor([*every, 0]), 2), shared.gather(layer, torch.tensor([*numbers, 0]), 2)
        for mine, theirs in zip(*gathered, strict=True):
            assert torch.equal(mine, theirs)
    own.check()
    shared.check()


def test_a_block_is_one_stretch_of_bytes_and_no_other_blocks() -> None:
    _, pool, shared = pools()
    shared.stretch(3 * PARTS, 2).fill_(255)
    pool.clear([2 * PARTS, 5 * PARTS])
    assert not pool.read([2 * PARTS, 5 * PARTS, 0, PARTS], 16)[0].any()
    assert bool(pool.read([3 * PARTS, 4 * PARTS], 8)[0].isnan().all())
    pool.clear([3 * PARTS, 4 * PARTS])
    assert not shared.memory.any()
    assert (pool.number(3), pools()[0].number(3)) == (3 * PARTS, 3)


@pytest.mark.parametrize("number", [0, 1, 7 * PARTS])
def test_what_is_no_stretch_is_refused(number: int) -> None:
    with pytest.raises(AssertionError):
        arena(8).stretch(number, 2)


# ---- layouts


def adapter(base: ResidentBase, name: AdapterId, seed: int, rank: int = 3, *, kinds: str = "low-rank") -> Adapter:
    """Low-rank terms at every linear site, or of all kinds that lie in blocks."""
    drawn = torch.Generator().manual_seed(seed)

    def small(*size: int) -> Tensor:
        return torch.randn(size, generator=drawn) * 0.2

    sites: dict[str, Affine | Replace] = {}
    for number, (path, spec) in enumerate(base.adapted.specs.items()):
        if spec.kind.value == "linear":
            delta = LowRank(small(rank, spec.in_features), small(spec.out_features, rank))
            dense = (Dense(small(spec.out_features, spec.in_features)),)
            more = {"maps": dense, "out_scale": 1 + small(spec.out_features)} if kinds == "all" and number % 2 else {}
            sites[path] = Affine(delta=delta, **more)
        elif spec.kind.value == "norm" and kinds == "all":
            sites[path] = Replace({"weight": 1 + small(spec.out_features)})
    return Adapter(id=name, method="LORA", sites=sites)


@pytest.mark.parametrize("block_bytes", [4096, 1000, 333, 64])
@pytest.mark.parametrize("kinds", ["low-rank", "all"])
def test_no_tensor_meets_another_or_leaves_its_run(block_bytes: int, kinds: str) -> None:
    base = ResidentBase(tiny("llama"), name="llama")
    given = adapter(base, COLD, 1, kinds=kinds)
    given = replace(given, head=Head(HeadTask.SEQUENCE, {"score.weight": torch.randn(3, 16)}))
    layout = lay_out(given, tuple(base.adapted.specs), block_bytes)
    total = 2 + sum(layout.runs)
    shared = Arena(num_blocks=total, num_parts=1, part_bytes=block_bytes, device=CPU)
    wire, firsts, at = DirectWire(), [], 1
    for length in layout.runs:
        firsts.append(at)
        at += length
    carried = Carrier(shared, wire, order=tuple(base.adapted.specs)).carry(1, given, firsts)
    mine, theirs = list(given.tensors()), list(carried.adapter.tensors())
    assert len(mine) == len(theirs)
    for tensor, there in zip(mine, theirs, strict=True):
        assert torch.equal(tensor, there)
        assert there.dtype is tensor.dtype
    inside = [t for t in theirs if t.untyped_storage().data_ptr() == shared.memory.data_ptr()]
    num_vectors = sum(edit.out_scale is not None for edit in given.sites.values() if isinstance(edit, Affine))
    assert len(inside) == len(mine) - num_vectors, "vectors go to tables, everything else lies in blocks"
    for edit in carried.adapter.sites.values():
        if isinstance(edit, Affine):
            assert edit.delta is not None
            assert edit.delta.b_OR.t().is_contiguous(), "B lies turned, as kernels read it"
    assert not shared.memory[:block_bytes].any(), "the padding block stays zero"
    assert not shared.memory[-block_bytes:].any()


def test_small_ones_share_blocks_and_nothing_is_padded_to_the_largest_rank() -> None:
    base = ResidentBase(tiny("llama"), name="llama")
    order = tuple(base.adapted.specs)
    for rank in (2, 16):
        given = adapter(base, COLD, 1, rank)
        num_bytes = sum(tensor.nbytes for tensor in given.tensors())
        runs = lay_out(given, order, 1 << 14).runs
        assert set(runs) == {1}
        assert sum(runs) <= 2 + 1.2 * num_bytes / (1 << 14)


def test_factors_come_layer_by_layer_behind_what_all_layers_need() -> None:
    base = ResidentBase(tiny("llama"), name="llama")
    layout = lay_out(adapter(base, COLD, 1, kinds="all"), tuple(base.adapted.specs), 4096)
    factors = [part.stage for part in layout.parts if part.stage]
    assert factors == sorted(factors)
    assert layout.parts[0].stage == 0
    by_layer = {path.split(".")[2]: stage for path, stage in layout.stages.items() if ".layers." in path}
    assert sorted(by_layer.values()) == list(by_layer.values())
    assert len(set(by_layer.values())) == base.shape.num_layers
    paths = [path for path in layout.stages if f".layers.{next(iter(by_layer))}." in path]
    assert len({layout.stages[path] for path in paths}) == 1, "a layer's sites come together"


def test_what_lies_elsewhere_is_left_alone() -> None:
    prefix = KVPrefix(keys_LHPD=torch.ones(1, 1, 2, 2), values_LHPD=torch.ones(1, 1, 2, 2))
    given = Adapter(id=COLD, method="PREFIX_TUNING", prefix=prefix)
    assert lay_out(given, (), 64).runs == ()
    assert placed(given, lambda tensor, _: tensor).prefix is prefix


# ---- the wire


class SlowWire:
    """Copies nothing before somebody waits for it; until then there is what is no number."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Tensor]] = []
        self.num_done = 0
        self.on_wait: Callable[[], None] = lambda: None

    def begin(self) -> None:
        """Nobody reads what is overwritten."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.fill_(float("nan"))
        self.asked.append((target, source))

    def mark(self) -> Mark:
        return Mark(len(self.asked))

    def wait(self, mark: Mark) -> None:
        self.on_wait()
        while self.num_done < mark.number:
            target, source = self.asked[self.num_done]
            target.copy_(source)
            self.num_done += 1


class PlainFactors:
    """A layer's factors, kept where they are and read when an op runs: what a kernel for GPUs does."""

    fuses_vectors = False

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._coming: dict[int, Callable[[], None]] = {}

    def put_early(self, slot: int, a_RI: Tensor, b_OR: Tensor, wait: Callable[[], None]) -> None:
        assert a_RI.is_contiguous()
        assert b_OR.t().is_contiguous()
        self.put(slot, a_RI, b_OR)
        self._coming[slot] = wait

    def put(self, slot: int, a_RI: Tensor, b_OR: Tensor) -> None:
        self._kept[slot] = a_RI, b_OR

    def drop(self, slot: int) -> None:
        self._kept.pop(slot, None)
        self._coming.pop(slot, None)

    def op(self, segments: object, out_scale: object = None, shift: object = None) -> Callable[[Tensor, Tensor], None]:
        assert out_scale is shift is None

        def add(y: Tensor, x: Tensor) -> None:
            while self._coming:
                self._coming.popitem()[1]()
            for slot, first, last in segments.each:  # type: ignore[attr-defined]
                if slot in self._kept:
                    a_RI, b_OR = self._kept[slot]
                    assert not a_RI.isnan().any(), "factors are read before they have come"
                    rows = x.view(-1, x.shape[-1])[first:last] @ a_RI.t() @ b_OR.t()
                    y.view(-1, y.shape[-1])[first:last] += rows

        return add


class PlainKernels:
    def serves(self, like: Tensor) -> bool:
        return like.is_floating_point()

    def layer(self, *_: object) -> PlainFactors:
        return PlainFactors()


class Housed(Driver):
    """A driver whose adapters lie among its KV blocks."""

    def __init__(self, base: ResidentBase, adapters: dict[AdapterId, Adapter], wire: SlowWire | DirectWire) -> None:
        super().__init__(base, adapters, seed=3)
        shared = arena(2000, base.runs.cache, block_size=BLOCK_SIZE)
        self.carrier = Carrier(shared, wire, order=tuple(base.adapted.specs))
        self.spacing = shared.num_parts
        self.runner = StepRunner(
            base,
            num_blocks=2000,
            num_cross_blocks=0,
            block_size=BLOCK_SIZE,
            adapters=self.adapters.__getitem__,
            carrier=self.carrier,
        )
        self._free = [self.spacing * block for block in range(1, 200)]
        self._next_page = 200

    def put(self, slot: int, name: AdapterId) -> Install:
        """What puts an adapter into a slot, in blocks behind those that requests get here."""
        pages = []
        for length in self.carrier.layout(self.adapters[name]).runs:
            pages.append(self._next_page * self.spacing)
            self._next_page += length
        return Install(slot=slot, adapter=name, pages=tuple(pages))


def housed(wire: SlowWire | DirectWire, *, kinds: str = "low-rank", by_kernel: bool = True) -> Housed:
    base = ResidentBase(tiny("llama"), name="llama")
    if by_kernel:
        base.adapted.run_low_rank_by(PlainKernels())
    return Housed(base, {COLD: adapter(base, COLD, 1, kinds=kinds), WARM: adapter(base, WARM, 2, kinds=kinds)}, wire)


def answers(driver: Driver, install: Callable[[int, AdapterId], Install]) -> list[list[int]]:
    """Tokens of requests of two adapters and the base, with slots that change hands in between."""
    jobs = random_jobs(random.Random(4), count=6, vocab=VOCAB)
    outputs = []
    for names in ((COLD, WARM), (WARM, COLD)):
        driver.run(installs=tuple(install(slot, name) for slot, name in enumerate(names, 1)))
        worn = [replace_job(job, slot % 3) for slot, job in enumerate(jobs)]
        for job in worn:
            driver._resident[job.adapter] = replace(driver._resident[AdapterId("base")], slot=int(job.adapter[-1]))
        driver.finish(worn)
        outputs += [job.output for job in worn]
        driver.run(removes=(1, 2))
    return outputs


def replace_job(job: Job, slot: int) -> Job:
    """The job once more, for whatever is in a slot."""
    return Job(prompt=job.prompt, num_new=job.num_new, adapter=AdapterId(f"slot {slot}"))


@pytest.mark.parametrize("by_kernel", [True, False])
def test_adapters_among_the_blocks_give_the_tokens_of_adapters_elsewhere(*, by_kernel: bool) -> None:
    slow = housed(SlowWire(), kinds="all", by_kernel=by_kernel)
    plain = Driver(slow.base, slow.adapters, seed=3)
    expected = answers(plain, lambda slot, name: Install(slot=slot, adapter=name))
    assert answers(slow, slow.put) == expected
    assert len({tuple(tokens) for tokens in expected}) > 2, "adapters and base must not all say the same"


def test_a_pass_begins_before_its_last_layers_factors_have_come() -> None:
    wire = SlowWire()
    driver = housed(wire)
    install = driver.put(1, COLD)
    layers = driver.base.model.model.layers
    seen: list[int] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: seen.append(wire.num_done))
    driver._resident[COLD] = replace(driver._resident[AdapterId("base")], slot=1)
    copies: list[tuple[int, int]] = []
    row = driver._row(Job(prompt=(5, 6, 7), num_new=1, adapter=COLD), 9, copies, "r")
    waits: list[int] = []
    wire.on_wait = lambda: waits.append(len(seen))
    driver.run(installs=(install,), rows=(row,))
    assert len(seen) == len(layers) > 1
    assert seen[0] == 0, "nothing is waited for before the first layer runs"
    assert seen[-1] < len(wire.asked), "the last layer's factors are still on their way when it begins"
    assert seen == sorted(set(seen)), "each layer waits for its own"
    assert wire.num_done == len(wire.asked), "and behind the step nothing is left to wait for"


def test_what_is_still_on_its_way_comes_before_its_blocks_are_given_away() -> None:
    wire = SlowWire()
    driver = housed(wire)
    carried = driver.carrier.carry(1, driver.adapters[COLD], driver.put(1, COLD).pages)
    assert wire.num_done == 0
    driver.carrier.leave(1)
    assert wire.num_done == len(wire.asked) > 0
    assert carried.adapter.id == COLD


class Reader:
    """A device that reads pinned memory late: when somebody waits for it, or at the end."""

    def __init__(self) -> None:
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.num_done = 0
        self.num_waits = 0

    def mark(self) -> Mark:
        return Mark(len(self.copies))

    def settle(self, mark: Mark) -> None:
        self.num_waits += 1
        self.finish(mark.number)

    def finish(self, number: int) -> None:
        for target, staged in self.copies[self.num_done : number]:
            target.copy_(staged)
        self.num_done = max(self.num_done, number)


def test_a_ring_is_not_written_where_it_is_still_read() -> None:
    reader, rng = Reader(), random.Random(5)
    ring = Ring(torch.zeros(8 * 256, dtype=torch.uint8), mark=reader.mark, settle=reader.settle)
    sources = [torch.randn(rng.randint(1, 20)) for _ in range(100)]
    targets = [torch.zeros_like(source) for source in sources]
    for source, target in zip(sources, targets, strict=True):
        reader.copies.append((target, ring.staged(source)))
    assert 0 < reader.num_waits < len(sources) / 2, "the host waits only where the ring has come round"
    reader.finish(len(sources))
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(source, target)


def test_a_cpu_has_no_wire_of_its_own() -> None:
    assert isinstance(wire_to(CPU, pinned_bytes=1 << 30, say=print), DirectWire)


@pytest.mark.skipif(not IS_INTERPRETED, reason="the tiny models are on a CPU")
def test_the_triton_kernel_reads_an_arena_as_it_reads_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from peft_serve.kernels.triton.attention import TiledAttention
    from peft_serve.model.triton_attention import PlanAttention

    attended: list[bool] = []
    plain = PlanAttention.attend

    def attend(self: PlanAttention, *given: object) -> Tensor | None:
        out = plain(self, *given)  # type: ignore[arg-type]
        attended.append(out is not None)
        return out

    monkeypatch.setattr(PlanAttention, "attend", attend)
    given = []
    for make in (lambda base: Driver(base, seed=3), lambda base: Housed(base, {}, DirectWire())):
        base = ResidentBase(tiny("llama"), name="llama")
        base.runs.attention.whole = PlanAttention(TiledAttention())
        driver = make(base)
        given.append(driver.read([Job(prompt=tuple(range(1, 12)), num_new=1)], chunk=6)[0])
    assert attended
    assert all(attended)
    assert torch.equal(torch.tensor(given[0]), torch.tensor(given[1])), "bit for bit"
