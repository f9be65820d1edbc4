"""A simulated replica: tiers, loads, a queue and steps, in the order of the shipped planner (first come, and overtaken
only by those whose adapter is there while one's own is not). It knows the time when it is told, and nobody else.

Running rows are not walked: those that decode are a number, and a heap says at which step each of them ends. So a step
costs the simulation the same whatever its rows are.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

from loadtest.simulation.tier import Tier
from loadtest.simulation.times import Times
from loadtest.simulation.traffic import BASE_NUMBER

DEVICE, HOST, DISK, NEVER_SEEN = range(4)
FOUND_IN: Final = ("device", "host", "disk", "never seen")

_OVERTAKERS: Final = 16  # behind one that waits for room on the device, looked at in each step
_PACE: Final = 0.1  # weight of the newest gap between two ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What every replica of a cluster is."""

    max_rows: int = 16
    max_queue: int = 64
    max_step_tokens: int = 1024
    num_loaders: int = 1

    @property
    def max_ongoing(self) -> int:
        """Requests that it takes."""
        return self.max_rows + self.max_queue


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """The columns of the traffic as lists, and what comes of each request; NaN where nothing has."""

    adapters: list[int]
    prompts: list[int]
    answers: list[int]
    first_s: list[float]
    end_s: list[float]
    found_in: list[int]


