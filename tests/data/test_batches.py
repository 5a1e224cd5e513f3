import pytest
import torch

from data.dataset import GlobalBatches
from runtime.seeds import derive_seed


def batches(world: int, rank: int, steps: range = range(10), length: int = 23, size: int = 12):
    return list(GlobalBatches(length, size, rank=rank, world=world, seed=3, steps=steps))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_global_batches_do_not_depend_on_the_number_of_ranks(world):
    ranks = [batches(world, rank) for rank in range(world)]
    joined = [sum((rank[step] for rank in ranks), []) for step in range(10)]
    assert joined == batches(1, 0)
    assert {len(rank[0]) for rank in ranks} == {12 // world}


def test_every_image_appears_once_an_epoch():
    keys = sum(batches(1, 0, range(23)), [])
    for epoch in range(12):
        assert sorted(index for e, index in keys if e == epoch) == list(range(23))


def test_epochs_are_shuffled_differently():
    keys = sum(batches(1, 0, range(23)), [])
    orders = {tuple(index for e, index in keys if e == epoch) for epoch in range(12)}
    assert len(orders) == 12


def test_starting_later_serves_the_same_steps():
    assert batches(1, 0, range(6, 10)) == batches(1, 0)[6:]


def test_a_data_set_smaller_than_a_batch_works():
    keys = batches(1, 0, range(2), length=5, size=8)
    assert [len(b) for b in keys] == [8, 8] and keys[0][5][0] == 1


@pytest.mark.parametrize(("length", "size", "world"), [(23, 12, 3), (5, 24, 2), (1, 4, 1)])
def test_keys_are_those_of_each_position(length, size, world):
    """One by one: the position in the stream gives the epoch, and the place in its order."""
    orders = [
        torch.randperm(length, generator=torch.Generator().manual_seed(derive_seed("order", 3, epoch))).tolist()
        for epoch in range(10 * size // length + 1)
    ]
    for rank in range(world):
        for step, keys in enumerate(batches(world, rank, length=length, size=size)):
            positions = range(step * size + rank * size // world, step * size + (rank + 1) * size // world)
            assert keys == [(p // length, orders[p // length][p % length]) for p in positions]
