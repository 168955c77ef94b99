"""What a run made, pushed to the hub: its student, the subspace, the corpus, each with a card that says how it came.

A card has base model, method, and the comparison with the base model as the hub's `model-index`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jinja2
from huggingface_hub import DatasetCardData, EvalResult, ModelCard, ModelCardData

from spd_dist.analysis.corpus import corpus_stats, load_corpus
from spd_dist.analysis.report import Report, read_report
from spd_dist.arms import Arm, chosen, iterations_of
from spd_dist.card_facts import HELD, learnt_from, written
from spd_dist.config import Config
from spd_dist.data.prompts import chooses
from spd_dist.data.sources import is_file_name, parse_source, sources_of
from spd_dist.data.tasks import find_task
from spd_dist.errors import ConfigError, DataError
from spd_dist.hub.repository import NAME, Patience, Repository, is_hub_name, upload
from spd_dist.models.model_card import IN_REPORT, THIS_FOLDER
from spd_dist.overrides import config_of_arm, load_config
from spd_dist.redaction import settings_of
from spd_dist.storage.completions import CORPUS, TABLE, finished_corpus, open_corpus, to_text
from spd_dist.storage.records import read_fields, read_object, read_text
from spd_dist.storage.settings import READ_BY, settings_hash
from spd_dist.storage.subspace_file import FILE_NAME, load_subspace

Product = Literal["adapter", "merged", "full", "subspace", "corpus"]
PRODUCTS = get_args(Product)
FOLDERS = {"adapter": "adapter", "merged": "model", "full": "model"}
"""Of a student, in the folder of its finetune stage."""
ADAPTER_SETTINGS = "adapter_config.json"
CARD = "README.md"
PAPER = "arXiv 2605.22675"
TAGS = ["self-policy-distillation", "spd_dist"]
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
"""The hub's words for a number of rows: fewer than, and what to call it."""


@dataclass(frozen=True)
class Publication:
    """What of a run is pushed, and where to."""

    run_dir: Path
    product: Product
    repository: str
    """`OWNER/NAME`."""
    arm: str = "spd"
    base_model: str | None = None
    """The base model's name on the hub, if the run had it from a folder or a file."""
    is_public: bool = False


def publish(publication: Publication, patience: Patience | None = None) -> str:
    """Push one product of a finished stage, private unless it is meant to be public; give the commit's address.

    Raises:
        ConfigError: a product or an arm that this run does not have; a name that is none; no pushing is allowed.
        DataError: the stage that makes it is not finished; the hub refuses it.
        UserError: the hub did not answer.
    """
    published = _described(publication)
    kind = "dataset" if publication.product == "corpus" else "model"
    repository = Repository(publication.repository, kind, publication.is_public)
    with tempfile.TemporaryDirectory(prefix="spd-push-") as place:
        stage(publication, published, Path(place))
        return upload(Path(place), repository, f"{publication.product} of {published.arm.name}, by spd_dist", patience)