class Replica:
    """One engine."""

    def __init__(
        self,
        shape: Shape,
        times: Times,
        ranks: Sequence[int],
        requests: Requests,
        device: Tier,
        host: Tier,
        *,
        knows_all: bool,
    ) -> None:
        self._shape, self._times, self._ranks, self._requests = shape, times, ranks, requests
        self.device, self.host = device, host
        self._knows_all = knows_all  # whether every adapter lies compiled on its disk
        self._seen: set[int] = set()
        self._ready = deque[int]()
        self._waiting_for: dict[int, list[int]] = {}  # by adapter that is on its way
        self._line = deque[tuple[int, int]]()  # adapters that wait for a loader, and from where they come
        self._num_loading = self._num_compiling = 0
        self._prompts = deque[list[int]]()  # request, tokens of its prompt left
        self._ends: list[tuple[int, int]] = []  # step, request: of those that decode
        self._rows: dict[int, int] = {}  # by adapter
        self._num_rows = self._sum_rank = self._num_positions = self._step = 0
        self._finishing: list[int] = []  # requests whose prompt ends with this step
        self._num_waiting_tokens = 0  # of the prompts of those that have no row
        self._gap_s = self._ended_s = 0.0
        self.num_ongoing = 0
        self.is_stepping = False
        self.busy_s = 0.0

    # -- requests and loads

    def accept(self, request: int) -> tuple[int, float] | None:
        """Take a request; a load that begins with it: adapter and seconds."""
        assert self.num_ongoing < self._shape.max_ongoing, "the router asked a replica that is full"
        self.num_ongoing += 1
        self._num_waiting_tokens += self._requests.prompts[request]
        adapter = self._requests.adapters[request]
        if adapter == BASE_NUMBER or self.device.ask(adapter):
            self._requests.found_in[request] = DEVICE
            self._ready.append(request)
            return None
        if (others := self._waiting_for.get(adapter)) is not None:
            self._requests.found_in[request] = self._requests.found_in[others[0]]
            others.append(request)
            return None
        where = HOST if self.host.ask(adapter) else DISK if self._knows_all or adapter in self._seen else NEVER_SEEN
        self._requests.found_in[request] = where
        self._waiting_for[adapter] = [request]
        self._line.append((adapter, where))
        return self._begin_load()

    def _begin_load(self) -> tuple[int, float] | None:
        if not self._line or self._num_loading >= self._shape.num_loaders:
            return None
        adapter, where = self._line.popleft()
        self._num_loading += 1
        self._num_compiling += where == NEVER_SEEN
        times = self._times
        return adapter, (times.from_host, times.from_disk, times.never_seen)[where - HOST]

    def loaded(self, adapter: int) -> tuple[int, float] | None:
        """A load has ended; the next one, if any waits."""
        waiting = self._waiting_for.pop(adapter)
        self._num_loading -= 1
        self._num_compiling -= self._requests.found_in[waiting[0]] == NEVER_SEEN
        self._seen.add(adapter)
        self.host.take(adapter)
        self.device.take(adapter)  # where it finds no room now, a step will look again
        self._ready.extend(waiting)
        return self._begin_load()

    # -- steps

    def begin_step(self) -> float | None:
        """Seconds of the step that begins now; None where nobody can run."""
        budget = self._shape.max_step_tokens - len(self._ends)
        num_tokens = len(self._ends) + self._read_on(budget)
        num_tokens += self._admit(budget + len(self._ends) - num_tokens)
        if num_tokens == 0:
            return None
        self.is_stepping = True
        seconds = self._times.predict(num_tokens, self._sum_rank, self._num_positions)
        seconds *= self._times.slowdown if self._num_compiling else 1.0
        self.busy_s += seconds
        return seconds

    def _read_on(self, budget: int) -> int:
        """Tokens of prompts that were begun in earlier steps."""
        taken = 0
        while self._prompts and taken < budget:
            request, left = self._prompts[0]
            part = min(left, budget - taken)
            taken += part
            if part < left:
                self._prompts[0][1] = left - part
            else:
                self._prompts.popleft()
                self._finishing.append(request)
        return taken

    def _admit(self, budget: int) -> int:
        """Seat those who wait while there are rows and tokens; tokens of their prompts."""
        taken, passed = 0, list[int]()
        while self._ready and self._num_rows < self._shape.max_rows and taken < budget and len(passed) < _OVERTAKERS:
            request = self._ready.popleft()
            if not self._seat(self._requests.adapters[request]):
                passed.append(request)
                continue
            prompt = self._requests.prompts[request]
            part = min(prompt, budget - taken)
            taken += part
            self._num_positions += prompt
            self._num_waiting_tokens -= prompt
            if part < prompt:
                self._prompts.append([request, prompt - part])
            else:
                self._finishing.append(request)
        self._ready.extendleft(reversed(passed))
        return taken

    def _seat(self, adapter: int) -> bool:
        if adapter != BASE_NUMBER:
            if not self.device.take(adapter):
                return False
            self.device.hold(adapter)
            if adapter not in self._rows:
                self._sum_rank += self._ranks[adapter]
            self._rows[adapter] = self._rows.get(adapter, 0) + 1
        self._num_rows += 1
        return True

    def end_step(self, now_s: float) -> None:
        """The step is over: a token for each row, the first one for those whose prompt is read."""
        self.is_stepping = False
        self._step += 1
        self._num_positions += len(self._ends)
        while self._ends and self._ends[0][0] <= self._step:
            self._end(heappop(self._ends)[1], now_s)
        for request in self._finishing:
            self._requests.first_s[request] = now_s
            if (left := self._requests.answers[request] - 1) == 0:
                self._end(request, now_s)
            else:
                heappush(self._ends, (self._step + left, request))
        self._finishing.clear()

    def _end(self, request: int, now_s: float) -> None:
        requests = self._requests
        requests.end_s[request] = now_s
        adapter = requests.adapters[request]
        self._num_rows -= 1
        self.num_ongoing -= 1
        self._num_positions -= requests.prompts[request] + requests.answers[request] - 1
        self._gap_s += _PACE * (now_s - self._ended_s - self._gap_s)
        self._ended_s = now_s
        if adapter == BASE_NUMBER:
            return
        self.device.release(adapter)
        left = self._rows[adapter] - 1
        if left:
            self._rows[adapter] = left
        else:
            del self._rows[adapter]
            self._sum_rank -= self._ranks[adapter]

    def wait_s(self) -> float:
        """Until a new request's first token, by the rule of the server's forecast: what waits is read, and those that
        find no row wait for as many to end."""
        num_before = max(0, self.num_ongoing + 1 - max(self._num_rows, self._shape.max_rows))
        return self._times.step + self._times.token * self._num_waiting_tokens + num_before * self._gap_s
