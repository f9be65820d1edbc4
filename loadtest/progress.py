"""Progress bars that say how much time is left: by what is done, or, for runs that end by the clock, by the time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Tick = Callable[[], None]


class Done(ProgressColumn):
    """How many are done, of how many where that is known."""

    def render(self, task: Task) -> RenderableType:
        """``12/40``, or ``12`` where the clock ends the run."""
        return f"{task.fields['done']}" if task.fields["by_clock"] else f"{task.fields['done']}/{task.total:g}"


class ClockedProgress(Progress):
    """rich's progress, in which tasks `by_clock` move with the time and not with what is done."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Bring the clocked tasks up to now, then draw."""
        for task in self.tasks:
            if task.fields["by_clock"] and task.total is not None:
                self.update(task.id, completed=min(task.elapsed or 0.0, task.total))
        yield from super().get_renderables()


@contextmanager
def bar(console: Console, label: str, *, count: int, seconds: float | None = None) -> Iterator[Tick]:
    """A bar over `count` things, or over `seconds` if the clock ends the run; call the tick for each thing done."""
    columns = (TextColumn("{task.description}"), BarColumn(), Done(), TimeElapsedColumn(), TimeRemainingColumn())
    with ClockedProgress(*columns, console=console, refresh_per_second=2) as progress:
        total = float(count) if seconds is None else seconds
        task = progress.add_task(label, total=total, done=0, by_clock=seconds is not None)

        def tick() -> None:
            done = progress.tasks[0].fields["done"] + 1
            progress.update(task, done=done)
            if seconds is None:
                progress.update(task, completed=done)

        yield tick
