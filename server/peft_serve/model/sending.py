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


def sent_values(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as a tensor of the dtype of `like`, where that is."""
    is_cuda = like.device.type == "cuda"
    host = torch.tensor(values, dtype=like.dtype, pin_memory=is_cuda)
    return host.to(like.device, non_blocking=is_cuda)


def taken(x_N: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of a tensor in rising order; the very tensor where they are all."""
    return x_N if len(rows) == len(x_N) else x_N.index_select(0, sent([rows], x_N.device)[0])


def refill(held: Tensor, each: Sequence[Sequence[int]]) -> None:
    """The lists, one behind the other, into int64 memory that is on the device already, as many numbers as it has."""
    is_cuda = held.device.type == "cuda"
    numbers = [value for values in each for value in values]
    held.view(-1).copy_(torch.tensor(numbers, dtype=torch.int64, pin_memory=is_cuda), non_blocking=is_cuda)


def packed(each: Sequence[Sequence[int]], device: torch.device, *, pin: bool) -> list[Tensor]:
    """The same as parts of one tensor. `pin` takes host memory that the device can read by itself."""
    numbers = [value for values in each for value in values]
    host = torch.tensor(numbers, dtype=torch.int64, pin_memory=pin)
    return list(torch.split(host.to(device, non_blocking=pin), [len(values) for values in each]))
