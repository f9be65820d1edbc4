"""A day of a server in milliseconds: one seed, one virtual clock, everything that can happen to a scheduler.

Requests of every kind arrive in bursts, from tenants of different weight, some with a deadline; adapters load slowly or
not at all; clients go away, also in the middle of a step; adapters are evicted and pinned; steps crash. What a step
takes depends on its tokens, so that forecasts mean something. At the end everybody has got what they get alone, and
nothing is held. `Watched` holds the order of the queue to its word while all this goes on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Final

from peft_serve.core import BASE, AdapterId, FinishReason, Footprint, Reading, RequestId, SamplingParams
from peft_serve.errors import AdapterUnavailable, DeadlineMissed, QueueFull
from peft_serve.scheduling.order import ArrivalOrder, FairOrder, Order
from peft_serve.scheduling.queue import WaitingQueue
from peft_serve.scheduling.tracked import Tracked
from tests.scheduling.fake_constraint import Path
from tests.scheduling.world import EOS, World, adapter_id, some_footprints, some_limits, was_ended_from_outside

NUM_ADAPTERS: Final = 6
NUM_REQUESTS: Final = 12
ORDERS: Final = ("arrival", "fair", "fair between tenants")
KINDS: Final = ("decoder-only", "decoder-only", "encoder-decoder", "encoder")
TENANTS: Final = (("", 1.0), ("acme", 1.0), ("bond", 4.0))
_PINNABLE: Final = (0, 3, 5)  # without a prefix, whose blocks a pin would take from everybody else's
MAX_ROWS_OF_ONE: Final = 64  # of the largest request there is
_SHARED_EVERY: Final = 5  # on each fifth day adapters lie among the KV blocks
_CHECK_EVERY: Final = 15  # acts from one check of all books to the next


class Account:
    """What each tenant was given, kept beside the order's own counters: a wrong one there is none here.

    A prompt's token that is computed costs 1 and a drawn one 2, divided by the tenant's weight. Who begins to wait has
    saved nothing up: it has at least what the one of those that wait has that was given least.
    """

    def __init__(self) -> None:
        self._given: dict[str, float] = {}
        self._last = 0.0  # of the tenant that was served last: who comes when nobody waits begins there

    def given_to(self, tenant: str) -> float:
        return self._given.get(tenant, 0.0)

    def note_arrival(self, tenant: str, waiting: set[str]) -> None:
        if tenant not in waiting:
            least = min(map(self.given_to, waiting), default=self._last)
            self._given[tenant] = max(self.given_to(tenant), least)

    def note_start(self, tracked: Tracked) -> None:
        self._last = self.given_to(tracked.request.tenant)
        self._give(tracked, len(tracked.request.prompt) - tracked.num_cached)

    def note_token(self, tracked: Tracked) -> None:
        self._give(tracked, 2.0)

    def _give(self, tracked: Tracked, cost: float) -> None:
        tenant = tracked.request.tenant
        self._given[tenant] = self.given_to(tenant) + cost / tracked.request.tenant_weight


class Watched:
    """An order that is checked: nobody is begun before an overdue request that stands in front of it and could run.

    By arrival the older stands in front. Where tenants share, the one that was given less, whatever its age.
    """

    def __init__(self, order: Order, *, now: Callable[[], float], affinity_age_s: float) -> None:
        self._order = order
        self._now = now
        self._affinity_age_s = affinity_age_s
        self.is_usable: Callable[[AdapterId], bool] = lambda _adapter: False
        self._queue: WaitingQueue | None = None
        self._account = Account()
        self.num_judged = 0  # starts with somebody overdue beside them

    @property
    def is_by_arrival(self) -> bool:
        return self._order.is_by_arrival

    def line(self, queue: WaitingQueue) -> Iterator[Tracked]:
        return self._order.line(queue)

    def gives_way(
        self, first: Tracked, queue: WaitingQueue, running: Collection[Tracked], max_rows: int
    ) -> Tracked | None:
        return self._order.gives_way(first, queue, running, max_rows)

    def note_arrival(self, tracked: Tracked, queue: WaitingQueue) -> None:
        self._queue = queue
        self._account.note_arrival(tracked.request.tenant, {each.request.tenant for each in queue})
        self._order.note_arrival(tracked, queue)

    def note_start(self, tracked: Tracked) -> None:
        assert self._queue is not None
        for other in self._queue:
            age_s = self._now() - other.request.arrival_s
            if age_s > self._affinity_age_s and self.is_usable(other.adapter):
                self.num_judged += 1
                assert not self._stands_before(other, tracked), f"{other.id} is passed by {tracked.id}"
        self._account.note_start(tracked)
        self._order.note_start(tracked)

    def note_token(self, tracked: Tracked) -> None:
        self._account.note_token(tracked)
        self._order.note_token(tracked)

    def _stands_before(self, other: Tracked, tracked: Tracked) -> bool:
        if isinstance(self._order, FairOrder):
            mine, others = tracked.request.tenant, other.request.tenant
            return mine != others and self._account.given_to(others) < self._account.given_to(mine)
        return other.seq < tracked.seq


class FastWorld(World):
    """A world that does not check all books after every act."""

    tick_s = 0.0
    num_acts = 0

    def check_books(self) -> None:
        self.num_acts += 1
        if self.num_acts % _CHECK_EVERY == 0:
            self.scheduler.check()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a simulated day saw."""

    num_requests: int
    num_steps: int
    num_refused: int  # the queue was full
    num_late: int  # refused or ended for their deadline
    num_preempted: int
    num_failed_loads: int
    num_cancelled: int
    num_judged: int
    most_steps: int  # that a request was open for, among those that nobody ended from outside


