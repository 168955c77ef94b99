"""Compare arms over seeds: `deepspeed launchers/experiment.py --config configs/experiments/NAME.yaml [key=value ...]`.

One process group does everything. As an array of jobs, each with ranks of its own, one arm of one seed a job:

    launchers/submit.py experiment --array 0-N --config NAME.yaml   # under SLURM; or slurm/array_experiment.sbatch
    experiment.py --config NAME.yaml --task INDEX --num-tasks N     # in any order, at any time; the last one compares
    experiment.py --config NAME.yaml --report                       # compare what is complete
    experiment.py --config NAME.yaml --list                         # how many jobs there are, and which are unfinished
    experiment.py --config NAME.yaml --power 2 --pilot RUN_DIR      # before it: what shows 2 points, in how many hours

Keys are those of a run (`finetune.num_epochs=3`), or `folder`, `seeds` and `arms`. `touch FOLDER/PREEMPT` stops every
job that runs; start the same command again to go on.
Exit codes: 0 done, 2 the config is wrong, 3 the data or the model is wrong, 75 stopped on request, 1 anything else.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spd_dist.config import Experiment
from spd_dist.data.tasks import check_tasks
from spd_dist.errors import ConfigError
from spd_dist.launch import at_least, launcher, own_rank
from spd_dist.launch.run_method import begin, on_every_rank
from spd_dist.overrides import load_experiment, split_words, to_yaml
from spd_dist.process.signals import StopSignals

if TYPE_CHECKING:
    from spd_dist.distributed.world import World


@launcher
def main(words: Sequence[str] | None = None) -> int:
    """Parse, check the config, run, and turn the outcome into an exit code."""
    signals, arguments = begin(), parse_arguments(words)
    if not 0 <= arguments.task < arguments.num_tasks:
        raise ConfigError(f"--task: {arguments.task} is not valid; it must be below --num-tasks {arguments.num_tasks}")
    if (arguments.power is None) != (arguments.pilot is None) or arguments.power == 0:
        raise ConfigError(f"--power {arguments.power}: give points above 0, and --pilot DIR, a finished run")
    if arguments.between_seeds is not None and arguments.power is None:
        raise ConfigError(f"--between-seeds: {arguments.between_seeds} is not read without --power; give both")
    experiment = load_experiment(arguments.config, arguments.overrides)
    check_tasks(experiment.run)
    if arguments.show_config:
        print(to_yaml(experiment), end="")
        return 0
    return run(experiment, arguments, signals)


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `--local_rank` is what the deepspeed launcher adds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", action="extend", default=[], metavar="YAML", help="later files win")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over every file")
    parser.add_argument(
        "--task", type=at_least(0), default=0, metavar="INDEX", help="which job of an array this is, from 0"
    )
    parser.add_argument(
        "--num-tasks", type=at_least(1), default=1, metavar="N", help="how many there are; fewer than jobs is fine"
    )
    parser.add_argument("--report", action="store_true", help="compare what is complete, and do nothing else")
    parser.add_argument("--list", action="store_true", help="print the jobs and whether they are finished, and exit")
    parser.add_argument(
        "--power",
        type=at_least(0, float),
        metavar="POINTS",
        help="plan how much shows this difference, and write it down, and exit",
    )
    parser.add_argument("--pilot", type=Path, metavar="DIR", help="a finished run or experiment that --power plans by")
    parser.add_argument(
        "--between-seeds",
        type=at_least(0, float),
        metavar="POINTS",
        help="for --power: standard deviation of the difference between seeds, which a pilot of one seed does not show",
    )
    parser.add_argument("--show-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(words)
    arguments.config, arguments.overrides = split_words(arguments.config + arguments.overrides)
    return arguments


def run(experiment: Experiment, arguments: argparse.Namespace, signals: StopSignals) -> int:
    """The experiment, on all ranks."""
    from spd_dist.runs.experiment import jobs, report, run_experiment, unfinished

    if arguments.power is not None:
        return plan(experiment, arguments)
    if arguments.list:
        left = unfinished(experiment)
        for index, job in enumerate(jobs(experiment)):
            print(
                f"{index:>4}  seed {job.seed}  {', '.join(job.arms):<24} {'' if job in left else 'finished'}".rstrip()
            )
        return 0

    def work(world: World) -> str:
        if arguments.report:
            return report(experiment, world, signals)
        return run_experiment(experiment, world, signals, task=arguments.task, num_tasks=arguments.num_tasks)

    return on_every_rank(experiment.run, work)


def plan(experiment: Experiment, arguments: argparse.Namespace) -> int:
    """Write down, before the experiment, how much shows the difference; by rank 0, without the others."""
    from spd_dist.runs.registered_plan import write_protocol

    if own_rank() == 0:
        print(write_protocol(experiment, arguments.pilot, arguments.power, arguments.between_seeds))
    return 0
