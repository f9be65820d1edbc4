"""Files of weights are read into memory, and not mapped.

transformers has safetensors map a file, except on systems where that does not go well. For a server it does not go well
anywhere: mapped pages are memory of the process beside the tensors that are made of them, twice as much where a float32
file is served in bfloat16, and a file that is cut short under a mapping ends the process. So safetensors is asked here
what transformers asks it there: to read each tensor when its turn comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from transformers import modeling_utils

_OPEN: Final = "safe_open"


@contextmanager
def read_not_mapped() -> Iterator[None]:
    """While this lasts, transformers reads the files of a model. One thread at a time loads one."""
    opened: Any = getattr(modeling_utils, _OPEN)

    def reading(file: Any, *args: Any, **asked: Any) -> Any:
        return opened(file, *args, **{**asked, "backend": "pread"})

    setattr(modeling_utils, _OPEN, reading)
    try:
        yield
    finally:
        setattr(modeling_utils, _OPEN, opened)
