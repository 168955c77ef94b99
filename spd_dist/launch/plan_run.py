"""Predict a run: `python launchers/plan.py --config YAML --nodes N --gpus-per-node G [section.key=value ...]`.

Says for each stage the placement that fits, the peak memory of a rank, the time, and what the time goes to; and the
smallest cluster that can run all of them. Of the model its config alone is read: give `--model-config FILE.json`, if
model.name is not at hand. What it rests on, and how well it predicts: docs/scaling.md.
Exit codes: 0 it fits, 1 it does not, 2 the config is wrong, 3 the model is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from spd_dist.config import Config
from spd_dist.errors import ConfigError
from spd_dist.launch import at_least, launcher
from spd_dist.overrides import load_config, split_words

if TYPE_CHECKING:
    from spd_dist.planner import Cluster, Plan, Profile, StagePlan

GIB, TB = 2**30, 1e12
COLUMNS = ("stage", "placement", "GiB a rank", "of which", "received", "time", "bottleneck")


@launcher
def main(words: Sequence[str] | None = None) -> int:
    """Parse, plan and print."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|transformers|deepspeed")
    arguments = parse_arguments(words)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.model_config is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=arguments.model_config))
    profile, plan, lines = make_plan(config, arguments)
    if arguments.markdown:
        print(as_markdown(profile, plan, lines))
    else:
        console = Console(width=max(120, Console().width), highlight=False)
        console.print(as_table(profile, plan))
        console.print(assumed(arguments), soft_wrap=True)
        for line in lines:
            console.print(line, soft_wrap=True)
    return 0 if plan.fits else 1


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", action="extend", default=[], metavar="YAML", help="later files win")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="win over every file")
    parser.add_argument("--model-config", metavar="JSON", help="a config.json in place of model.name's")
    parser.add_argument("--nodes", type=int, default=1, help="hosts")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="ranks of a host")
    parser.add_argument("--gpu", default="H100", help="H200, H100, A100 or L40S: how fast it is")
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GIB", help="of each GPU")
    parser.add_argument("--host-memory", type=float, default=1024.0, metavar="GIB", help="of each host, for offload")
    parser.add_argument("--train-prompts", type=at_least(1), default=7473, help="unless data.num_train says it")
    parser.add_argument("--test-prompts", type=at_least(1), default=1319, help="unless data.num_test says it")
    parser.add_argument("--prompt-tokens", type=at_least(1), default=128, help="mean length of a prompt")
    parser.add_argument("--markdown", action="store_true", help="print a section of docs/scaling.md")
    arguments = parser.parse_intermixed_args(words)
    arguments.config, arguments.overrides = split_words(arguments.config + arguments.overrides)
    return arguments


def make_plan(config: Config, arguments: argparse.Namespace) -> tuple[Profile, Plan, list[str]]:
    """The model in numbers, the plan, and what else there is to say."""
    from spd_dist.planner import Workload, plan_run, profile_of, smallest_cluster

    cluster = read_cluster(arguments)
    workload = Workload.of(
        config,
        num_train=arguments.train_prompts,
        num_test=arguments.test_prompts,
        prompt_tokens=arguments.prompt_tokens,
    )
    profile = profile_of(config)
    plan = plan_run(profile, config, cluster, workload)
    smallest = [smallest_cluster(profile, config, cluster, offload=offload) for offload in (False, True)]
    lines = [
        f"Smallest cluster: {described(smallest[0])}; with weights in the hosts' memory: {described(smallest[1])}.",
        *(f"Note: {advice}." for advice in plan.advice),
    ]
    return profile, plan, lines


def read_cluster(arguments: argparse.Namespace) -> Cluster:
    """What there is to run on.

    Raises:
        ConfigError: a GPU that is not known, or a number that no cluster has.
    """
    from spd_dist.planner import Cluster, device_named

    for option, smallest in (("nodes", 1), ("gpus_per_node", 1), ("gpu_memory", 1), ("host_memory", 0)):
        value = vars(arguments)[option]
        if not value >= smallest:
            name = option.replace("_", "-")
            raise ConfigError(f"--{name}: {value:g} is not valid; it must be {smallest} or more")

    return Cluster(
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        gpu_memory_gib=arguments.gpu_memory,
        host_memory_gib=arguments.host_memory,
        device=device_named(arguments.gpu),
    )


def described(cluster: Cluster | None) -> str:
    """A cluster in words."""
    if cluster is None:
        return "none"
    counts = (cluster.nodes, "node"), (cluster.gpus_per_node, "GPU")
    return " of ".join(f"{count} {word}{'s' if count > 1 else ''}" for count, word in counts)


def assumed(arguments: argparse.Namespace) -> str:
    """That it is a cluster of these words that is planned for, whatever this machine is."""
    return (
        f"Planned for {arguments.gpu} GPUs of {arguments.gpu_memory:g} GiB, hosts of {arguments.host_memory:g} GiB; of "
        "this machine nothing is read: --nodes, --gpus-per-node, --gpu, --gpu-memory and --host-memory say what to "
        "plan for."
    )


def title_of(profile: Profile, plan: Plan) -> str:
    """What is planned, in a line."""
    billions = profile.policy.num_parameters / 1e9
    return f"{profile.name}: {billions:.3g} B parameters on {described(plan.cluster)}"


def cells(stage: StagePlan) -> list[str]:
    """A row of the table."""
    parts = [f"{name} {value / GIB:.1f}" for name, value in stage.need.device.items() if value > 0.05 * GIB]
    parts += [f"{name} {value / GIB:.1f} (host)" for name, value in stage.need.host.items()]
    return [
        stage.stage,
        stage.placement if stage.fits else f"{stage.placement}: too large",
        f"{stage.need.device_bytes / GIB:.1f}",
        ", ".join(parts),
        f"{stage.cost.network_bytes / TB:.3g} TB",
        readable(stage.cost.seconds),
        stage.cost.bottleneck,
    ]


def as_table(profile: Profile, plan: Plan) -> Table:
    """The plan for a terminal."""
    table = Table(*COLUMNS, title=title_of(profile, plan), title_justify="left")
    for stage in plan.stages:
        table.add_row(*cells(stage))
    table.add_row("all", "", "", "", "", readable(plan.seconds), "")
    return table


def as_markdown(profile: Profile, plan: Plan, lines: Sequence[str]) -> str:
    """The same as a table in Markdown."""
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *(cells(stage) for stage in plan.stages)]
    rows.append(["all", "", "", "", "", readable(plan.seconds), ""])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{title_of(profile, plan)}\n\n{table}\n\n" + "\n".join(f"- {line}" for line in lines)


def readable(seconds: float) -> str:
    """Seconds as a person reads them."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
