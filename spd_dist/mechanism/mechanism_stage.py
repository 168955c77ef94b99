"""The mechanism test in a run's folder: calibrate to project where they are missing, then `mechanism/`.

mechanism.json    the primary comparison
details.json      all comparisons, matches and doses; what mechanism.html shows
rows.parquet      every row under every subspace
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import pyarrow
import pyarrow.parquet
import torch

from spd_dist.analysis.mechanism_verdict import MechanismDetails, MechanismResult, explored_lines
from spd_dist.analysis.subspace_algebra import fix_signs
from spd_dist.arms import ARMS, Scope
from spd_dist.config import Config
from spd_dist.data.held_out import held_out_rows, make_held_out, shuffled_examples, wrong_examples
from spd_dist.data.prompts import make_examples, make_test_set
from spd_dist.data.tasks.protocol import Row
from spd_dist.data.templates import Tokenizer
from spd_dist.distributed.collectives import together
from spd_dist.distributed.uneven_work import on_main
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError
from spd_dist.mechanism.comparisons import Comparison, check_other, layers_of, own_subspace, planned
from spd_dist.mechanism.controls import (
    CONTROLS,
    Material,
    chosen_controls,
    control_subspace,
    cuts_anew,
    directions_of,
    energy_share,
    given,
    needs_moments,
)
from spd_dist.mechanism.measure import HeldOut, measure
from spd_dist.mechanism.summing import MechanismOutcome
from spd_dist.models.kv_sites import discover_sites
from spd_dist.models.model_stats import meta_model
from spd_dist.models.policy import load_settings, prepare_model
from spd_dist.pipeline import find_subspace
from spd_dist.process.signals import StopSignals
from spd_dist.process.stopping import watch
from spd_dist.reports.mechanism_page import write_mechanism_page
from spd_dist.reports.run_end import renew_page
from spd_dist.run import Run
from spd_dist.stages.calibrate import CalibrationMoments, gradient_moments
from spd_dist.stages.distortion import PARTS, VERSION
from spd_dist.storage.artifacts import content_hash, replacing, sha256_of
from spd_dist.storage.records import read_record, write_record
from spd_dist.storage.subspace_file import FILE_NAME, load_subspace, save_subspace
from spd_dist.tracking.metrics import MetricLogger
from spd_dist.tracking.stage_outputs import MECHANISM_FILES
from spd_dist.types import Certificate, KVSite, SiteSubspace, Subspace, SupervisedExample

STAGE = "mechanism"
EXPLORE = "mechanism.explore"
CANDIDATES = "candidates"
"""In the stage's folder: a file each, that `launchers/export.py` takes as it takes the run's own subspace."""
CHANGES_NOTHING = ("batch_size", "share_prefix", "in_run")
"""Keys of the section that change no result."""


def measure_mechanism(config: Config, world: World, signals: StopSignals) -> str:
    """Do the test of `config` in its run folder, and give what a person wants to read. A collective.

    It works beside a run of the same folder, as a job of its own; start it again to go on where it stopped.

    Raises:
        UserError: what the user can put right.
    """
    check(config)
    watch(signals, Path(config.run_dir))
    comparisons = planned(config.mechanism)
    last = "evaluate" if config.mechanism.num_generated else "project"
    run = Run(config, world, signals, Scope("calibrate", last, job=STAGE))
    with run.kept_status(), run.opened():
        find_subspace(run, ARMS["spd"], wanted=True)
        test, calibration = run.rows("test"), calibration_rows(run)
        with together("choosing the held-out rows"):
            rows = held_out_rows(test, calibration, run.task, needed_rows(config, len(comparisons)))

        def work(folder: Path) -> None:
            policy = run.policy()
            with together("rendering the held-out rows"):
                held_out = rendered(run, rows, policy.tokenizer, dict.fromkeys(one.prompt for one in comparisons))
            material = find_material(run, folder, comparisons)
            with run.progress(STAGE, None, "row passes") as progress:
                context = dataclasses.replace(run.context(folder, progress=progress), facts={"task": run.task.name})
                outcome = measure(policy, held_out, material, config, context)
            with together("cutting the candidates"):
                candidates = found_candidates(comparisons[0], material)
            on_main("writing the mechanism test", lambda: write(folder, outcome, candidates, run.metrics))

        run.run_stage(STAGE, inputs_of(run, rows), [*MECHANISM_FILES, CANDIDATES], work)
        renew_page(run)
        folder = run.folder.folder(STAGE)
        details = on_main("reading the mechanism test", lambda: read_record(folder / "details.json", MechanismDetails))
    return "\n".join([details.sentence, *explored_lines(details.explored), str(folder / "mechanism.html")])


def rendered(run: Run, rows: Sequence[Row], tokenizer: Tokenizer, forms: Iterable[Literal["task", "bare"]]) -> HeldOut:
    """The rows in each form of the prompt, and those that are answered, too."""
    config, asked = run.config, run.config.mechanism
    found = {
        form: make_held_out(rows, run.task, tokenizer, config.data, form, kl_positions=asked.kl_positions)
        for form in forms
    }
    answered = rows[: asked.num_generated]
    return HeldOut(found, make_test_set(answered, run.task, tokenizer, config) if answered else None)


def check(config: Config) -> None:
    """See that the test could be done, before any weights are loaded. A collective.

    Raises:
        ConfigError: it could not.
        DataError: the model cannot be had, or has not the layers of `mechanism.explore`.
    """
    asked = config.mechanism
    with together("checking the mechanism test"):
        layers = layers_of(planned(asked))
        chosen_controls(asked.controls, has_wrong=True, has_other=asked.other_subspace is not None)
        if config.project.centered and cuts_anew(asked):
            raise ConfigError(
                "project.centered: true is not valid with mechanism.fraction, or with fraction= or layers= in "
                "mechanism.explore, since the test cuts those of moments that are not centred; leave them out, or set "
                "project.centered=false"
            )
        if config.project.insertion != "linear":
            raise ConfigError(
                f"project.insertion: {config.project.insertion} is not valid for the mechanism test, whose controls "
                "are cut of whole linear outputs; set project.insertion=linear"
            )
    if layers:
        prepare_model(config.model)
        with together("looking for the layers of mechanism.explore"):
            discover_sites(meta_model(load_settings(config.model), torch.float32), sorted(layers), setting=EXPLORE)


def needed_rows(config: Config, num_comparisons: int) -> int:
    """Rows of the primary comparison, and of the others if there are any."""
    asked = config.mechanism
    return max(asked.num_rows, asked.num_explored_rows) if num_comparisons > 1 else asked.num_rows


def calibration_rows(run: Run) -> Sequence[Row]:
    """The rows that the subspace comes from."""
    return run.rows("calibration")[: run.config.calibrate.num_examples]


def inputs_of(run: Run, rows: Sequence[Row]) -> dict[str, str]:
    """What the result depends on."""
    settings = dataclasses.asdict(run.config.mechanism)
    section = {key: value for key, value in settings.items() if key not in CHANGES_NOTHING}
    other = run.config.mechanism.other_subspace
    found = {
        "settings": content_hash([section, run.settings("seed", "model", "data", "calibrate", "project")]),
        "subspace": run.folder.output_hash("project", FILE_NAME),
        "calibration": content_hash(calibration_rows(run)),
        "rows": content_hash(rows),
        "measured": VERSION,
    }
    if run.config.mechanism.num_generated:
        found["answers"] = run.settings("evaluate", "choices", "generate")
    if other is not None:
        found["other"] = on_main("reading the other task's subspace", lambda: sha256_of(subspace_file(other)))
    return found


def subspace_file(name: str) -> Path:
    """The subspace that `mechanism.other_subspace` names."""
    path = Path(name)
    return path / "project" / FILE_NAME if path.is_dir() else path


def find_material(run: Run, folder: Path, comparisons: Sequence[Comparison]) -> Material:
    """The method's subspace and all moments that the controls of the config are cut of. A collective."""
    config, policy = run.config, run.policy()
    calibrate, data, tokenizer = config.calibrate, config.data, policy.tokenizer
    with together("preparing the controls"):
        found = load_subspace(run.folder.folder("project") / FILE_NAME)
        other = config.mechanism.other_subspace
        other_task = None if other is None else load_subspace(subspace_file(other))
        examples, _ = make_examples(run.rows("calibration"), run.task, tokenizer, data, calibrate)
        wrong = wrong_examples(run.rows("calibration"), run.task, tokenizer, data, calibrate, config.seed)
        names = config.mechanism.controls
        controls = chosen_controls(names, has_wrong=bool(wrong), has_other=other is not None)
        whole = dataclasses.replace(calibrate, mask="full", allow_empty=True)
        full, _ = make_examples(run.rows("calibration"), run.task, tokenizer, data, whole)
        if other_task is not None and "other_task" in controls:
            check_other(comparisons[0], found, other_task)
        sites = all_sites(run, found, layers_of(comparisons))

    def moments(of: Sequence[SupervisedExample]) -> CalibrationMoments:
        return gradient_moments(policy, of, sites, calibrate, run.context(folder))

    own = moments(examples) if needs_moments(controls, config.mechanism) else None
    return Material(
        spd=found,
        controls=tuple(controls),
        calibration=own,
        full=moments(full).gradient if "full_gradient" in controls else None,
        shuffled=moments(shuffled_examples(examples, config.seed)).gradient if "shuffled_tokens" in controls else None,
        wrong=moments(wrong).gradient if {"wrong_answers", "right_minus_wrong"} & set(controls) else None,
        other=other_task,
        further={} if own is None else further_sites(found, sites, own, config),
    )


