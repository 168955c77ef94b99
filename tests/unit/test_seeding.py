import torch

from spd_dist.seeding import generator, row_seed, seed_of


def test_a_name_gives_the_same_draws_whatever_was_drawn_before():
    first = torch.rand(4, generator=generator(42, "generate", 3))
    torch.rand(7)
    assert torch.equal(first, torch.rand(4, generator=generator(42, "generate", 3)))


def test_seed_and_every_name_matter():
    seeds = [seed_of(*names) for names in [(1,), (2,), (1, "a"), (1, "b"), (1, "a", "b"), (1, "ab"), (1, "1"), (1, 1)]]
    assert len(set(seeds)) == len(seeds)


def test_names_do_not_run_into_each_other():
    assert seed_of(0, "a", "bc") != seed_of(0, "ab", "c")
    assert row_seed(0, "p1", 11) != row_seed(0, "p11", 1)


def test_row_seeds_fit_63_bits_and_fill_them():
    seeds = [row_seed(42, f"prompt-{index}", sample) for index in range(500) for sample in range(2)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62


def test_row_seeds_never_change_between_versions():
    assert row_seed(42, "arithmetic-0", 0) == 3022648613996882416