def stage(publication: Publication, published: Published, place: Path) -> None:
    """Put into `place` what is pushed: links to the files of the run, and what is written for others to read.

    Raises:
        DataError: the stage that makes it is not finished.
    """
    run_dir, product, arm = publication.run_dir, publication.product, published.arm
    if product == "subspace":
        file = _existing(run_dir / published.subspace_stage / FILE_NAME, "project")
        (place / FILE_NAME).symlink_to(file.resolve())
        card = subspace_card(published, file)
    elif product == "corpus":
        text = run_dir / arm.stage("generate") / CORPUS
        file = _existing(finished_corpus(text.parent) or text, "generate")
        if file.name == TABLE:
            to_text(open_corpus(file), place / text.name)
        else:
            (place / text.name).symlink_to(file.resolve())
        card = corpus_card(published, file.parent)
    else:
        folder = _existing(run_dir / arm.stage("finetune") / FOLDERS[product], "finetune")
        for file in folder.iterdir():
            if file.name not in (CARD, ADAPTER_SETTINGS):
                (place / file.name).symlink_to(file.resolve())
        if product == "adapter":
            settings = read_object(folder / ADAPTER_SETTINGS)
            settings["base_model_name_or_path"] = published.base_model
            (place / ADAPTER_SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        found = read_report(run_dir) if (run_dir / "report.json").exists() else None
        card = student_card(published, folder / CARD, found, "adapter" if product == "adapter" else "finetune")
    (place / CARD).write_text(card, encoding="utf-8")


def _described(publication: Publication) -> Published:
    if publication.product not in PRODUCTS:
        raise ConfigError(f"{publication.product!r} is nothing that a run makes; choose one of {', '.join(PRODUCTS)}")
    config_file = publication.run_dir / "config.yaml"
    if not config_file.is_file():
        raise DataError(f"{publication.run_dir} is no run's folder: it has no config.yaml; name the run_dir of a run")
    (arm,) = chosen([publication.arm])
    whole = load_config([config_file])
    config = config_of_arm(whole, arm)
    _check_product(publication.product, config, arm)
    base = publication.base_model or config.model.name
    if publication.base_model is not None and NAME.fullmatch(base) is None:
        raise ConfigError(f"--base-model: {base!r} is not valid; write the OWNER/NAME that the hub knows it by")
    is_on_hub = publication.base_model is not None or is_hub_name(base)
    project, shared = (settings_hash(settings_of(one), *READ_BY["project"]) for one in (config, whole))
    subspace_stage = "project" if project == shared else arm.stage("project")
    last = iterations_of(arm, config)[-1]
    return Published(publication.repository, config, last, base, is_on_hub, subspace_stage)


def _check_product(product: Product, config: Config, arm: Arm) -> None:
    wanted = {"adapter": "lora", "merged": "lora", "full": "full"}.get(product, config.finetune.mode)
    if wanted != config.finetune.mode:
        has = "full" if config.finetune.mode == "full" else "adapter, or after finetune.merge=true merged"
        raise ConfigError(
            f"product {product}: this run has none, as its finetune.mode is {config.finetune.mode}; push {has}"
        )
    if not {"subspace": arm.projects, "corpus": arm.writes}.get(product, arm.trains):
        raise ConfigError(f"product {product}: the arm {arm.name} ({arm.sentence}) has none; name another by --arm")
    if product == "subspace" and config.project.mode not in HELD:
        raise ConfigError(
            f"--arm: {arm.name} is not valid for the product subspace, whose project.mode={config.project.mode} holds "
            f"it to none that was found; name an arm whose mode is one of {', '.join(HELD)}, as --arm spd"
        )


def _existing(path: Path, stage_name: str) -> Path:
    if not path.exists():
        merge = ", with finetune.merge=true if it is the merged model that you want" if path.name == "model" else ""
        raise DataError(f"{path} is not there: run the {stage_name} stage first{merge}")
    return path


@dataclass(frozen=True)
class Published:
    """What a card says of the thing itself."""

    address: str
    """Its repository."""
    config: Config
    """Of its run, with the settings that its arm has for its own."""
    arm: Arm
    """Its last iteration, if it learns in several."""
    base_model: str
    """By the name that others load it by."""
    is_base_on_hub: bool
    subspace_stage: str
    """The folder of the subspace that its arm is held to, which arms of the same settings share."""

    @property
    def hub_base(self) -> str | None:
        """The base model, where the hub can link to it: a path of this machine is no one else's."""
        return self.base_model if self.is_base_on_hub else None


def student_card(published: Published, own_card: Path, report: Report | None, relation: str) -> str:
    """The card that finetune wrote, with an address, the comparison, and metadata that the hub reads.

    `own_card` is `README.md` beside the student; `relation` is as the hub calls it: adapter, or finetune.
    """
    card: Any = ModelCard(read_text(own_card), ignore_metadata_errors=True)
    text = card.text.replace(f'"{THIS_FOLDER}"', f'"{published.address}"')
    text = text.replace(published.config.model.name, published.base_model)
    if report is not None and published.arm.name in report.arms:
        text = text.replace(IN_REPORT, results_text(report))
    results = [] if report is None else eval_results(published, report)
    data = ModelCardData(
        base_model=published.hub_base,
        pipeline_tag="text-generation",
        base_model_relation=relation if published.is_base_on_hub else None,
        license=card.data.license,
        library_name=card.data.library_name,
        tags=card.data.tags,
        model_name=published.address.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"


def eval_results(published: Published, report: Report) -> list[EvalResult]:
    """What the arm reached on the held-out examples, for the hub's `model-index`; nothing if it was not evaluated."""
    summary = report.arms.get(published.arm.name)
    if summary is None:
        return []
    task, data = find_task(published.config.data.task), published.config.data
    source = parse_source((sources_of(task, "test", data) or task.name).split(",")[0].strip(), "test")
    is_shared = source.name != "builtin" and not is_file_name(source.name)
    metric = "nll" if report.metric == "nll" else "accuracy"
    low, high = summary.interval
    temperature = published.config.evaluate.temperature  # which may be the arm's own, and not the report's
    manner = "greedy" if temperature == 0 else f"{summary.num_samples} samples at {temperature:g}"
    if metric == "nll" or chooses(task, published.config):
        manner = "by likelihood"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=source.name if is_shared else task.name,
            dataset_name=task.name,
            dataset_config=(source.subset or None) if is_shared else None,
            dataset_split=source.split or "test",
            dataset_revision=source.revision,
            metric_type=metric,
            metric_value=summary.value,
            metric_name=f"{metric}, {manner}, n {summary.num_examples}, 95 % interval {low:.4f} to {high:.4f}",
        )
    ]


