"""The mechanism test: rows scored as by hand, controls as they say, matched distortions, ranks and corrections."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import save_tiny_model, tiny_model, tiny_tokenizer
from torch.testing import assert_close

from spd_dist.analysis.mechanism_verdict import (
    ExploredComparison,
    MatchedKL,
    MatchedPair,
    MechanismResult,
    explored_lines,
    max_statistic_p_values,
    num_at_least_as_low,
    rank_correlation,
    rank_p_value,
    sentence,
)
from spd_dist.analysis.subspace_algebra import overlap
from spd_dist.config import Calibrate, Config, Data, Mechanism, Model, Project
from spd_dist.data.arithmetic import generate_rows
from spd_dist.data.held_out import held_out_rows, make_held_out, shuffled_examples, wrong_examples, wrong_values
from spd_dist.data.prompts import make_examples
from spd_dist.data.tasks import find_task
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError, DataError
from spd_dist.inference.packed_weights import packed_weights
from spd_dist.mechanism.comparisons import check_other, own_subspace, planned
from spd_dist.mechanism.controls import (
    CONTROLS,
    Material,
    chosen_controls,
    control_subspace,
    equal_energy_subspace,
    needs_moments,
    random_subspace,
    strongest,
)
from spd_dist.mechanism.mechanism_stage import check, found_candidates
from spd_dist.models.kv_sites import discover_sites
from spd_dist.projection.hooks import projected
from spd_dist.stages.calibrate import calibrate, gradient_moments
from spd_dist.stages.context import StageContext
from spd_dist.stages.distortion.matching import blended, match
from spd_dist.stages.distortion.measurement import Measurement, Passes, Variant, base
from spd_dist.stages.distortion.scoring import ScoredBatch, SharedPrefix, log_probabilities, row_values, scored_logits
from spd_dist.stages.project import projection, site_summaries, subspace
from spd_dist.stages.project.subspace import DIRECTIONS
from spd_dist.types import Certificate, SiteMoments, SiteSubspace, Subspace

CPU = torch.device("cpu")
TASK = find_task("arithmetic")
TOKENIZER = tiny_tokenizer()
ROWS = generate_rows("test", 42)[:6]
ALONE = World(0, 1, CPU)


@pytest.fixture(scope="module")
def policy():
    return SimpleNamespace(model=tiny_model(), engine=None, pad_token_id=0, tokenizer=TOKENIZER, name="tiny")


@pytest.fixture(scope="module")
def held_out():
    return {form: make_held_out(ROWS, TASK, TOKENIZER, Data(), form, kl_positions=5) for form in ("task", "bare")}


@pytest.fixture(scope="module")
def material(policy):
    examples, _ = make_examples(ROWS, TASK, TOKENIZER, Data(), Calibrate())
    sites = discover_sites(policy.model)
    context = StageContext(Path(), 0, ALONE)
    own = gradient_moments(policy, examples, sites, Calibrate(num_shards=2, batch_size=2), context)
    wrong = wrong_examples(ROWS, TASK, TOKENIZER, Data(), Calibrate(), 0)
    of_wrong = gradient_moments(policy, wrong, sites, Calibrate(), context).gradient
    parts = {}
    for site in sites:
        value_D = torch.linalg.eigvalsh(own.gradient[site]).flip(0).clamp_min(0)
        parts[site] = SiteSubspace(strongest(own.gradient[site], 8).float(), value_D, 0.5, Certificate())
    return Material(Subspace(parts), tuple(CONTROLS), own, own.gradient, own.gradient, of_wrong, Subspace(parts))


@pytest.mark.parametrize("insertion", ["linear", "head"])
def test_a_run_can_be_held_to_the_directions_whose_removal_raises_the_loss(material, insertion):
    gradient = material.calibration.gradient
    owned = {site: SiteMoments(moment_DD, moment_DD[0], Certificate()) for site, moment_DD in gradient.items()}
    config = Project(directions="gradient_x_activation", insertion=insertion)
    found = subspace(owned, list(gradient), config, ALONE, other=material.calibration.ranked_by(config.directions))
    assert found.metadata["directions"] == "gradient_x_activation"
    candidate = control_subspace("gradient_x_activation", material.spd, material)
    for site, part in found.sites.items():
        basis_DR, moment_DD = part.basis_DR.double(), gradient[site]
        kept_DR = basis_DR @ basis_DR.T @ candidate.sites[site].basis_DR.double()
        if insertion == "linear":  # the candidate is cut of the whole width
            torch.testing.assert_close(kept_DR.float(), candidate.sites[site].basis_DR, atol=1e-5, rtol=0)
        else:
            assert (part.basis_DR.view(2, 8, -1) != 0).any(1).sum(0).tolist() == [1] * 8
        assert part.energy_fraction == pytest.approx((basis_DR.T @ moment_DD @ basis_DR).trace() / moment_DD.trace())
        value_D = torch.linalg.eigvalsh(moment_DD).flip(0)
        torch.testing.assert_close(part.eigenvalue_D.sum(), value_D.sum())
    (summary, *_) = site_summaries(found, sketch_sizes={16: 16}).values()
    assert (summary.certified_energy_share, summary.angle_bound) == (0.0, "not certified")
    by_size = Project(directions="activation", insertion=insertion)
    found = subspace(owned, list(gradient), by_size, ALONE, other=material.calibration.ranked_by("activation"))
    assert found.metadata["directions"] == "activation"
    if insertion == "linear":
        control = control_subspace("activation_pca", material.spd, material)
        for site, part in found.sites.items():
            assert overlap(part, control.sites[site]) == pytest.approx(1), "the mechanism test's control, to train with"
    plain = subspace(owned, list(gradient), Project(), ALONE)
    assert "directions" not in plain.metadata


def whole_log_probabilities(policy, row, hold=None):
    """Of every next token of one row, without padding."""
    tokens = torch.tensor([row.example.tokens])
    with torch.no_grad():
        if hold is None:
            return policy.model(tokens).logits[0].log_softmax(-1)
        with projected(policy.model, hold):
            return policy.model(tokens).logits[0].log_softmax(-1)


def key_projection(material, **settings):
    keys = {site: part for site, part in material.spd.sites.items() if site.kind == "key"}
    return projection(Subspace(keys), Project(**settings), 0)


def test_a_row_is_divided_into_prompt_solution_and_answer(held_out):
    for form, rows in held_out.items():
        for row, raw in zip(rows, ROWS, strict=True):
            said = {
                part: TOKENIZER.decode(
                    [row.example.tokens[t] for t, p in zip(row.example.targets, row.parts, strict=True) if p == part]
                )
                for part in ("solution", "answer")
            }
            assert said["answer"].strip() == raw["answer"]
            assert "####" in said["solution"]
            assert row.parts.count("prompt") == 5
            assert sum(row.kl_weights) == pytest.approx(1)
            text = TOKENIZER.decode(row.example.tokens)
            assert ("<|im_start|>" in text) is (form == "task")
            assert ("Give the final answer" in text) is (form == "task")


def test_a_program_counts_whole_since_its_tests_lie_in_the_prompt_which_stays():
    row = {
        "id": "a",
        "prompt": "Double it.",
        "code": "def f(x): return 2*x",
        "tests": ["assert f(1) == 2"],
        "setup": "",
    }
    for form in ("task", "bare"):
        (found,) = make_held_out([row], find_task("mbpp"), TOKENIZER, Data(), form, kl_positions=3)
        text = TOKENIZER.decode(found.example.tokens)
        assert "assert f(1)" in text
        assert set(found.parts) == {"prompt", "answer"}
        assert found.wrong == ()


@pytest.mark.parametrize(("value", "row", "expected"), [
    ("7", {}, {str(digit) for digit in range(10)} - {"7"}),
    ("10", {}, {f"{digit}0" for digit in range(2, 10)} | {f"1{digit}" for digit in range(1, 10)}),
    ("-4", {}, {f"-{digit}" for digit in range(10)} - {"-4"}),
    ("B", {"choices": ["w", "x", "y"]}, {"A", "C"}),
    ("B", {}, set()),
    ("yes", {}, set()),
])  # fmt: skip
def test_wrong_answers_have_the_form_of_the_right_one(value, row, expected):
    found = wrong_values(value, row)
    assert set(found) == expected
    assert len(found) == len(expected)


def test_rows_that_were_calibrated_on_are_left_out_and_too_few_are_an_error():
    assert held_out_rows(ROWS, ROWS[:2], TASK, 3) == ROWS[2:5]
    with pytest.raises(DataError, match=r"data.test: 1 of 6 rows.*needs 2.*data.num_test"):
        held_out_rows(ROWS, ROWS[1:], TASK, 3)


def test_wrong_and_shuffled_examples_supervise_other_tokens():
    examples, _ = make_examples(ROWS, TASK, TOKENIZER, Data(), Calibrate())
    wrong = wrong_examples(ROWS, TASK, TOKENIZER, Data(), Calibrate(), 0)
    shuffled = shuffled_examples(examples, 0)
    for right, other, moved in zip(examples, wrong, shuffled, strict=True):
        assert other.id == right.id
        assert other.targets == right.targets
        assert other.tokens != right.tokens
        assert len(moved.targets) == len(right.targets)
        assert min(moved.targets) >= 1
    assert [one.targets for one in shuffled] != [one.targets for one in examples]
    assert shuffled == shuffled_examples(examples, 0)


def test_values_are_those_of_whole_passes_without_padding(policy, held_out, material):
    rows, hold = held_out["task"], key_projection(material)
    batch = ScoredBatch.of(rows, 0, CPU)
    base_KV = log_probabilities(scored_logits(policy, batch), batch)
    with projected(policy.model, hold):
        found = dict(row_values(scored_logits(policy, batch), batch, base_KV, 0.0))
    for row in rows:
        before, after = whole_log_probabilities(policy, row), whole_log_probabilities(policy, row, hold)
        places = list(zip(row.example.targets, row.parts, row.kl_weights, strict=True))
        answer = sum(-after[t - 1, row.example.tokens[t]].item() for t, part, _ in places if part == "answer")
        solution = sum(-after[t - 1, row.example.tokens[t]].item() for t, part, _ in places if part != "prompt")
        kl_T = (before.exp() * (before - after)).sum(-1)
        values = found[row.example.id]
        assert values.nll_answer == pytest.approx(answer, rel=1e-4)
        assert values.nll_solution == pytest.approx(solution, rel=1e-4)
        assert values.kl == pytest.approx(sum(weight * kl_T[t - 1].item() for t, _, weight in places), abs=1e-6)
        assert values.kl > 0
        right = {place: row.example.tokens[place] for place in row.example.targets}
        odds = [
            after[row.example.targets[index] - 1, right[row.example.targets[index]]]
            - after[row.example.targets[index] - 1, token]
            for index, token in row.wrong
        ]
        assert values.log_odds == pytest.approx(min(odds).item(), abs=1e-4)


def test_a_pass_that_begins_at_the_shared_prefix_is_the_whole_pass(policy, held_out, material):
    batch = ScoredBatch.of(held_out["task"], 0, CPU)
    sites = list(material.spd.sites)
    prefix = SharedPrefix(policy.model, sites)
    runs = []
    counted = policy.model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    hold = key_projection(material)
    with prefix.recording({2, 3}):
        scored_logits(policy, batch)
    with projected(policy.model, hold):
        expected = scored_logits(policy, batch)
        before = len(runs)
        with prefix.replaying(2):
            found = scored_logits(policy, batch)
        assert len(runs) == before, "the layers below ran again"
    counted.remove()
    assert torch.equal(found, expected)
    assert "forward" not in vars(policy.model.model.layers[0])


def test_moments_are_those_of_the_gradient_rows_and_of_the_activations(policy, material):
    examples, _ = make_examples(ROWS, TASK, TOKENIZER, Data(), Calibrate())
    sites, context = list(material.spd.sites), StageContext(Path(), 0, ALONE)
    for site in sites:
        batches = calibrate(policy, examples, sites, Calibrate(num_shards=1), context)
        grad_ND = torch.cat([batch.grad_ND[site] for batch in batches]).double()
        assert_close(material.calibration.gradient[site], grad_ND.T @ grad_ND, rtol=1e-4, atol=1e-9)
        outputs = []
        hook = policy.model.get_submodule(site.module).register_forward_hook(lambda m, i, o, k=outputs: k.append(o[0]))
        with torch.no_grad():
            for example in examples:
                policy.model(torch.tensor([example.tokens]))
        hook.remove()
        activation_ND = torch.cat(outputs).double()
        assert_close(material.calibration.activation[site], activation_ND.T @ activation_ND, rtol=1e-4, atol=1e-6)


def test_taking_out_a_direction_changes_the_loss_as_the_cross_moment_says(policy, material):
    examples, _ = make_examples(ROWS, TASK, TOKENIZER, Data(), Calibrate())
    site = max(site for site in material.spd.sites if site.kind == "key")
    direction_D1 = torch.linalg.eigh(material.calibration.cross[site]).eigenvectors[:, :1]
    share = 1e-2
    predicted = -share * (direction_D1.T @ material.calibration.cross[site] @ direction_D1).item()

    def loss() -> float:
        rows = [(example, torch.tensor([example.tokens])) for example in examples]
        total = 0.0
        for example, tokens in rows:
            logp = policy.model.double()(tokens).logits[0].log_softmax(-1)
            total += sum(-logp[t - 1, example.tokens[t]].item() for t in example.targets) / len(example.targets)
        return total

    def weaken(_module, _inputs, output):
        return output - share * (output @ direction_D1) @ direction_D1.T

    with torch.no_grad():
        before = loss()
        hook = policy.model.get_submodule(site.module).register_forward_hook(weaken)
        after = loss()
        hook.remove()
        policy.model.float()
    assert after - before == pytest.approx(predicted, rel=0.1)
    assert predicted > 0


def test_every_control_has_the_rank_of_the_subspace_and_is_another(material):
    keys = Subspace({site: part for site, part in material.spd.sites.items() if site.kind == "key"})
    for name in CONTROLS:
        for site, part in control_subspace(name, keys, material).sites.items():
            basis_DR = part.basis_DR.double()
            assert basis_DR.shape == keys.sites[site].basis_DR.shape
            assert_close(basis_DR.T @ basis_DR, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-5)
    (site, part), *_ = keys.sites.items()
    complement = control_subspace("complement", keys, material).sites[site].basis_DR
    assert (complement.T @ part.basis_DR).abs().max() < 1e-5


def test_equal_energy_is_equal_and_random_ones_are_drawn_by_name(material):
    activation = material.calibration.activation

    def energy(subspace, site):
        basis_DR = subspace.sites[site].basis_DR.double()
        return (basis_DR.T @ activation[site] @ basis_DR).trace() / activation[site].trace()

    found = equal_energy_subspace(material.spd, activation, 1, 0)
    for site in material.spd.sites:
        assert energy(found, site) == pytest.approx(energy(material.spd, site).item(), abs=0.01)
    first, again, second = (random_subspace(material.spd, 1, number) for number in (0, 0, 1))
    for site in material.spd.sites:
        assert torch.equal(first.sites[site].basis_DR, again.sites[site].basis_DR)
        assert not torch.allclose(first.sites[site].basis_DR, second.sites[site].basis_DR)


def test_the_calibration_examples_are_passed_again_only_if_something_is_cut_of_them():
    plain = Mechanism(num_equal_energy=0, explore=("kinds=value",))
    assert not needs_moments(["complement", "full_gradient"], plain)
    assert needs_moments(["activation_pca"], plain)
    for change in ({"num_equal_energy": 1}, {"fraction": 0.25}, {"explore": ("layers=1",)}):
        assert needs_moments([], dataclasses.replace(plain, **change))


def test_controls_without_material_are_left_out_or_refused():
    assert set(chosen_controls(["all"], has_wrong=False, has_other=False)) == set(CONTROLS) - {
        "wrong_answers", "right_minus_wrong", "other_task",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"mechanism.controls: 'other_task' cannot be made: set mechanism.other_sub"):
        chosen_controls(["other_task"], has_wrong=True, has_other=False)
    with pytest.raises(ConfigError, match=r"'wrong_answers' cannot be made: this task has no wrong answers"):
        chosen_controls(["wrong_answers"], has_wrong=False, has_other=False)
    with pytest.raises(ConfigError, match=r"'activation_pc' is no control; the nearest is activation_pca"):
        chosen_controls(["activation_pc"], has_wrong=True, has_other=True)


def test_another_tasks_subspace_must_fit(material):
    sites = material.spd.sites.items()
    narrow = {site: dataclasses.replace(part, basis_DR=part.basis_DR[:, :2]) for site, part in sites}
    other = dataclasses.replace(material, other=Subspace(narrow))
    with pytest.raises(ConfigError, match=r"mechanism.other_subspace: it has rank 2 of width 16 at .*where rank 8 of"):
        control_subspace("other_task", material.spd, other)


def test_words_of_the_config_are_comparisons():
    config = Mechanism(explore=("kinds=value@fraction=0.25", "layers=1+3@operator=soft@prompt=bare"), num_random=9)
    primary, bare, values, layers = planned(config)
    assert (primary.name, primary.kinds, primary.prompt, primary.num_random) == ("primary", "key", "task", 9)
    assert (bare.name, bare.prompt) == ("prompt=bare", "bare")
    assert (values.kinds, values.fraction, values.prompt) == ("value", 0.25, "task")
    assert (layers.layers, layers.operator, layers.prompt) == ((1, 3), "soft", "bare")
    for word in ("kind=value", "fraction=2", "layers=middle", "operator=firm"):
        with pytest.raises(ConfigError, match=rf"mechanism.explore: '{word}' is no comparison; write kinds="):
            planned(Mechanism(explore=(word,)))
    with pytest.raises(ConfigError, match=r"mechanism.prompts: \['task', 'task'\] is not valid"):
        planned(Mechanism(prompts=("task", "task")))


def test_a_comparison_of_no_site_is_an_error_and_of_another_rank_is_cut_anew(material):
    comparison = planned(Mechanism(explore=("fraction=0.25",)))[-1]
    found = own_subspace(comparison, material)
    assert {part.basis_DR.shape for part in found.sites.values()} == {(16, 4)}
    assert {site.kind for site in found.sites} == {"key"}
    by_effect = Subspace(material.spd.sites, {DIRECTIONS: "gradient_x_activation"})
    for site, part in own_subspace(comparison, dataclasses.replace(material, spd=by_effect)).sites.items():
        basis_DR, cross_DD = part.basis_DR.double(), material.calibration.cross[site]
        assert_close(
            (basis_DR.T @ cross_DD @ basis_DR).trace(), torch.linalg.eigvalsh(cross_DD)[:4].sum(), rtol=1e-5, atol=0
        )
    with pytest.raises(DataError, match=r"layers=9: the subspace has no such site.*change mechanism.kinds"):
        own_subspace(planned(Mechanism(explore=("layers=9",)))[-1], material)


def test_a_layer_that_the_model_has_not_is_refused_before_anything_is_calibrated(tmp_path):
    model = Model(name=str(save_tiny_model(tmp_path / "model")))
    check(Config(model=model, mechanism=Mechanism(explore=("layers=0", "kinds=value"))))
    with pytest.raises(
        DataError, match=r"mechanism\.explore: .* from layer 99 of .*; usable layers: \[0, 1, 2"
    ) as found:
        check(Config(model=model, mechanism=Mechanism(explore=("layers=0", "layers=1+99"))))
    assert "calibrate.layers" not in str(found.value)


def test_layers_that_only_an_explored_comparison_names_are_in_no_other(material):
    *calibrated, left_out = sorted({site.layer for site in material.spd.sites})
    further = {site: part for site, part in material.spd.sites.items() if site.layer == left_out}
    own = {site: part for site, part in material.spd.sites.items() if site.layer != left_out}
    without = dataclasses.replace(material, spd=Subspace(own), further=further)
    primary, *_, values, explored = planned(Mechanism(explore=("kinds=value", f"layers={left_out}")))
    assert {site.layer for site in own_subspace(primary, without).sites} == set(calibrated)
    assert {site.layer for site in own_subspace(values, without).sites} == set(calibrated)
    assert {site.layer for site in own_subspace(explored, without).sites} == {left_out}
    check_other(primary, without.spd, Subspace(own))
    with pytest.raises(ConfigError, match=r"mechanism.other_subspace: it has nothing at layers.2.key, where rank 8 of"):
        check_other(primary, without.spd, Subspace(further))


@pytest.mark.parametrize("packed", [False, True])
def test_logits_of_a_bfloat16_model_are_those_of_its_last_states_in_float32(held_out, packed):
    model = tiny_model().bfloat16().eval()
    policy = SimpleNamespace(model=model, pad_token_id=0)
    batch = ScoredBatch.of(held_out["task"][:2], 0, torch.device("cpu"))
    states, head = [], model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    with packed_weights(model) if packed else nullcontext():
        before = head.forward
        logit_SV = scored_logits(policy, batch)
        assert head.forward == before
    handle.remove()
    expected_SV = states[0][batch.padded.target_BT.roll(-1, dims=1)].float() @ head.weight.float().T
    assert logit_SV.dtype == torch.float32
    assert_close(logit_SV, expected_SV)


def test_a_candidate_says_its_own_share_of_the_gradients_energy(material):
    primary = planned(Mechanism())[0]
    own, found = own_subspace(primary, material), found_candidates(primary, material)
    for site, part in found["gradient_x_activation"].sites.items():
        moment_DD, basis_DR = material.calibration.gradient[site], part.basis_DR.double()
        assert part.energy_fraction == pytest.approx(
            ((basis_DR.T @ moment_DD @ basis_DR).trace() / moment_DD.trace()).item(), rel=1e-4
        )
        assert part.energy_fraction < own.sites[site].energy_fraction + 0.5


def test_a_blend_is_that_share_of_the_projection(material):
    hold = key_projection(material)
    for site, operator in blended(hold, 0.3).operators.items():
        expected = key_projection(material, mode="blend", rho=0.7).operators[site]
        assert operator.keep == pytest.approx(expected.keep)
        assert_close(operator.weight_R, expected.weight_R)


def test_pairs_are_brought_to_equal_distortion(policy, held_out, material, tmp_path):
    context = StageContext(tmp_path, 0, ALONE)
    config = Config(mechanism=Mechanism(batch_size=1))
    measurement = Measurement(policy, {"task": held_out["task"]}, list(material.spd.sites), config, context)
    keys = Subspace({site: part for site, part in material.spd.sites.items() if site.kind == "key"})

    def variant(name, subspace):
        return Variant("task", name, projection(subspace, Project(), 0))

    own = variant("spd", keys)
    others = {f"random_{k}": variant(f"random_{k}", random_subspace(keys, 0, k)) for k in range(4)}
    batches = measurement.batches_of("task", 6)
    measurement.take([Passes(one, batches) for one in (own, *others.values())])
    pairs = match(measurement, own, others, batches)
    assert all(pair.is_matched for pair in pairs)
    louder = [measurement.mean_kl(one, batches) > measurement.mean_kl(own, batches) for one in others.values()]
    assert [pair.is_own_blended for pair in pairs] == [not is_louder for is_louder in louder]
    assert {pair.share < 1 for pair in pairs} == {True}
    assert all(value.kl == 0 for value in measurement.values_of(base("task"), batches).values())

    again = Measurement(policy, {"task": held_out["task"]}, list(material.spd.sites), config, context)
    again.policy = None  # everything is there, so no pass is made
    assert match(again, own, others, batches)[0].share == pairs[0].share


@pytest.mark.parametrize("batch_size", [1, 2, 4, 9])
def test_a_comparison_has_the_rows_that_were_asked_for_whatever_the_batches(
    policy, held_out, material, tmp_path, batch_size
):
    for num_rows, num_explored_rows in ((5, 3), (3, 5), (6, 6), (9, 2)):
        settings = Mechanism(batch_size=batch_size, num_rows=num_rows, num_explored_rows=num_explored_rows)
        config, context = Config(mechanism=settings), StageContext(tmp_path, 0, ALONE)
        measurement = Measurement(policy, {"task": held_out["task"]}, list(material.spd.sites), config, context)
        for wanted in (num_rows, num_explored_rows):
            batches = [measurement.batches["task"][index].rows for index in measurement.batches_of("task", wanted)]
            found = [row.example.id for rows in batches for row in rows]
            assert sorted(found) == sorted(row.example.id for row in held_out["task"][:wanted])
            assert max(map(len, batches)) <= batch_size
        of_the_first = measurement.batches_of("task", min(num_rows, num_explored_rows))
        lengths = [len(row.example.tokens) for k in of_the_first for row in measurement.batches["task"][k].rows]
        assert lengths == sorted(lengths), "rows of like lengths are run together"


def pair(effect, other_effect, *, blended="neither", other_kl=0.2):
    """At the divergence 0.2, or not."""
    difference = effect - other_effect
    kls = 0.2, other_kl
    return MatchedPair("random_000", blended, 0.5, *kls, effect, other_effect, difference, (0, 0), other_kl == 0.2)


def test_ranks_and_corrections():
    assert rank_p_value(-1.0, [0.0, -0.5, -2.0]) == 0.5
    assert rank_p_value(-3.0, [0.0] * 19) == 0.05
    left_louder, left_quieter = pair(-1.0, 0.0, other_kl=0.3), pair(-1.0, 0.0, other_kl=0.1)
    assert num_at_least_as_low([pair(-1.0, 0.0), pair(-0.2, -0.2), pair(-1.0, -3.0), left_louder, left_quieter]) == 4
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(5, 19, generator=generator, dtype=torch.float64)
    strong = torch.cat([torch.full((5, 1), -9.0, dtype=torch.float64), random], 1).tolist()
    assert max_statistic_p_values(strong) == [0.05] * 5
    weak = torch.cat([random.sort(1).values[:, 1:2], random], 1).tolist()
    corrected, alone = max_statistic_p_values(weak), [rank_p_value(own, rest) for own, *rest in weak]
    assert all(c >= a for c, a in zip(corrected, alone, strict=True))
    assert max(corrected) > max(alone)
    with pytest.raises(DataError, match=r"comparisons with \[2, 3\] subspaces"):
        max_statistic_p_values([[0.0, 1.0], [0.0, 1.0, 2.0]])


def test_the_correction_keeps_its_level_where_nothing_differs():
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for _ in range(400):
        common = torch.randn(1, 20, generator=generator)
        effects = 0.7 * common + 0.7 * torch.randn(6, 20, generator=generator)
        hits += min(max_statistic_p_values(effects.tolist())) <= 0.05
    assert 0.02 < hits / 400 < 0.09


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr

    first, second = [0.1, 0.5, 0.5, -1.0, 2.0], [3.0, 2.0, 2.5, 9.0, 2.0]
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert rank_correlation([1.0, 2.0], [3.0, 3.0]) is None


@pytest.mark.parametrize(("effect", "p_value", "num_lower", "words"), [
    (-0.15, 0.04, 0, "lowers the gold answer's NLL by 0.150 nats"),
    (-0.15, 0.04, 0, "more than 20 of 20 random subspaces at equal distortion (p 0.040)"),
    (-0.15, 0.86, 17, "no more than 17 of 20 random subspaces at equal distortion (p 0.860)"),
    (0.15, 0.04, 0, "raises the gold answer's NLL by 0.150 nats"),
    (0.15, 0.04, 0, "less than 20 of 20 random subspaces"),
    (-0.15, 0.2, 0, "more than 20 of 20 random subspaces at equal distortion, too few to show it (p 0.200)"),
    (0.05, 0.09, 2, "less than 18 of 20 random subspaces at equal distortion, too few to show it (p 0.090)"),
])  # fmt: skip
def test_the_sentence_says_what_was_found(effect, p_value, num_lower, words):
    result = MechanismResult(100, 20, effect, (-0.3, 0.1), p_value, MatchedKL(p_value, effect, 0.02), [])
    random = [pair(effect, effect - 1)] * num_lower + [pair(effect, effect + 1)] * (20 - num_lower)
    assert words in sentence(result, random)


def test_the_sentence_tells_a_whole_projection_from_one_that_is_blended_and_what_is_not_matched():
    result = MechanismResult(24, 20, -0.05, (-0.1, -0.01), 0.05, MatchedKL(0.048, 0.02, 0.02), [])
    text = sentence(result, [pair(0.02, 0.3, blended="spd")] * 20)
    assert "lowers the gold answer's NLL by 0.050 nats (95 %" in text
    assert "; blended to the distortion of others it raises it by 0.020 nats on average, less than 20 of 20" in text
    assert "at equal distortion (19 of them within 5 %)" in sentence(
        result, [pair(-0.05, 0.3)] * 19 + [pair(-0.05, 0.3, other_kl=0.1)]
    )


def test_each_explored_comparison_is_a_line():
    values = ExploredComparison("kinds=value", "task", 40, 20, -0.25, (-0.4, -0.1), 0.1, 0.5, 0.2, 0.048, 0.095)
    lines = explored_lines([values, dataclasses.replace(values, name="layers=1", effect=0.5)])
    assert lines == [
        "Explored: kinds=value: -0.250 nats (95 % interval -0.400 to -0.100, n 40); 20 random subspaces: +0.500 on "
        "average; corrected p 0.095.",
        "Explored: layers=1: +0.500 nats (95 % interval -0.400 to -0.100, n 40); 20 random subspaces: +0.500 on "
        "average; corrected p 0.095.",
    ]
    assert explored_lines([]) == []
