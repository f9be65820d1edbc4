"""The paged memory keeps what it is given, where it was told to."""

from __future__ import annotations

import pytest
import torch

from peft_serve.model.pools import KVPool, KVShape, places_of

SHAPE = KVShape(num_layers=3, num_heads=2, head_dim=5)


def pool(num_blocks: int = 8) -> KVPool:
    return KVPool(SHAPE, num_blocks=num_blocks, block_size=4, dtype=torch.float32, device=torch.device("cpu"))


def test_a_block_costs_keys_and_values_of_all_layers() -> None:
    assert SHAPE.bytes_per_block(4, torch.float32) == 2 * 3 * 2 * 5 * 4 * 4
    assert SHAPE.bytes_per_block(4, torch.bfloat16) == 2 * 3 * 2 * 5 * 4 * 2
    assert SHAPE.num_blocks(10_000, 4, torch.float32) == 10


def test_what_is_written_is_gathered_by_block_table() -> None:
    some = pool()
    places = torch.tensor(places_of((3, 6), 2, 4, 4))
    assert places.tolist() == [14, 15, 24, 25]
    k, v = torch.randn(4, 2, 5), torch.randn(4, 2, 5)
    some.write(1, places, k, v)
    got_k, got_v = some.gather(1, torch.tensor([3, 6, 0, 0]), num_rows=2)
    assert got_k.shape == (2, 2, 8, 5)
    assert torch.equal(got_k[0, :, 2:6].transpose(0, 1), k)
    assert torch.equal(got_v[0, :, 2:6].transpose(0, 1), v)
    assert not got_k[1].any()
    assert not some.gather(0, torch.tensor([3]), num_rows=1)[0].any()
    some.check()


def test_stored_prefixes_are_read_back_and_the_rest_of_their_blocks_is_zero() -> None:
    some = pool()
    full = torch.full((3, 2, 8, 5), 9.0)
    some.store((2, 5), full, full)
    keys, values = torch.randn(3, 2, 6, 5), torch.randn(3, 2, 6, 5)
    some.store((2, 5), keys, values)
    got_keys, got_values = some.read((2, 5), 8)
    assert torch.equal(got_keys[:, :, :6], keys)
    assert torch.equal(got_values[:, :, :6], values)
    assert not got_keys[:, :, 6:].any()
    some.check()


def test_copies_are_of_whole_blocks_and_clearing_touches_no_other() -> None:
    some = pool()
    keys = torch.randn(3, 2, 8, 5)
    some.store((1, 2), keys, keys)
    some.copy(((2, 7),))
    some.clear((2,))
    assert torch.equal(some.read((1, 7), 8)[0], keys)
    assert not some.read((2,), 4)[0].any()


def test_the_padding_block_is_never_written() -> None:
    some = pool()
    with pytest.raises(AssertionError, match="padding"):
        some.copy(((1, 0),))
    some.write(0, torch.tensor([1]), torch.ones(1, 2, 5), torch.ones(1, 2, 5))
    with pytest.raises(AssertionError, match="padding block"):
        some.check()


def test_a_pool_without_room_says_so() -> None:
    with pytest.raises(ValueError, match="more bytes"):
        pool(num_blocks=1)
    with pytest.raises(AssertionError, match="do not cover"):
        places_of((1, 2), 0, 9, 4)