class Simulation:
    """One seed's day; see the module's docstring."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._order_name = ORDERS[seed % len(ORDERS)]
        self._is_shared = seed % _SHARED_EVERY == 0
        self.world, self._watched = self._make(KINDS[seed // len(ORDERS) % len(KINDS)])
        self._due: list[tuple[float, int, AdapterId]] = []  # loads under way
        self._begun: dict[RequestId, int] = {}  # steps there were when a request came
        self._ended: dict[RequestId, int] = {}
        self._first_steps: dict[RequestId, float] = {}
        self._num_refused = self._num_late = self._num_failed_loads = self._num_preempted = 0

    def run(self) -> Verdict:
        """Raises AssertionError for what must not be."""
        world, rng = self.world, self._rng
        left = NUM_REQUESTS
        num_idle = 0
        while left or world.scheduler.has_work:
            burst = min(left, rng.choice((0, 0, 1, 1, 2, 5)))
            left -= burst
            for _ in range(burst):
                self._arrive()
            self._disturb()
            self._loads()
            num_idle = 0 if self._step() else num_idle + 1
            assert num_idle < 200, f"nothing moves: {world.scheduler.snapshot()}"
        while self._due:
            self._loads()
        world.check_empty()
        world.check_answers()
        return self._verdict()

    # -- acts

    def _arrive(self) -> None:
        scheduler = self.world.scheduler
        before = len(scheduler._roster.queue)
        is_full = before >= self.world.limits.max_queue
        name = RequestId(f"r{len(self.world.requests)}")
        try:
            self._submit()
        except DeadlineMissed:
            self._num_late += 1
        except QueueFull:
            assert is_full, "refused, and there is room"
            del self.world.requests[name]
            self._num_refused += 1
        else:
            assert not is_full, "the queue takes more than it may"
            assert len(scheduler._roster.queue) <= self.world.limits.max_queue
            self._begun[name] = len(self.world.steps)

    def _submit(self) -> None:
        """A request of any kind."""
        world, rng = self.world, self._rng
        tenant, weight = rng.choice(TENANTS)
        adapter = BASE if rng.random() < 0.2 else adapter_id(rng.randrange(NUM_ADAPTERS))
        same = tuple(range(8)) if rng.random() < 0.3 else ()  # a beginning that the prefix cache may find again
        prompt = [*same, *(rng.randrange(11) for _ in range(rng.randint(1, 12)))]
        start = [rng.randrange(11) for _ in range(rng.randint(1, 3))]
        waits = rng.choice((None, None, None, 0.3, 3.0))
        draw = rng.random()
        if world.limits.is_encoder or (draw < 0.15 and not world.limits.is_encoder_decoder):
            world.submit(
                adapter,
                prompt,
                reading=rng.choice(list(Reading)),
                max_wait_s=waits,
                tenant=tenant,
                tenant_weight=weight,
            )
            return
        choices: list[list[int]] = []
        sampling, constraint = self._sampling(), None
        if draw < 0.3:
            choices = [[rng.randrange(11) for _ in range(rng.randint(1, 4))] for _ in range(rng.randint(1, 4))]
        elif draw < 0.5 and world.limits.max_rows > 1:
            beams = rng.randint(2, min(3, world.limits.max_rows))
            sampling = replace(sampling, do_sample=False, num_beams=beams, num_sequences=rng.randint(1, beams))
        elif draw < 0.6:
            eos = frozenset() if sampling.ignore_eos else frozenset({EOS})
            constraint = Path(
                seed=rng.randrange(99), length=rng.randint(1, 6), eos_ids=eos, breaks_at=rng.choice((None, 3))
            )
        world.submit(
            adapter,
            prompt,
            decoder_prompt=start,
            choices=choices,
            sampling=sampling,
            constraint=constraint,
            max_wait_s=waits,
            tenant=tenant,
            tenant_weight=weight,
        )

    def _sampling(self) -> SamplingParams:
        rng = self._rng
        return SamplingParams(
            max_new_tokens=rng.randint(1, 8),
            do_sample=rng.random() < 0.5,
            seed=rng.randrange(1000),
            ignore_eos=rng.random() < 0.5,
        )

    def _disturb(self) -> None:
        scheduler, rng = self.world.scheduler, self._rng
        draw = rng.random()
        some = adapter_id(rng.randrange(NUM_ADAPTERS))
        if draw < 0.04 and self.world.requests:
            self.world.cancel(rng.choice(list(self.world.requests)))
        elif draw < 0.08:
            scheduler.evict(some)
        elif draw < 0.1:
            if not self._is_shared and len(self.world.slots.pinned) < min(1, self.world.slots.num_slots - 1):
                scheduler.pin(adapter_id(rng.choice(_PINNABLE)))
        elif draw < 0.14:
            for adapter in self.world.slots.pinned:
                scheduler.unpin(adapter)

    def _loads(self) -> None:
        """Ask for what is wanted, and bring what has come by now."""
        world, rng = self.world, self._rng
        num_before = len(world.loads)
        world.ask()
        for adapter in world.loads[num_before:]:
            takes_s = rng.choice((0.0, 0.02, 0.1, 1.5))
            self._due.append((world.now_s + takes_s, len(self._due), adapter))
        for each in sorted(self._due):
            if each[0] <= world.now_s:
                self._due.remove(each)
                error = AdapterUnavailable("corrupt") if rng.random() < 0.06 else None
                self._num_failed_loads += error is not None
                world.finish_load(each[2], error=error)
        if self._due and not world.scheduler.has_work:
            world.now_s = max(world.now_s, min(self._due)[0])

    def _step(self) -> bool:
        world, rng = self.world, self._rng
        begun_s = world.now_s
        draw = rng.random()
        victim = rng.choice(list(world.requests)) if draw < 0.03 and world.requests else None
        broken = adapter_id(rng.randrange(NUM_ADAPTERS)) if 0.03 < draw < 0.04 else None
        crash = rng.choice(("early", "late")) if 0.04 < draw < 0.05 else ""
        ran_before = set(world.scheduler._roster.running)
        ran = world.step(broken=broken, crash=crash, cancel=victim)
        self._num_preempted += sum(each.id in ran_before for each in world.scheduler._roster.queue)
        for row in world.steps[-1].rows if ran else ():
            self._first_steps.setdefault(row.request, begun_s)
        world.now_s = begun_s + (0.01 + 0.002 * world.steps[-1].num_tokens if ran else 0.05)
        if ran and not crash:
            world.scheduler.note_time(world.now_s - begun_s)
        for request in world.finishes.keys() - self._ended.keys():
            self._ended[request] = len(world.steps)
        limits = world.limits
        assert len(world.scheduler._roster.queue) <= limits.max_queue + limits.max_rows, "more wait than may"
        return ran

    # -- what came of it

    def _verdict(self) -> Verdict:
        world = self.world
        late = [each for each in world.finishes.values() if isinstance(each.error, DeadlineMissed)]
        for finish in late:
            asked = world.requests[finish.request]
            assert asked.deadline_s is not None, "it was to wait for as long as it takes"
            assert finish.request not in self._first_steps, "what has begun is completed"
        for request, first_s in self._first_steps.items():
            deadline_s = world.requests[request].deadline_s
            assert deadline_s is None or first_s < deadline_s, "begun when its time was up"
        self._check_waiting()
        calm = [r for r, finish in world.finishes.items() if not was_ended_from_outside(finish)]
        return Verdict(
            num_requests=len(world.finishes),
            num_steps=len(world.steps),
            num_refused=self._num_refused,
            num_late=self._num_late + len(late),
            num_preempted=self._num_preempted,
            num_failed_loads=self._num_failed_loads,
            num_cancelled=sum(finish.reason is FinishReason.CANCELLED for finish in world.finishes.values()),
            num_judged=self._watched.num_judged,
            most_steps=max((self._ended[r] - self._begun[r] for r in calm), default=0),
        )

    def _check_waiting(self) -> None:
        """Nobody is open for more steps than all requests of the day need rows, each for itself and one by one.

        Every step serves somebody, and a preempted request is computed anew once for each time.
        """
        rows = 0
        for asked in self.world.requests.values():
            rows += len(asked.prompt) + len(asked.decoder_prompt) + sum(map(len, asked.choices))
            rows += asked.sampling.max_new_tokens * asked.sampling.num_beams
        bound = rows + self._num_preempted * MAX_ROWS_OF_ONE
        for request, ended in self._ended.items():
            assert ended - self._begun[request] <= bound, f"{request} is starved"

    def _make(self, kind: str) -> tuple[FastWorld, Watched]:
        rng = self._rng
        is_encoder_decoder, is_encoder = kind == "encoder-decoder", kind == "encoder"
        footprints = some_footprints(NUM_ADAPTERS, is_encoder_decoder=is_encoder_decoder, is_encoder=is_encoder)
        num_blocks, max_bytes, kept = rng.randint(8, 20), rng.choice((25, 45, 100)), 0
        if self._is_shared:
            footprints = {a: in_blocks(f, rng) for a, f in footprints.items()}
            num_blocks, kept = num_blocks + 6, rng.randint(0, 8)
            max_bytes = rng.randint(5, num_blocks - 1)
        limits = some_limits(
            max_rows=rng.randint(1, 5),
            max_step_tokens=rng.randint(3, 20),
            max_step_adapters=rng.randint(1, 3),
            max_step_rank=rng.choice((8, 24, 64)),
            max_queue=rng.choice((3, 6, 1000)),
            block_size=rng.choice((2, 4)),
            max_context=40,
            is_encoder_decoder=is_encoder_decoder,
            is_encoder=is_encoder,
            affinity_age_s=rng.choice((0.0, 0.1, 1.0)),
            max_loads=rng.randint(1, 3),
            num_adapter_blocks=kept,
        )
        orders: dict[str, Order] = {
            "arrival": ArrivalOrder(),
            "fair": FairOrder(),
            "fair between tenants": FairOrder(between_adapters=False),
        }
        watched = Watched(orders[self._order_name], now=lambda: world.now_s, affinity_age_s=limits.affinity_age_s)
        world = FastWorld(
            limits,
            footprints=footprints,
            num_slots=rng.randint(1, 4),
            max_bytes=max_bytes,
            num_blocks=num_blocks,
            num_cross_blocks=rng.randint(8, 24),
            order=watched,
        )
        watched.is_usable = lambda adapter: world.scheduler._residency.footprint(adapter) is not None
        return world, watched


def in_blocks(footprint: Footprint, rng: random.Random) -> Footprint:
    """The adapter as one that lies among the KV blocks, a block for a byte; some want neighbours."""
    runs = tuple(rng.choice((1, 1, 1, 2, 3)) for _ in range(rng.randint(0, 3))) if footprint.num_bytes else ()
    return replace(footprint, runs=runs, num_bytes=sum(runs))


def simulate(seed: int) -> Verdict:
    """One seed's day."""
    return Simulation(seed).run()
