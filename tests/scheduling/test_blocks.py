"""The block ledger: references, forks, and nothing lost."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from peft_serve.scheduling.blocks import BlockLedger


def test_the_padding_block_is_never_given() -> None:
    ledger = BlockLedger(num_blocks=5, block_size=2)
    blocks = ledger.allocate(4)
    assert blocks is not None
    assert sorted(blocks) == [1, 2, 3, 4]
    assert (ledger.num_free, ledger.usage, ledger.capacity, ledger.num_blocks) == (0, 1.0, 4, 5)


def test_no_room_is_none_and_changes_nothing() -> None:
    ledger = BlockLedger(num_blocks=4, block_size=2)
    assert ledger.allocate(4) is None
    assert ledger.num_free == 3
    assert ledger.allocate(0) == ()


def test_a_shared_block_is_free_after_its_last_release() -> None:
    ledger = BlockLedger(num_blocks=3, block_size=2)
    blocks = ledger.allocate(2)
    assert blocks is not None
    ledger.share(blocks[:1])
    ledger.release(blocks)
    assert ledger.num_free == 1
    ledger.release(blocks[:1])
    assert ledger.num_free == 2


@pytest.mark.parametrize("act", ["share", "release"])
def test_a_free_block_is_nobodys(act: str) -> None:
    ledger = BlockLedger(num_blocks=3, block_size=2)
    with pytest.raises(AssertionError, match="nobody holds it"):
        getattr(ledger, act)((1,))


def test_a_fork_shares_full_blocks_and_copies_the_last() -> None:
    ledger = BlockLedger(num_blocks=8, block_size=4)
    table = ledger.allocate(3)
    assert table is not None
    fork = ledger.fork(table, 6)
    assert fork is not None
    assert fork.blocks[0] == table[0]
    assert fork.blocks[1] not in table
    assert fork.copies == ((table[1], fork.blocks[1]),)
    ledger.check([table, fork.blocks])


def test_a_fork_at_a_block_boundary_copies_nothing() -> None:
    ledger = BlockLedger(num_blocks=4, block_size=4)
    table = ledger.allocate(3)
    assert table is not None
    fork = ledger.fork(table, 8)
    assert fork is not None
    assert (fork.blocks, fork.copies) == (table[:2], ())
    assert ledger.fork(table, 9) is None
    ledger.check([table, fork.blocks])


def test_a_fork_of_more_than_the_table_holds_is_a_bug() -> None:
    ledger = BlockLedger(num_blocks=4, block_size=4)
    with pytest.raises(AssertionError, match="do not hold"):
        ledger.fork((), 1)


def test_check_finds_a_reference_without_a_holder() -> None:
    ledger = BlockLedger(num_blocks=4, block_size=4)
    table = ledger.allocate(2)
    assert table is not None
    with pytest.raises(AssertionError, match="no holder"):
        ledger.check([table[:1]])


@pytest.mark.parametrize(("num_blocks", "block_size"), [(1, 4), (4, 0)])
def test_a_cache_that_holds_nothing_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        BlockLedger(num_blocks=num_blocks, block_size=block_size)


class BlockMachine(RuleBasedStateMachine):
    """Tables come, fork and go; the ledger agrees with the list of tables."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = BlockLedger(num_blocks=10, block_size=3)
        self.tables: list[tuple[int, ...]] = []

    @rule(num_blocks=st.integers(0, 11))
    def allocate(self, num_blocks: int) -> None:
        num_free = self.ledger.num_free
        blocks = self.ledger.allocate(num_blocks)
        assert (blocks is None) == (num_blocks > num_free)
        if blocks is not None:
            assert not set(blocks) & {block for table in self.tables for block in table}
            self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        num_positions = data.draw(st.integers(0, 3 * len(table)))
        fork = self.ledger.fork(table, num_positions)
        if fork is None:
            assert num_positions % 3 != 0
            assert self.ledger.num_free == 0
            return
        assert len(fork.blocks) == -(-num_positions // 3)
        changed = [(a, b) for a, b in zip(table, fork.blocks, strict=False) if a != b]
        assert tuple(changed) == fork.copies
        self.tables.append(fork.blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.ledger.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @invariant()
    def books_agree(self) -> None:
        self.ledger.check(self.tables)

    def teardown(self) -> None:
        for table in self.tables:
            self.ledger.release(table)
        assert self.ledger.num_free == self.ledger.capacity


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
