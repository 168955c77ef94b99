"""What is supervised, which sequences make a step, and who runs them: properties that hold for any corpus."""

import dataclasses

import pytest
import torch
from finetuning import completions
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from transformers import get_cosine_schedule_with_warmup

from spd_dist.config import Finetune
from spd_dist.errors import ConfigError, DataError
from spd_dist.overrides import load_config
from spd_dist.stages.finetune.batching import collate, global_batches, micro_batches
from spd_dist.stages.finetune.checkpoints import State
from spd_dist.stages.finetune.sequences import TrainingSequence, held_out, lengths_of, training_sequences
from spd_dist.stages.finetune.training import learning_rate_fraction
from spd_dist.storage.tables import Table, write_table
from spd_dist.types import Completion

EOS = tiny_tokenizer().eos_token_id
PAD_IS_EOS = EOS


def labels_of(sequence: TrainingSequence) -> list[int]:
    batch = collate([[0]], [sequence], lambda _: 0, pad_token_id=PAD_IS_EOS)
    return batch.label_N.tolist()


def test_both_parts_are_supervised_and_eos_exactly_where_the_policy_ended():
    for one, sequence in zip(
        completions(), training_sequences(completions(), Finetune(), pad_token_id=PAD_IS_EOS), strict=True
    ):
        labels = labels_of(sequence)
        assert tuple(labels) == (one.prompt_tokens + one.tokens)[1:]
        assert labels.count(EOS) == (one.finish_reason == "stop")


def test_only_the_completion_is_supervised_on_request():
    config = Finetune(loss_on="completion")
    for one, sequence in zip(
        completions(), training_sequences(completions(), config, pad_token_id=PAD_IS_EOS), strict=True
    ):
        assert tuple(labels_of(sequence)) == one.tokens


def test_long_sequences_are_cut_and_their_end_is_not_supervised():
    [sequence] = training_sequences(
        [Completion("a", 0, 0, (5, 6, 7), (8, 9, EOS), "", "stop")], Finetune(max_tokens=5), pad_token_id=0
    )
    assert labels_of(sequence) == [6, 7, 8, 9]


def test_the_prototype_trains_on_pads_that_attention_does_not_see():
    config = Finetune(pads_in_loss=True, max_tokens=9)
    sequences = training_sequences(
        [Completion("a", 0, 0, (5, 6), (8, EOS), "", "stop")], config, pad_token_id=PAD_IS_EOS
    )
    batch = collate([[0]], sequences, lambda _: 0, pad_token_id=PAD_IS_EOS)
    assert batch.label_N.tolist() == [6, 8, EOS] + [PAD_IS_EOS] * 5
    assert batch.context["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0, 0]]


def test_a_corpus_without_a_supervised_token_is_an_error():
    nothing = [Completion("a", 0, 0, (5, 6, 7), (), "", "length")]
    with pytest.raises(
        DataError, match=r"generate/completions: 1 completions hold no token .* raise finetune\.max_tokens"
    ):
        training_sequences(nothing, Finetune(loss_on="completion"), pad_token_id=0)


def test_what_is_cut_before_its_first_target_is_left_out():
    rows = [Completion(name, 0, 0, (5,) * num, (8, EOS), "", "stop") for name, num in (("a", 9), ("b", 2), ("c", 4))]
    config = Finetune(loss_on="completion", max_tokens=5)
    sequences = training_sequences(rows, config, pad_token_id=0)
    assert list(sequences) == list(training_sequences(rows[1:], config, pad_token_id=0))
    assert [(one.id, labels_of(one)) for one in sequences] == [("b/0", [8, EOS]), ("c/0", [8])]
    assert collate([[0, 1]], sequences, lambda _: 0, pad_token_id=0).label_N.tolist() == [8, EOS, 8]


def test_the_held_out_part_is_drawn_once_and_never_everything():
    ten = [Completion(str(index), 0, 0, (1, 2), (3,), "", "stop") for index in range(10)]
    sequences = training_sequences(ten, Finetune(), pad_token_id=0)
    train, validation = held_out(sequences, 0.3, torch.Generator().manual_seed(0))
    assert len(validation) == 3
    assert sorted([*train, *validation], key=lambda one: one.id) == list(sequences)
    assert len(held_out(sequences, 0.0, torch.Generator())[1]) == 0
    one = training_sequences(ten[:1], Finetune(), pad_token_id=0)
    assert [list(part) for part in held_out(one, 0.5, torch.Generator())] == [list(one), []]


@pytest.mark.parametrize("loss_on", ["prompt_and_completion", "completion"])
@pytest.mark.parametrize("pads_in_loss", [False, True])
def test_a_table_on_disk_is_trained_on_as_a_list_is(tmp_path, loss_on, pads_in_loss):
    corpus = [*completions(), Completion("empty", 0, 0, (), (), "", "length")]
    write_table(tmp_path / "completions.arrow", Completion, corpus, digest="a hash")
    config = Finetune(loss_on=loss_on, pads_in_loss=pads_in_loss, max_tokens=12)
    [listed, mapped] = [
        training_sequences(rows, config, pad_token_id=0)
        for rows in (corpus, Table(Completion, [tmp_path / "completions.arrow"]))
    ]
    assert list(mapped) == list(listed)
    for sequences in (listed, mapped):
        assert lengths_of(sequences) == lengths_of(list(sequences))
        assert sequences.num_targets_N.tolist() == [one.num_targets for one in sequences]


corpora = st.lists(st.integers(2, 40), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(lengths=corpora, size=st.integers(1, 9), grouped=st.booleans(), seed=st.integers(0, 99))
def test_an_epoch_holds_every_sequence_once_in_batches_of_the_global_size(lengths, size, grouped, seed):
    config = Finetune(global_batch_size=size, length_grouping=grouped)
    batches = global_batches(lengths, config, torch.Generator().manual_seed(seed))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size)
    assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1)


