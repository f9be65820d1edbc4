"""Small numbers on their way to the device: which token is whose, what lies where.

A step tells the device a few lists of whole numbers before anything of it runs. Each copy from ordinary memory makes
the host wait until the device has done all it was asked for; here all lists of a call go in one copy from pinned
memory, which nobody waits for. On a CPU there is nothing to send.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sent(each: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """The lists as int64 tensors on the device, for work that is asked of it later on the current stream."""
    if device.type != "cuda":
        return [torch.tensor(values, dtype=torch.int64, device=device) for values in each]
    return packed(each, device, pin=True)


def packed(each: Sequence[Sequence[int]], device: torch.device, *, pin: bool) -> list[Tensor]:
    """The same as parts of one tensor. `pin` takes host memory that the device can read by itself."""
    numbers = [value for values in each for value in values]
    host = torch.tensor(numbers, dtype=torch.int64, pin_memory=pin)
    return list(torch.split(host.to(device, non_blocking=pin), [len(values) for values in each]))
