"""The rows of an example are its own: they depend on no batch, no shard and no other example."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model
from torch.testing import assert_close

from spd_dist.config import Calibrate
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.models.kv_sites import discover_sites
from spd_dist.stages.calibrate import calibrate
from spd_dist.stages.context import StageContext
from spd_dist.tracking.progress import Progress
from spd_dist.types import SupervisedExample

ALONE = World(0, 1, torch.device("cpu"))
PAD = 0


def policy_of(model):
    return SimpleNamespace(model=model, engine=None, pad_token_id=PAD)


def random_examples(lengths, seed=0):
    """The last tokens but one are supervised, and one in the middle; a pad id among the tokens is an ordinary token."""
    generator = torch.Generator().manual_seed(seed)
    return [
        SupervisedExample(
            str(index),
            (*torch.randint(3, 259, (length - 1,), generator=generator).tolist(), PAD),
            (length // 2, length - 2),
            num_tokens_after=index,
        )
        for index, length in enumerate(lengths)
    ]


EXAMPLES = random_examples([7, 19, 12, 30, 9, 24, 15, 11])


def run(model, examples=EXAMPLES, world=ALONE, **settings):
    config = Calibrate(**{"num_shards": 1} | settings)
    return list(calibrate(policy_of(model), examples, discover_sites(model), config, StageContext(Path(), 0, world)))


def rows_by_length(batches):
    """Rows of each example, which its length tells, at all sites: within a shard the longest comes first."""
    rows = {site: torch.cat([batch.grad_ND[site] for batch in batches]) for site in batches[0].grad_ND}
    lengths = sorted((len(example.tokens) for example in EXAMPLES), reverse=True)
    split = [torch.split(grad_ND, lengths) for grad_ND in rows.values()]
    return dict(zip(lengths, (torch.cat(parts, dim=1) for parts in zip(*split, strict=True)), strict=True))


def by_plain_autograd(model, example):
    """Mean loss of the targets, a backward pass through everything, gradients at the outputs of k_proj and v_proj."""
    sites, outputs = discover_sites(model), {}
    handles = []
    for site in sites:
        module = model.get_submodule(site.module)
        handles.append(module.register_forward_hook(lambda *io, name=site.module: outputs.update({name: io[2]})))
    logits = model.requires_grad_(True)(torch.tensor([example.tokens])).logits[0].log_softmax(-1)
    for output in outputs.values():
        output.retain_grad()
    (-sum(logits[target - 1, example.tokens[target]] for target in example.targets) / len(example.targets)).backward()
    for handle in handles:
        handle.remove()
    return torch.cat([outputs[site.module].grad[0] for site in sites], dim=1)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_rows_are_those_of_plain_autograd_whatever_the_batch(batch_size):
    found = rows_by_length(run(tiny_model(), batch_size=batch_size))
    for example in EXAMPLES:
        expected = by_plain_autograd(tiny_model(), example)
        assert_close(found[len(example.tokens)], expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_batch_size_1_and_8_give_the_same_rows():
    model = tiny_model()
    one, eight = rows_by_length(run(model, batch_size=1)), rows_by_length(run(model, batch_size=8))
    for length, rows in one.items():
        assert_close(eight[length], rows, rtol=0, atol=1e-6)
    whole = torch.cat(list(one.values()))
    assert (torch.cat(list(eight.values())) - whole).norm() < 1e-6 * whole.norm()


def test_in_double_precision_the_batch_changes_nothing_but_the_last_digits():
    model = tiny_model().double()
    one, eight = rows_by_length(run(model, batch_size=1)), rows_by_length(run(model, batch_size=8))
    for length, rows in one.items():
        assert (eight[length] - rows).norm() < 1e-14 * rows.norm()


def test_checkpointing_changes_nothing():
    model = tiny_model()
    plain, recomputed = rows_by_length(run(model)), rows_by_length(run(model, checkpointing=True))
    for length, rows in plain.items():
        assert_close(recomputed[length], rows, rtol=0, atol=1e-6 * rows.abs().max().item())


def test_every_token_is_a_row_or_counted_as_zero():
    batches = run(tiny_model(), num_shards=3, batch_size=2)
    assert [batch.shard for batch in batches] == [0, 0, 1, 1, 2]
    for batch in batches:
        assert {len(grad_ND) for grad_ND in batch.grad_ND.values()} == {batch.num_tokens}
    by_shard = {shard: [batch for batch in batches if batch.shard == shard] for shard in range(3)}
    for shard, found in by_shard.items():
        members = EXAMPLES[shard::3]
        assert sum(batch.num_tokens for batch in found) == sum(len(example.tokens) for example in members)
        assert sum(batch.num_zero_rows for batch in found) == sum(example.num_tokens_after for example in members)


def test_cutting_after_the_last_target_loses_only_zero_rows():
    model, sites = tiny_model(), discover_sites(tiny_model())
    tokens = EXAMPLES[3].tokens
    whole, cut = (
        SupervisedExample("whole", tokens, (5, 9)),
        SupervisedExample("cut", tokens[:10], (5, 9), len(tokens) - 10),
    )
    (of_whole,), (of_cut,) = run(model, [whole]), run(model, [cut])
    for site in sites:
        assert not of_whole.grad_ND[site][9:].any()
        assert_close(of_whole.grad_ND[site][:10], of_cut.grad_ND[site], rtol=0, atol=1e-7)
    assert of_cut.num_tokens + of_cut.num_zero_rows == of_whole.num_tokens


def test_shards_are_dealt_out_to_ranks():
    model = tiny_model()
    whole = run(model, num_shards=4, batch_size=2)
    dealt = [run(model, world=World(rank, 3, torch.device("cpu")), num_shards=4, batch_size=2) for rank in range(3)]
    assert [[batch.shard for batch in batches] for batches in dealt] == [[0, 3], [1], [2]]
    for batches in dealt:
        for batch in batches:
            (same,) = [other for other in whole if other.shard == batch.shard]
            assert all(torch.equal(grad_ND, same.grad_ND[site]) for site, grad_ND in batch.grad_ND.items())


def test_a_rank_without_examples_yields_nothing():
    assert run(tiny_model(), world=World(5, 8, torch.device("cpu")), num_shards=4) == []


def test_progress_counts_examples_and_tokens():
    model, config, progress = (
        tiny_model(),
        Calibrate(num_shards=1, batch_size=3),
        Progress("calibrate", None, "examples"),
    )
    list(
        calibrate(
            policy_of(model), EXAMPLES, discover_sites(model), config, StageContext(Path(), 0, ALONE, progress=progress)
        )
    )
    assert progress.done == progress.total == len(EXAMPLES)
    assert progress.tokens == sum(len(example.tokens) for example in EXAMPLES)


@pytest.mark.parametrize("targets", [(), (0, 3), (3, 7)])
def test_targets_that_nothing_predicts_are_refused(targets):
    bad = SupervisedExample("bad", EXAMPLES[0].tokens, targets)
    with pytest.raises(DataError, match=r"calibration example bad: targets .* one or more positions from 1 to 6"):
        run(tiny_model(), [EXAMPLES[1], bad])


def test_a_loss_that_is_not_finite_is_named_and_spoils_no_other_example(caplog):
    model = tiny_model()
    model.model.embed_tokens.weight.data[258] = float("nan")
    model.lm_head.weight = torch.nn.Parameter(tiny_model().lm_head.weight.data.clone())
    bad = SupervisedExample("bad", (258, 7, 8, 9), (2, 3))
    (batch,) = run(model, [bad, SupervisedExample("good", (5, 6, 7), (1, 2))])
    assert "loss is not finite" in caplog.text
    assert "'bad': nan" in caplog.text
    assert caplog.records[-1].levelno == logging.ERROR
    for grad_ND in batch.grad_ND.values():
        assert not grad_ND[:4].isfinite().all()
        assert grad_ND[4:].isfinite().all()
        assert grad_ND[4:].any()


def test_a_reader_that_stops_early_leaves_the_model_as_it_was():
    model = tiny_model().requires_grad_(True)
    config, context = Calibrate(num_shards=2, batch_size=1), StageContext(Path(), 0, ALONE)
    gradients = calibrate(policy_of(model), EXAMPLES, discover_sites(model), config, context)
    next(gradients)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    gradients.close()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
