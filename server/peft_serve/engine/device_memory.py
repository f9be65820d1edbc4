"""Device memory: how much there is for KV blocks and adapters, and how it is shared.

Either each side has bytes of its own, or both take blocks from one budget: what adapters do not use requests may, and
the other way round. Then `--kv-cache-bytes` and `--device-adapter-bytes` are what each side has for certain. The
budget's bytes are taken from the device once, at start; who has which block of them is the scheduler's book.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from peft_serve.adapters.shortage import is_short_of_memory
from peft_serve.model.arena import Arena
from peft_serve.model.base import ResidentBase
from peft_serve.model.carrier import Carrier
from peft_serve.model.wire import wire_to
from peft_serve.scheduling.draft import MAX_SCORED

_BLOCKS_OF_AN_ENCODER: Final = 1  # they have no layers and take no memory; a pool holds one at least
_CROSS_SHARE: Final = 0.5  # of the KV bytes of an encoder-decoder: the source is kept as long as the answer grows
_OF_NOBODY: Final = 2  # blocks of an arena: the padding block, and a last one that rows without a request may write to
_STATES: Final = 24  # vectors as wide as the hidden states that a layer makes of a token, about
_TRIES: Final = 8  # to find memory for the budget, each for
_SMALLER: Final = 0.9  # as much as the one before

MemoryInfo = Callable[[torch.device], tuple[int, int]]
"""Free and total bytes of a device."""


class Wanted(Protocol):
    """What the operator says of it, by the names of settings; whoever has no server to configure may say it too."""

    @property
    def device_memory_bytes(self) -> int | None: ...
    @property
    def gpu_memory_utilization(self) -> float: ...
    @property
    def kv_cache_bytes(self) -> int: ...
    @property
    def device_adapter_bytes(self) -> int: ...
    @property
    def pinned_adapter_bytes(self) -> int: ...
    @property
    def max_adapter_bytes(self) -> int: ...
    @property
    def max_resident_adapters(self) -> int: ...
    @property
    def max_rows(self) -> int: ...
    @property
    def max_step_tokens(self) -> int: ...
    @property
    def block_size(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of what. Blocks are counted with the padding block."""

    num_blocks: int
    num_cross_blocks: int
    max_adapter_bytes: int  # of all adapters on the device
    num_adapter_blocks: int = 0  # that adapters have for certain, where they lie among the KV blocks
    spacing: int = 1  # from a block's number to the next one's


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """What the scheduler counts, and what the runner writes to: with one budget a carrier and its arena."""

    sizes: Sizes
    carrier: Carrier | None = None


