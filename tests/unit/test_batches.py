"""Micro-batches hold every example once, whatever the number of ranks."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from spd_dist.data.batches import Division, micro_batches, num_micro_batches, owned_shards, pad
from spd_dist.types import SupervisedExample


def example(index, length=4):
    return SupervisedExample(str(index), tuple(range(1, length + 1)), (length - 1,))


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 5), st.integers(1, 10))
def test_ranks_share_the_examples_without_mixing_shards(num_examples, num_shards, batch_size, world_size):
    examples = [example(index, 2 + index * 7 % 5) for index in range(num_examples)]
    alone = list(micro_batches(examples, Division(num_shards, batch_size)))
    together = []
    for rank in range(world_size):
        sizes = {"num_shards": num_shards, "batch_size": batch_size, "rank": rank, "world_size": world_size}
        mine = list(micro_batches(examples, Division(**sizes)))
        assert len(mine) == num_micro_batches(num_examples, Division(**sizes))
        assert {batch.shard for batch in mine} <= set(owned_shards(num_shards, rank, world_size))
        together += mine
    assert sorted(together, key=lambda batch: batch.shard) == alone
    assert all(int(member.id) % num_shards == batch.shard for batch in alone for member in batch.examples)
    assert sorted(int(member.id) for batch in alone for member in batch.examples) == list(range(num_examples))
    assert all(0 < len(batch.examples) <= batch_size for batch in alone)


def test_padding_is_told_by_position_and_not_by_id():
    first = SupervisedExample("a", (5, 0, 6), (1, 2))  # 0 is the pad id, and a token of this example
    second = SupervisedExample("b", (7, 8, 9, 0, 4), (4,))
    batch = pad([first, second], pad_token_id=0)
    assert batch.tokens_BT.tolist() == [[5, 0, 6, 0, 0], [7, 8, 9, 0, 4]]
    assert batch.attention_BT.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.target_BT.nonzero().tolist() == [[0, 1], [0, 2], [1, 4]]
    assert batch.tokens_BT.dtype == batch.attention_BT.dtype == torch.long


def test_a_micro_batch_counts_tokens_and_no_pads():
    batch = next(micro_batches([example(0, 3), example(1, 5)], Division(1, 2)))
    assert batch.num_tokens == 8
    assert [member.id for member in batch.examples] == ["1", "0"]