def test_grouping_puts_similar_lengths_together():
    lengths = torch.randint(5, 500, (400,), generator=torch.Generator().manual_seed(0)).tolist()

    def padded_share(grouped: bool) -> float:
        batches = global_batches(
            lengths, Finetune(global_batch_size=8, length_grouping=grouped), torch.Generator().manual_seed(1)
        )
        return 1 - sum(lengths) / sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)

    assert padded_share(grouped=True) < 0.05 < 0.3 < padded_share(grouped=False)


@settings(max_examples=100, deadline=None)
@given(lengths=corpora, micro=st.integers(1, 5), ranks=st.integers(1, 5), packing=st.booleans())
def test_every_sequence_of_a_batch_runs_once_and_all_ranks_take_part_in_every_round(lengths, micro, ranks, packing):
    config = Finetune(micro_batch_size=micro, packing=packing, max_tokens=40)
    rounds = micro_batches(range(len(lengths)), lengths, config, ranks)
    assert all(len(slots) == ranks for slots in rounds)
    micros = [slot for slots in rounds for slot in slots]
    assert sorted(index for slot in micros for row in slot for index in row) == list(range(len(lengths)))
    rows = [row for slot in micros for row in slot]
    assert all(sum(lengths[index] for index in row) <= 40 for row in rows)
    assert all(len(slot) <= micro for slot in micros)
    assert packing or all(len(row) == 1 for row in rows)
    assert max(map(len, micros)) - min(map(len, micros)) <= 1


@settings(max_examples=60, deadline=None)
@given(lengths=corpora)
def test_packed_rows_hold_what_the_sequences_hold(lengths):
    sequences = [
        TrainingSequence(str(index), tuple(range(3, 3 + length)), 1, length) for index, length in enumerate(lengths)
    ]
    config = Finetune(micro_batch_size=100, packing=True, max_tokens=64)
    [[rows]] = micro_batches(range(len(lengths)), lengths, config, 1)
    batch = collate(rows, sequences, lambda index: 1000 + index, pad_token_id=0)
    flat = batch.token_BT.flatten()
    assert torch.equal(flat[batch.source_N + 1], batch.label_N)
    assert torch.equal(batch.position_BT.flatten()[batch.source_N], flat[batch.source_N] - 3)
    assert torch.equal(batch.seed_BT.flatten()[batch.source_N], 1000 + batch.owner_N)
    assert torch.bincount(batch.owner_N, minlength=len(lengths)).tolist() == [length - 1 for length in lengths]
    assert batch.num_tokens == sum(lengths)


def test_for_flash_attention_all_rows_become_one_with_the_ends_of_its_sequences():
    sequences = [TrainingSequence(str(length), tuple(range(3, 3 + length)), 1, length) for length in (4, 7, 2)]
    batch = collate([[0], [1, 2]], sequences, lambda _: 0, pad_token_id=0, varlen=True)
    assert batch.token_BT.tolist() == [[*range(3, 7), *range(3, 10), 3, 4]]
    assert batch.context["cu_seq_lens_q"].tolist() == batch.context["cu_seq_lens_k"].tolist() == [0, 4, 11, 13]
    assert batch.context["max_length_q"] == batch.context["max_length_k"] == 7
    assert batch.context["position_ids"].tolist() == [[*range(4), *range(7), 0, 1]]
    assert batch.label_N.tolist() == [4, 5, 6, *range(4, 10), 4]


@pytest.mark.parametrize(("words", "message"), [
    (["finetune.keep_best=true"], r"finetune\.keep_best: true is not valid with .* set finetune\.validation_fraction"),
    (["finetune.patience=2"], r"finetune\.patience: 2 is not valid with .*validation loss"),
    (["finetune.keep_every=70"], r"finetune\.keep_every: 70 .* a multiple of finetune\.checkpoint_every=50"),
])  # fmt: skip
def test_settings_that_need_each_other_are_checked_first(words, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=words)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (10, 0), (30, 4), (7, 7)])
def test_the_schedule_is_that_of_transformers(steps, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps):
        expected = reference.get_last_lr()[0]
        assert learning_rate_fraction(step, num_steps=steps, num_warmup_steps=warmup) == pytest.approx(
            expected, abs=1e-12
        )
        optimizer.step()
        reference.step()


def test_patience_counts_epochs_since_the_best_one():
    state = State()
    judged = []
    for step, loss in enumerate([3.0, 2.0, 2.5, 1.5, 1.6, 1.7], 1):
        state.step = step
        judged.append((state.judge(loss, patience=2), state.stopped_early))
    assert judged == [(True, False), (True, False), (False, False), (True, False), (False, False), (False, True)]
    assert (state.best_loss, state.best_step) == (1.5, 4)
    assert State(**dataclasses.asdict(state)) == state