def results_text(report: Report) -> str:
    """The comparison of the run's arms, in Markdown."""
    rows = [
        f"| {name} | {arm.sentence} | {arm.value:.4f} | {arm.interval[0]:.4f} to {arm.interval[1]:.4f} "
        f"| {arm.num_examples} |"
        for name, arm in report.arms.items()
    ]
    head = f"| arm | what it is | {report.metric} | 95 % interval | n |\n|---|---|--:|--:|--:|"
    notes = "".join(f"\n- {note}" for note in report.notes)
    title = f"## {report.task}, held-out examples, seed {report.seed}"
    return "\n".join([title, "", head, *rows, "", report.verdict, notes])


def subspace_card(published: Published, file: Path) -> str:
    """The card of a subspace: where it is, how much of the gradients' energy it holds, how to load it."""
    subspace = load_subspace(file)
    data = ModelCardData(base_model=published.hub_base, library_name="spd_dist", tags=[*TAGS, "capability-subspace"])
    shown = {"published": published, "sites": subspace.sites, "metadata": subspace.metadata}
    return _rendered("subspace_card.md.j2", data.to_yaml(), shown)


def corpus_card(published: Published, folder: Path) -> str:
    """The card of a corpus: who wrote it, how it was sampled, its numbers, what a row holds."""
    stats = corpus_stats(load_corpus(folder))
    num = stats.num_completions
    data: Any = DatasetCardData(
        task_categories=["text-generation"],
        size_categories=[next((word for bound, word in SIZES if num < bound), "n>1M")],
        tags=[*TAGS, "synthetic"],
        configs=[{"config_name": "default", "data_files": "completions.jsonl"}],
    )
    if published.is_base_on_hub:
        data.base_model = published.base_model  # a field of the hub's, of which its class knows nothing
    summary = read_fields(folder.parent / "summary.json")
    who = {"written": written(published.arm, published.config), "learnt": learnt_from(published.arm, published.config)}
    shown = {"published": published, "stats": stats, "engine": summary["engine"], **who}
    return _rendered("corpus_card.md.j2", data.to_yaml(), shown)


def _rendered(name: str, header: str, shown: Mapping[str, object]) -> str:
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return f"---\n{header}\n---\n\n" + environment.from_string(text).render({**shown, "paper": PAPER})
