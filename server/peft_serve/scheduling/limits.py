"""Limits: the numbers the scheduler keeps to, fixed for the life of a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a step may hold, and how many requests may run and wait."""

    max_rows: int  # requests that run at the same time, and rows of one step
    max_step_tokens: int  # tokens of one step; the source of one request may exceed it
    max_step_adapters: int  # distinct adapters of one step, the base not counted
    max_step_rank: int  # sum of their ranks; a single adapter above it runs alone
    max_queue: int  # requests that wait; one more is refused
    block_size: int  # positions in a KV block
    max_context: int  # positions of a request, the adapter's KV prefix counted where it takes any
    is_encoder_decoder: bool = False
    is_encoder: bool = False  # requests read their prompt, whole and in one step, and keep nothing on the device
    pad_id: int | None = None  # a sequence is read at its last token that is not this one (a decoder's heads)
    affinity_age_s: float = 0.5  # a waiting request is overtaken by ones of the step's adapters until this age
    prefix_caching: bool = True  # full KV blocks are found again by the tokens and the adapter they hold
    max_step_s: float | None = None  # parts of prompts are made so short that a step is expected to take no longer
    max_loads: int = 16  # adapters asked for, or ready on the host, that are not in a slot yet
    num_adapter_blocks: int = 0  # of the KV blocks, those that no request is given: adapters have them for certain
    reads_host_copies: bool = False  # a slot refers to the host's copy, which stays as long as the slot is taken

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_step_tokens", "max_step_adapters", "max_step_rank", "max_queue"):
            self._require_positive(name)
        for name in ("block_size", "max_context", "max_loads"):
            self._require_positive(name)
        if self.max_step_s is not None and self.max_step_s <= 0:
            raise ValueError(f"max_step_s is {self.max_step_s}: a step takes some time; leave it out for no limit")

    def _require_positive(self, name: str) -> None:
        value = getattr(self, name)
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")

    def blocks_for(self, num_positions: int) -> int:
        """Blocks that hold so many positions."""
        return -(-num_positions // self.block_size)
