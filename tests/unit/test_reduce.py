"""Merging is a sum: its laws, on one rank."""

import itertools
from dataclasses import replace

import pytest
import torch
from gradients import ALONE, kv_site, power_law, sketch_of

from spd_dist.config import Reduce
from spd_dist.errors import DataError
from spd_dist.stages.reduce import reduce
from spd_dist.types import Certificate

SITE = kv_site(width=12)
ROWS = [power_law(num_rows, 12, decay=0.5, seed=seed) for seed, num_rows in enumerate((90, 200, 31))]
SKETCHES = [sketch_of(rows_ND, 5) for rows_ND in ROWS]


def merged(sketches, tolerance: float = 1e-9):
    return reduce(sketches, [SITE], Reduce(energy_tolerance=tolerance), num_shards=4, world=ALONE)[SITE]


def test_certificates_add_up_and_bound_the_error_of_the_sum():
    total = merged(dict(enumerate(SKETCHES)))
    parts = [state[SITE] for state in SKETCHES]
    assert total.certificate.delta == pytest.approx(sum(part.certificate.delta for part in parts))
    assert total.certificate.num_rows == 321
    assert isinstance(total.certificate.num_rows, int)
    exact_DD = sum(rows_ND.T @ rows_ND for rows_ND in ROWS)
    errors = [rows_ND.T @ rows_ND - part.gram_DD for rows_ND, part in zip(ROWS, parts, strict=True)]
    torch.testing.assert_close(exact_DD - total.gram_DD, sum(errors), rtol=1e-9, atol=1e-9)
    error_D = torch.linalg.eigvalsh(exact_DD - total.gram_DD)
    assert -1e-9 <= error_D.min() <= error_D.max() <= total.certificate.delta + 1e-9
    torch.testing.assert_close(total.sum_D, sum(rows_ND.sum(0) for rows_ND in ROWS))


def test_any_split_of_the_rows_over_shards_gives_one_answer_within_the_certificates():
    rows_ND = torch.cat(ROWS)
    answers = [merged({0: sketch_of(rows_ND, 5)})]
    for order in itertools.permutations(range(3)):
        answers.append(merged({shard: SKETCHES[index] for shard, index in enumerate(order)}))
    for first, second in itertools.combinations(answers, 2):
        gap = torch.linalg.matrix_norm(first.gram_DD - second.gram_DD, 2).item()
        assert gap <= max(first.certificate.delta, second.certificate.delta) + 1e-9


def test_shards_without_examples_change_no_bit():
    alone, beside_empty = merged({2: SKETCHES[0]}), merged({2: SKETCHES[0], 3: sketch_of(torch.zeros(0, 12), 5)})
    assert torch.equal(alone.gram_DD, SKETCHES[0][SITE].gram_DD)
    assert torch.equal(beside_empty.gram_DD, alone.gram_DD)
    assert beside_empty.certificate == alone.certificate == SKETCHES[0][SITE].certificate
    assert merged({}).certificate == Certificate()


@pytest.mark.parametrize("field", ["energy", "lost_energy"])
@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_energy_that_does_not_add_up_fails(field, wrong):
    moments = SKETCHES[0][SITE]
    spoiled = replace(moments.certificate, **{field: getattr(moments.certificate, field) * wrong})
    message = r"layers\.0\.key: the sketch lost track of its energy: in .*, kept .*, lost .*reduce\.energy_tolerance"
    with pytest.raises(DataError, match=message):
        merged({0: {SITE: replace(moments, certificate=spoiled)}}, 1e-6)


def test_a_shard_at_the_wrong_rank_is_refused():
    with pytest.raises(DataError, match=r"rank 0 of 1 holds shard 4, and owns \[0, 1, 2, 3\] of 4 shards"):
        merged({4: SKETCHES[0]})
