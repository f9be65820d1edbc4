"""Filing: the folder that a command's results go to."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path


@contextmanager
def new_folder(out: Path, name: str, now: datetime) -> Iterator[Path]:
    """A folder in `out` that nobody else has: the time and `name`, with a number behind them where commands of one
    second share both. If nothing was put into it, it is gone at the end."""
    out.mkdir(parents=True, exist_ok=True)
    folder = _made(out / f"{now:%Y%m%d-%H%M%S}-{name}")
    try:
        yield folder
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()


def _made(wanted: Path) -> Path:
    """`wanted`, or the first of ``wanted-2``, ``wanted-3``, ... that was not there: making it takes it."""
    for number in count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("numbers do not end")
