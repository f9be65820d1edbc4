"""Memory: what a request holds on the device while it runs.

A request's table is the adapter's KV prefix (full blocks shared, a partly filled one copied) and its own blocks
behind it; on an encoder-decoder base it has cross-attention blocks as well; each choice that is being scored
has a fork of the table, and each beam of a search one of its own that forks again when the search branches.
Everything is taken here and given back here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peft_serve.core import Footprint
from peft_serve.errors import PromptTooLong
from peft_serve.scheduling.beams import Hypothesis
from peft_serve.scheduling.blocks import BlockLedger, Fork
from peft_serve.scheduling.limits import Limits
from peft_serve.scheduling.prefix_cache import PrefixCache
from peft_serve.scheduling.residency import Residency
from peft_serve.scheduling.slots import SlotLedger
from peft_serve.scheduling.tracked import Beam, Branch, Tracked


class Memory:
    """Opens, grows and returns the blocks and the slot lease of one request at a time."""

    def __init__(
        self,
        limits: Limits,
        slots: SlotLedger,
        blocks: BlockLedger,
        cross_blocks: BlockLedger | None,
        residency: Residency,
        cache: PrefixCache,
    ) -> None:
        self._limits = limits
        self._slots = slots
        self._blocks = blocks
        self._cross_blocks = cross_blocks
        self._residency = residency
        self._cache = cache

    def require_possible(self, tracked: Tracked, footprint: Footprint) -> None:
        """Raise `PromptTooLong` for a request that no wait can make fit."""
        self._require_context(tracked, footprint)
        pinned = self._residency.num_pinned_blocks(besides=tracked.adapter)
        num_blocks = self._num_own_blocks(tracked, footprint) + self._num_branch_blocks(tracked, footprint)
        num_blocks += self._num_beam_blocks(tracked, footprint, self.max_new_tokens(tracked))
        prefix = self._residency.num_prefix_blocks(footprint)
        capacity = min(self._blocks.capacity - pinned - sum(footprint.runs), self._residency.most_of_requests + prefix)
        if num_blocks + prefix > capacity:
            what = f"request {tracked.id} needs {num_blocks + prefix} KV blocks of {self._limits.block_size} positions"
            raise _too_long(what, capacity, pinned)
        if self._cross_blocks is None:
            return
        num_cross = self._num_cross_blocks(tracked, footprint)
        if num_cross > self._cross_blocks.capacity:
            raise PromptTooLong(
                f"request {tracked.id} needs {num_cross} blocks for its source; this server has "
                f"{self._cross_blocks.capacity}: shorten it, or start the server with a larger --kv-cache-bytes"
            )

    def has_room(self, tracked: Tracked, footprint: Footprint) -> bool:
        """Whether all blocks of the tokens known so far, and of a prefix still to install, are there now."""
        tracked.learn(footprint)
        num_blocks = self._num_own_blocks(tracked, footprint)
        num_blocks += self._num_beam_blocks(tracked, footprint, max((len(b.tokens) for b in tracked.beams), default=1))
        num_blocks -= sum(map(self._blocks.is_held, self._cache.find(tracked)))
        num_of_adapter = self._residency.num_adapter_blocks(tracked.adapter, footprint)
        if not self._residency.has_room(num_blocks, num_of_adapter, besides=tracked.adapter):
            return False
        cross = self._cross_blocks
        return cross is None or self._num_cross_blocks(tracked, footprint) <= cross.num_free

    def open(self, tracked: Tracked, footprint: Footprint) -> None:
        """Lease the seated adapter and take the blocks that `has_room` saw."""
        tracked.learn(footprint)
        tracked.lease = self._slots.acquire(tracked.adapter)
        self._begin(tracked)
        if tracked.source_is_pending:
            in_front = footprint.num_source_tokens + footprint.num_cross_tokens
            tracked.num_source = in_front + len(tracked.request.prompt)
        if self._cross_blocks is not None:
            cross = self._cross_blocks.allocate(self._num_cross_blocks(tracked, footprint))
            assert cross is not None, f"no blocks for the source of {tracked.id}: ask has_room first"
            tracked.cross_blocks = cross

    def _begin(self, tracked: Tracked) -> None:
        """The table: the adapter's prefix, what is found of the tokens in the cache, and fresh blocks for the rest."""
        prefix, num_kept = self._residency.prefix(tracked.adapter), tracked.prefix
        found = self._cache.find(tracked)
        self._blocks.share(found)
        if found:
            whole = prefix[: tracked.prefix // self._limits.block_size]
            prefix, num_kept = whole + found, (len(whole) + len(found)) * self._limits.block_size
        fork = self._extend(prefix, num_kept, tracked.num_positions)
        assert fork is not None, f"no blocks for request {tracked.id}: ask has_room first"
        self._blocks.release(found)
        tracked.table, tracked.copies = fork.blocks, fork.copies
        tracked.num_computed = num_kept - tracked.prefix
        tracked.num_labelled = len(found)
        if tracked.first_step_s is None:
            tracked.num_cached = tracked.num_computed

    def max_new_tokens(self, tracked: Tracked) -> int:
        """Tokens that a search may be long: what was asked for, as far as the context has room."""
        room = self._limits.max_context - tracked.num_placed
        return max(1, min(tracked.request.sampling.max_new_tokens, room))

    def keep(self, tracked: Tracked) -> None:
        """A row of the request has run: the blocks it filled can be found again."""
        self._cache.keep(tracked)

    def distrust(self, tracked: Tracked) -> None:
        """The request failed on what it computed: nobody is to find its blocks."""
        self._blocks.unlabel(tracked.table)

    def secure(self, tracked: Tracked) -> bool:
        """Make sure that the running request has the blocks of a next row; False while there are none."""
        if tracked.request.choices:
            return tracked.num_left > 0 or bool(tracked.branches) or self.open_branch(tracked)
        if tracked.beams and tracked.is_read:
            return self._secure_beams(tracked)
        missing = self._limits.blocks_for(tracked.num_positions) - len(tracked.table)
        if missing <= 0:
            return True
        if not self._residency.make_free(missing):
            return False
        tracked.table += self._fresh(missing)
        return True

    def open_branch(self, tracked: Tracked) -> bool:
        """Fork the table for the next choice; False while there are no blocks."""
        index = tracked.open_choices[-1]
        choice = tracked.request.choices[index]
        fork = self._extend(tracked.table, tracked.num_positions, tracked.num_positions + len(choice) - 1)
        if fork is None:
            return False
        tracked.open_choices.pop()
        tracked.branches[index] = Branch(choice=choice, blocks=fork.blocks, copies=fork.copies)
        return True

    def close_branch(self, tracked: Tracked, index: int) -> None:
        self._blocks.release(tracked.branches.pop(index).blocks)

    def regroup(self, tracked: Tracked) -> None:
        """Let the search's running hypotheses take over the tables of the beams they continue.

        The first child of a beam has its table, the others fork it in the next step. A beam without one lets go.
        """
        assert tracked.search is not None, f"request {tracked.id} has no beams"
        before = tracked.beams
        tracked.beams = _children(before, tracked.search.running)
        living = {each.parent for each in tracked.search.running}
        for place, beam in enumerate(before):
            if place not in living:
                self._blocks.release(beam.blocks)

    def _secure_beams(self, tracked: Tracked) -> bool:
        """Give every beam a table with room for all its tokens, or none of them."""
        start = tracked.num_positions
        lacking = [
            (beam, self._limits.blocks_for(start + len(beam.tokens)) - num_held)
            for beam in tracked.beams
            for num_held in [len(beam.blocks) or (start + beam.num_computed) // self._limits.block_size]
        ]
        if not self._residency.make_free(sum(num_blocks for _, num_blocks in lacking)):
            return False
        for beam, num_blocks in lacking:
            if beam.blocks:
                beam.blocks += self._fresh(num_blocks)
                continue
            table = tracked.table if beam.origin is None else beam.origin.blocks
            fork = self._extend(table, start + beam.num_computed, start + len(beam.tokens))
            assert fork is not None, "blocks that were made free are gone"
            beam.blocks, beam.copies, beam.origin = fork.blocks, fork.copies, None
        return True

    def give_back(self, tracked: Tracked) -> None:
        """Return the lease and every block of a request that stops running."""
        assert tracked.lease is not None, f"request {tracked.id} does not run: it has nothing to give back"
        for index in sorted(tracked.branches, reverse=True):
            self.close_branch(tracked, index)
            tracked.open_choices.append(index)
        for beam in tracked.beams:
            self._blocks.release(beam.blocks)
        tracked.beams = [Beam(tokens=beam.tokens) for beam in tracked.beams]
        if not tracked.is_prompt_told:
            tracked.prompt_scores.clear()
            tracked.prompt_tops.clear()
        self._blocks.release(tracked.table)
        if self._cross_blocks is not None:
            self._cross_blocks.release(tracked.cross_blocks)
        tracked.source_is_pending = self._limits.is_encoder_decoder or self._limits.is_encoder
        tracked.readings.clear()
        tracked.table = tracked.cross_blocks = ()
        tracked.copies = ()
        tracked.num_computed = tracked.num_labelled = 0
        tracked.lease.release()
        tracked.lease = None

    def check(self, running: Iterator[Tracked]) -> None:
        """Assert that every block has exactly the holders it counts."""
        tables = list(self._residency.holders())
        cross = []
        for tracked in running:
            tables.append(tracked.table)
            tables.extend(branch.blocks for branch in tracked.branches.values())
            tables.extend(beam.blocks for beam in tracked.beams)
            cross.append(tracked.cross_blocks)
        self._blocks.check(tables)
        if self._cross_blocks is not None:
            self._cross_blocks.check(cross)

    def _extend(self, table: Sequence[int], num_kept: int, num_positions: int) -> Fork | None:
        """A table that shares the first `num_kept` positions of `table` and has room for `num_positions`."""
        num_fresh = self._limits.blocks_for(num_positions) - num_kept // self._limits.block_size
        if not self._residency.make_free(num_fresh):
            return None
        fork = self._blocks.fork(table, num_kept)
        assert fork is not None, "blocks that were made free are gone"
        return Fork(blocks=fork.blocks + self._fresh(num_fresh - len(fork.copies)), copies=fork.copies)

    def _fresh(self, num_blocks: int) -> tuple[int, ...]:
        blocks = self._blocks.allocate(num_blocks)
        assert blocks is not None, "blocks that were made free are gone"
        return blocks

    def _require_context(self, tracked: Tracked, footprint: Footprint) -> None:
        # a choice's last token is scored but never computed; a drawn token has a position of its own
        draws = 0 if tracked.request.reading is not None or not tracked.request.sampling.max_new_tokens else 1
        longest = max((len(choice) - 1 for choice in tracked.request.choices), default=draws)
        num_positions = footprint.num_prefix_tokens + len(tracked.tokens) + longest
        num_virtual = footprint.num_prefix_tokens
        if self._limits.is_encoder:
            num_virtual = footprint.num_source_tokens
            num_positions = num_virtual + len(tracked.request.prompt)
        num_positions -= footprint.num_unplaced
        num_virtual -= footprint.num_unplaced
        if num_positions > self._limits.max_context:
            raise PromptTooLong(
                f"request {tracked.id} needs {num_positions} positions ({num_virtual} of them "
                f"the adapter's); the context has {self._limits.max_context} (max_model_len): shorten it"
            )

    def _num_own_blocks(self, tracked: Tracked, footprint: Footprint) -> int:
        prefix = footprint.num_prefix_tokens
        num_shared = prefix // self._limits.block_size
        return self._limits.blocks_for(prefix + len(tracked.tokens)) - num_shared

    def _num_branch_blocks(self, tracked: Tracked, footprint: Footprint) -> int:
        longest = max((len(choice) for choice in tracked.request.choices), default=1)
        if longest == 1:
            return 0
        start = footprint.num_prefix_tokens + len(tracked.tokens)
        return self._limits.blocks_for(start + longest - 1) - start // self._limits.block_size

    def _num_beam_blocks(self, tracked: Tracked, footprint: Footprint, length: int) -> int:
        """For beams of so many tokens, if no two of them had a block in common behind the prompt."""
        if not tracked.is_searching:
            return 0
        start = footprint.num_prefix_tokens + tracked.num_prompt
        num_blocks = self._limits.blocks_for(start + length) - start // self._limits.block_size
        return tracked.num_rows * num_blocks

    def _num_cross_blocks(self, tracked: Tracked, footprint: Footprint) -> int:
        in_front = footprint.num_source_tokens + footprint.num_cross_tokens
        return self._limits.blocks_for(in_front + len(tracked.request.prompt))


def _too_long(what: str, capacity: int, num_pinned: int) -> PromptTooLong:
    # Whoever asks may not know the pinned adapters by name; those who may unpin them find them listed.
    beside = f" beside {num_pinned} that pinned adapters hold" if num_pinned else ""
    unpin = " unpin one (GET /adapters lists them, POST /adapters/{name}/unpin)," if num_pinned else ""
    return PromptTooLong(
        f"{what}; this server has {max(0, capacity)} for it{beside}: shorten it,{unpin} or start the server with a "
        "larger --kv-cache-bytes, or --device-memory-bytes where that is given"
    )


def _children(before: Sequence[Beam], running: Sequence[Hypothesis]) -> list[Beam]:
    """The beams that continue those of before; none of before: those that continue the prompt."""
    heirs: dict[int, Beam] = {}
    children = []
    for each in running:
        beam = Beam(tokens=each.tokens)
        if before:
            parent, heir = before[each.parent], heirs.setdefault(each.parent, beam)
            assert each.tokens[:-1] == parent.tokens, "a hypothesis continues another beam"
            beam.num_computed = parent.num_computed
            beam.blocks, beam.origin = (parent.blocks, None) if heir is beam else ((), heir)
        children.append(beam)
    return children