def device_memory(
    settings: Wanted,
    base: ResidentBase,
    max_context: int,
    say: Callable[[str], None],
    *,
    info: MemoryInfo = torch.cuda.mem_get_info,
) -> DeviceMemory:
    """The memory for KV blocks and adapters. ValueError where a budget is too small for either."""
    budget = budget_of(settings, base, info)
    if base.shape.is_encoder:
        most = settings.device_adapter_bytes if budget is None else budget
        return DeviceMemory(
            sizes=Sizes(num_blocks=1 + _BLOCKS_OF_AN_ENCODER, num_cross_blocks=0, max_adapter_bytes=most)
        )
    most_blocks = settings.max_rows * (max_context // settings.block_size + 2)
    if budget is None:
        return DeviceMemory(sizes=_apart(settings, base, most_blocks))
    return _shared(settings, base, most_blocks, budget, say)


def budget_of(settings: Wanted, base: ResidentBase, info: MemoryInfo) -> int | None:
    """Bytes for KV blocks and adapters together; None where each has its own."""
    if settings.device_memory_bytes is not None:
        return settings.device_memory_bytes
    if base.device.type != "cuda" or not settings.gpu_memory_utilization:
        return None
    free, total = info(base.device)
    budget = int(settings.gpu_memory_utilization * total) - (total - free) - workspace_bytes(settings, base)
    if budget <= 0:
        raise ValueError(
            f"--gpu-memory-utilization {settings.gpu_memory_utilization}: {total - free} of {total} bytes are taken "
            "and a step needs some: nothing is left for KV blocks and adapters; give more, or take a smaller base"
        )
    return budget


def workspace_bytes(settings: Wanted, base: ResidentBase) -> int:
    """About what a pass takes beside weights, KV blocks and adapters: the states of its tokens, and logits."""
    states = settings.max_step_tokens * _STATES * base.shape.hidden_size * base.dtype.itemsize
    num_logits = (settings.max_rows + MAX_SCORED) * base.shape.vocab_size
    return states + num_logits * (base.dtype.itemsize + 3 * torch.float32.itemsize)


def _apart(settings: Wanted, base: ResidentBase, most_blocks: int) -> Sizes:
    """Blocks for the bytes the operator gives, and no more than every row at full length could use."""
    fits = settings.kv_cache_bytes // _block_bytes(settings, base)
    cross = _num_cross(fits, most_blocks) if base.shape.is_encoder_decoder else 0
    return Sizes(
        num_blocks=1 + max(1, min(most_blocks, fits - cross)),
        num_cross_blocks=1 + cross if cross else 0,
        max_adapter_bytes=settings.device_adapter_bytes,
    )


def _num_cross(fits: int, most_blocks: int) -> int:
    return max(1, min(most_blocks, int(fits * _CROSS_SHARE)))


def _block_bytes(settings: Wanted, base: ResidentBase) -> int:
    return base.runs.cache.bytes_per_block(settings.block_size, base.dtype)


def _shared(
    settings: Wanted, base: ResidentBase, most_blocks: int, budget: int, say: Callable[[str], None]
) -> DeviceMemory:
    """One arena for both. An encoder-decoder's encoded sources keep memory of their own, half of what KV has."""
    block_bytes = _block_bytes(settings, base)
    asked = settings.kv_cache_bytes + settings.device_adapter_bytes
    for_kv, for_adapters = (
        int(part * min(1.0, budget / asked)) for part in (settings.kv_cache_bytes, settings.device_adapter_bytes)
    )
    cross = _num_cross(for_kv // block_bytes, most_blocks) if base.shape.is_encoder_decoder else 0
    useful = most_blocks + -(-settings.max_resident_adapters * settings.max_adapter_bytes // block_bytes)
    num_blocks = min(useful, budget // block_bytes - cross - _OF_NOBODY)
    kv_floor = max(1, min(most_blocks, for_kv // block_bytes - cross))
    adapter_floor = min(for_adapters // block_bytes, num_blocks - kv_floor)
    if adapter_floor < min(for_adapters, 1):
        raise ValueError(
            f"{budget} bytes are too few for KV blocks of {block_bytes} and adapters beside them: start the server "
            "with a larger --device-memory-bytes or --gpu-memory-utilization, or a smaller --block-size"
        )
    arena = _claimed(num_blocks + _OF_NOBODY, kv_floor + adapter_floor + _OF_NOBODY, settings, base, say)
    num_blocks = arena.num_blocks - _OF_NOBODY
    wire = wire_to(base.device, pinned_bytes=settings.pinned_adapter_bytes, say=say)
    say(f"{num_blocks} blocks of {block_bytes} bytes for the KV cache and adapters")
    return DeviceMemory(
        sizes=Sizes(
            num_blocks=1 + num_blocks,
            num_cross_blocks=1 + cross if cross else 0,
            max_adapter_bytes=(num_blocks - kv_floor) * block_bytes,
            num_adapter_blocks=adapter_floor,
            spacing=arena.num_parts,
        ),
        carrier=Carrier(arena, wire, order=tuple(base.adapted.specs)),
    )


def _claimed(num_blocks: int, fewest: int, settings: Wanted, base: ResidentBase, say: Callable[[str], None]) -> Arena:
    """The arena, a little smaller where the device has not as much after all. ValueError below the fewest blocks."""
    num_parts = 2 * base.runs.cache.num_layers
    part_bytes = _block_bytes(settings, base) // num_parts
    for _ in range(_TRIES):
        try:
            return Arena(num_blocks=num_blocks, num_parts=num_parts, part_bytes=part_bytes, device=base.device)
        except (MemoryError, RuntimeError, OSError) as error:
            if not is_short_of_memory(error):
                raise
        if num_blocks == fewest:
            break
        num_blocks = max(fewest, int(num_blocks * _SMALLER))
        say(f"the device has less memory than it said: {num_blocks} blocks are tried")
        if base.device.type == "cuda":
            torch.cuda.empty_cache()
    raise ValueError(
        f"the device has no memory for {num_blocks} blocks of {num_parts * part_bytes} bytes: give a smaller "
        "--device-memory-bytes or --gpu-memory-utilization"
    )