def all_sites(run: Run, found: Subspace, layers: set[int]) -> list[KVSite]:
    """The subspace's sites, and those of further layers that a comparison names."""
    further = sorted(layers - {site.layer for site in found.sites})
    named = discover_sites(run.policy().model, further, setting=EXPLORE) if further else []
    return sorted({*found.sites, *named})


def further_sites(
    found: Subspace, sites: Sequence[KVSite], moments: CalibrationMoments, config: Config
) -> dict[KVSite, SiteSubspace]:
    """What the method would keep at those sites that the run did not calibrate."""
    further = {}
    like = next(iter(found.sites.values()))
    for site in sites:
        if site not in found.sites:
            kept_DR = directions_of(found, moments, site, config.project.planned_rank(site.width))
            gradient_DD = moments.gradient[site]
            eigenvalue_D = torch.linalg.eigvalsh(gradient_DD).flip(0).clamp_min(0)
            energy = min(1.0, energy_share(kept_DR, gradient_DD))
            further[site] = SiteSubspace(fix_signs(kept_DR).float(), eigenvalue_D, energy, like.certificate)
    return further


def found_candidates(primary: Comparison, material: Material) -> dict[str, Subspace]:
    """The candidates at the sites of the primary comparison, by name; spectra stay those of the gradients."""
    own, found = own_subspace(primary, material), {}
    for name in (one for one in material.controls if CONTROLS[one].kind == "candidate"):
        gradient, sites = given(material.calibration).gradient, control_subspace(name, own, material).sites
        described = {
            site: dataclasses.replace(
                part,
                energy_fraction=energy_share(part.basis_DR.double(), gradient[site]),
                certificate=Certificate(),
                num_null_directions=0,
            )
            for site, part in sites.items()
        }
        found[name] = Subspace(described, {**own.metadata, "candidate": name})
    return found


