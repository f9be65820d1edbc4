"""Adapters in the slots of a runner that is driven by hand. Needs nothing that serves HTTP."""

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

from peft_serve.adapters.primitives import Adapter
from peft_serve.core import AdapterId, Install, Step
from peft_serve.model.runner import StepRunner


@contextmanager
def holding(
    runner: StepRunner, known: MutableMapping[AdapterId, Adapter], adapters: Mapping[int, Adapter]
) -> Iterator[None]:
    """Adapters by slot, installed inside the block; `known` is where the runner finds them. RuntimeError where one
    cannot be installed."""
    known.update({adapter.id: adapter for adapter in adapters.values()})
    installs = tuple(Install(slot=slot, adapter=adapter.id) for slot, adapter in adapters.items())
    done = runner.run(Step(id=1, rows=(), installs=installs))
    if done.failed_installs:
        raise RuntimeError(f"an adapter could not be installed: {done.failed_installs[0][1]}")
    try:
        yield
    finally:
        runner.run(Step(id=2, rows=(), removes=tuple(adapters)))
        known.clear()
