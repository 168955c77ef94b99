"""What a run made, pushed to the hub: its student, the subspace, the corpus, each with a card that says how it came."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from spd_dist.analysis.report import read_report
from spd_dist.arms import Arm, chosen
from spd_dist.config import Config
from spd_dist.errors import ConfigError, DataError
from spd_dist.hub.cards import Published, corpus_card, student_card, subspace_card
from spd_dist.hub.repository import NAME, Patience, Repository, is_hub_name, upload
from spd_dist.overrides import config_of_arm, load_config
from spd_dist.storage.artifacts import read_json
from spd_dist.storage.completions import CORPUS, TABLE, finished_corpus, open_corpus, to_text
from spd_dist.storage.subspace_file import FILE_NAME

Product = Literal["adapter", "merged", "full", "subspace", "corpus"]
PRODUCTS = get_args(Product)
FOLDERS = {"adapter": "adapter", "merged": "model", "full": "model"}
"""Of a student, in the folder of its finetune stage."""
ADAPTER_SETTINGS = "adapter_config.json"
CARD = "README.md"


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
        own, shared = (folder / FILE_NAME for folder in (run_dir / arm.stage("project"), run_dir / "project"))
        file = _existing(own if own.exists() else shared, "project")
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
            settings = read_json(folder / ADAPTER_SETTINGS)
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
    config = config_of_arm(load_config([config_file]), arm)
    _check_product(publication.product, config, arm)
    base = publication.base_model or config.model.name
    if publication.base_model is not None and NAME.fullmatch(base) is None:
        raise ConfigError(f"--base-model: {base!r} is not valid; write the OWNER/NAME that the hub knows it by")
    is_on_hub = publication.base_model is not None or is_hub_name(base)
    return Published(publication.repository, config, arm, base, is_on_hub)


def _check_product(product: Product, config: Config, arm: Arm) -> None:
    wanted = {"adapter": "lora", "merged": "lora", "full": "full"}.get(product, config.finetune.mode)
    if wanted != config.finetune.mode:
        has = "full" if config.finetune.mode == "full" else "adapter, or after finetune.merge=true merged"
        raise ConfigError(
            f"product {product}: this run has none, as its finetune.mode is {config.finetune.mode}; push {has}"
        )
    if not {"subspace": arm.projects, "corpus": arm.writes}.get(product, arm.trains):
        raise ConfigError(f"product {product}: the arm {arm.name} ({arm.sentence}) has none; name another by --arm")


def _existing(path: Path, stage_name: str) -> Path:
    if not path.exists():
        merge = ", with finetune.merge=true if it is the merged model that you want" if path.name == "model" else ""
        raise DataError(f"{path} is not there: run the {stage_name} stage first{merge}")
    return path