def write(folder: Path, outcome: MechanismOutcome, candidates: Mapping[str, Subspace], metrics: MetricLogger) -> None:
    """Files, page and metrics of a test."""
    (folder / CANDIDATES).mkdir(exist_ok=True)
    for name, subspace in candidates.items():
        save_subspace(folder / CANDIDATES / f"{name}.safetensors", subspace)
    write_record(folder / "mechanism.json", outcome.result)
    write_record(folder / "details.json", outcome.details)
    columns = list(outcome.rows[0])
    table = pyarrow.table({name: [row[name] for row in outcome.rows] for name in columns})
    with replacing(folder / "rows.parquet") as partial:
        pyarrow.parquet.write_table(table, partial)
    write_mechanism_page(folder / "mechanism.html", outcome.result, outcome.details)
    log_metrics(metrics, outcome.result, outcome.details)
    for part in folder.glob(PARTS):
        part.unlink()


def log_metrics(metrics: MetricLogger, result: MechanismResult, details: MechanismDetails) -> None:
    """The verdict as numbers, and every subspace as a row of a table."""
    matched = {f"matched_{name}": value for name, value in vars(result.matched_kl).items()}
    low, high = result.interval
    values = {name: vars(result)[name] for name in ("effect", "p_value", "num_rows", "num_random")}
    metrics.log(STAGE, {**values, "effect_low": low, "effect_high": high, **matched}, result.num_rows)
    columns = [name for name in vars(details.variants[0]) if name != "interval"]
    metrics.table(STAGE, "subspaces", columns, [[vars(one)[name] for name in columns] for one in details.variants])
