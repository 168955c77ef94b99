"""Submit to SLURM: `python launchers/submit.py KIND [options] --config configs/NAME.yaml [section.key=value ...]`.

Kinds: `fused` runs the whole method as one job; `stages` runs it as a chain of jobs, each on its own number of nodes;
`generate` makes one corpus by an array of jobs; `experiment` compares arms over seeds (launchers/experiment.py) by an
array of jobs; `sweep` runs every point of a plan (launchers/sweep.py) as an array.
Each script is rendered from slurm/job.sbatch.j2 and kept in the run folder; --dry-run shows it and submits nothing.
Exit codes: 0 done, 2 the config or an option is wrong, 1 sbatch failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from spd_dist.errors import ConfigError
from spd_dist.launch import at_least, launcher
from spd_dist.overrides import load_config, load_experiment, split_words

TEMPLATES = Path("slurm")
CHAIN = {  # job -> the first and the last stage that it runs
    "project": ("calibrate", "project"),
    "generate": ("generate", "generate"),
    "finetune": ("finetune", "finetune"),
    "evaluate": ("evaluate", "evaluate"),
}
INDEX = """\
index=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / SLURM_ARRAY_TASK_STEP))
[ "$SLURM_ARRAY_TASK_COUNT" = 1 ] || SPD_TASK=$index  # its own status and request to stop
"""
PART_OF_A_CORPUS = f"""\
{INDEX}launch --from generate --until generate {{words}} \\
  generate.num_tasks="$SLURM_ARRAY_TASK_COUNT" generate.task_index="$index\""""
ARMS = f"""\
{INDEX}SPD_PROGRAM=experiment
launch {{words}} --num-tasks "$SLURM_ARRAY_TASK_COUNT" --task "$index\""""
ARRAYS = {"generate": PART_OF_A_CORPUS, "experiment": ARMS}
POINT = """\
words=$(python launchers/sweep.py words {words} "$SLURM_ARRAY_TASK_ID") || exit $?
mapfile -t words <<< "$words"
launch "${{words[@]}}\""""


@dataclass(frozen=True)
class Job:
    """One batch script; the defaults are those of the files in slurm/."""

    name: str = "spd"
    command: str = 'launch "$@"'
    sentence: str = "The whole method, or a part of it, as one job."
    usage: str = "sbatch slurm/spd.sbatch --config configs/NAME.yaml [section.key=value ...]"
    nodes: int = 2
    ranks_per_node: int = 8
    cpus_per_rank: int = 8
    gpus: bool = True
    time: str = "24:00:00"
    margin_seconds: int = 300
    array: str | None = None
    output: str = "slurm-%x-%j.out"
    options: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()

    def script(self) -> str:
        """The batch script."""
        loader = jinja2.FileSystemLoader(TEMPLATES)
        environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        return environment.get_template("job.sbatch.j2").render(dataclasses.asdict(self))


OF_AN_ARRAY = "slurm-%x-%A_%a.out"
FILES = {  # what `make` of these scripts by hand would give: slurm/NAME
    "spd.sbatch": Job(),
    "array_generate.sbatch": Job(
        "spd-generate",
        PART_OF_A_CORPUS.format(words='"$@"'),
        "One corpus by an array of jobs, two at a time; the task that finds it complete merges it.",
        "sbatch slurm/array_generate.sbatch --config configs/NAME.yaml   (after: spd.sbatch --until project)",
        nodes=1,
        array="0-3%2",
        output=OF_AN_ARRAY,
    ),
    "array_experiment.sbatch": Job(
        "spd-experiment",
        ARMS.format(words='"$@"'),
        "Arms over seeds by an array of jobs, two at a time; the task that finds all complete compares them.",
        "sbatch --array=0-N%2 slurm/array_experiment.sbatch --config configs/experiments/NAME.yaml",
        nodes=1,
        array="0-3%2",
        output=OF_AN_ARRAY,
    ),
    "array_sweep.sbatch": Job(
        "spd-sweep",
        POINT.format(words='"$1"'),
        "A sweep: one run a point of a plan, two at a time.",
        "sbatch --array=0-N%2 slurm/array_sweep.sbatch runs/sweeps/NAME/plan.json   (launchers/sweep.py plan says N)",
        nodes=1,
        array="0-0%2",
        output=OF_AN_ARRAY,
    ),
}


@launcher
def main(words: Sequence[str] | None = None) -> int:
    """Parse, render, and show or submit."""
    arguments = parse_arguments(words)
    check_clone()
    folder, jobs = plan(arguments)
    if arguments.dry_run:
        for job in jobs:
            print(f"# ---- {folder / 'slurm' / job.name}.sbatch\n{job.script()}", end="")
        return 0
    (folder / "slurm").mkdir(parents=True, exist_ok=True)
    before: str | None = None
    for job in jobs:
        before = submit(job, folder / "slurm", before)
        if before is None:
            return 1
    return 0


def check_clone() -> None:
    """See that the batch scripts are here, and the launchers that they start.

    Raises:
        ConfigError: they are not.
    """
    template = TEMPLATES / "job.sbatch.j2"
    if not template.is_file():
        raise ConfigError(f"{template} is not in {Path.cwd()}: submit from the root of a clone, which all nodes see")


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("fused", "stages", "generate", "experiment", "sweep"))
    parser.add_argument("--config", nargs="+", action="extend", default=[], metavar="YAML", help="as for spd.py")
    parser.add_argument("words", nargs="*", metavar="section.key=value", help="as for spd.py; for sweep: the plan")
    parser.add_argument("--nodes", default="1", metavar="N[,N...]", help="of each job; for stages, of each in turn")
    parser.add_argument("--ranks-per-node", type=at_least(1), default=8, metavar="R", help="one a GPU")
    parser.add_argument("--cpus-per-rank", type=at_least(1), default=8, metavar="C")
    parser.add_argument("--no-gpus", action="store_true", help="ask for no GPUs: ranks run on CPUs")
    parser.add_argument("--time", default="24:00:00", metavar="[D-]HH:MM:SS")
    parser.add_argument(
        "--margin-seconds", type=at_least(0), default=300, metavar="S", help="asked to stop so long before"
    )
    parser.add_argument("--array", metavar="TASKS", help="of an array: 0-N%%K is N + 1 tasks, K at a time")
    parser.add_argument("--launcher", choices=("srun", "deepspeed", "torchrun"), default="srun")
    parser.add_argument("--max-requeues", type=at_least(0), default=20)
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="as in --sbatch=--partition=gpu"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the scripts, submit nothing")
    arguments = parser.parse_intermixed_args(words)
    arguments.config, arguments.words = split_words(arguments.config + arguments.words)
    return arguments


def plan(arguments: argparse.Namespace) -> tuple[Path, list[Job]]:
    """The run's folder, and its jobs in their order.

    Raises:
        ConfigError: the config does not load, or an option does not fit the kind.
    """
    check_margin(arguments.time, arguments.margin_seconds)
    if arguments.kind == "sweep":
        return _sweep(arguments)
    if arguments.kind == "experiment":
        folder = Path(load_experiment(arguments.config, arguments.words).folder)
    else:
        folder = Path(load_config(arguments.config, arguments.words).run_dir)
    words = shlex.join(["--config", *arguments.config, *arguments.words] if arguments.config else arguments.words)
    if arguments.kind == "fused":
        return folder, [_of_options(arguments, folder, Job(command=f"launch {words}"), _nodes(arguments, 1)[0])]
    if arguments.kind in ARRAYS:
        job, command = FILES[f"array_{arguments.kind}.sbatch"], ARRAYS[arguments.kind].format(words=words)
        job = dataclasses.replace(job, command=command, array=arguments.array or job.array)
        return folder, [_of_options(arguments, folder, job, _nodes(arguments, 1)[0])]
    jobs = []
    for (name, (first, last)), nodes in zip(CHAIN.items(), _nodes(arguments, len(CHAIN)), strict=True):
        command = f"launch --from {first} --until {last} {words}"
        sentence = f"The part of a chain of jobs that ends in {last}."
        jobs.append(_of_options(arguments, folder, Job(f"spd-{name}", command, sentence), nodes))
    return folder, jobs


def _of_options(arguments: argparse.Namespace, folder: Path, job: Job, nodes: int) -> Job:
    """`job` with what the command line says of every job, its output in the run's folder."""
    return dataclasses.replace(
        job,
        usage=f"launchers/submit.py {arguments.kind}",
        nodes=nodes,
        ranks_per_node=arguments.ranks_per_node,
        cpus_per_rank=arguments.cpus_per_rank,
        gpus=not arguments.no_gpus,
        time=arguments.time,
        margin_seconds=arguments.margin_seconds,
        output=f"{folder}/slurm/{'%x-%j' if job.array is None else '%x-%A_%a'}.out",
        options=tuple(arguments.sbatch),
        environment=(f"SPD_LAUNCHER={arguments.launcher}", f"SPD_MAX_REQUEUES={arguments.max_requeues}"),
    )


def _sweep(arguments: argparse.Namespace) -> tuple[Path, list[Job]]:
    if len(arguments.config) != 1 or arguments.words:
        raise ConfigError("submit.py sweep takes one plan, as launchers/sweep.py plan writes it, and no other words")
    path = Path(arguments.config[0])
    if arguments.array is None:
        raise ConfigError("--array: not given; launchers/sweep.py plan says it, as 0-11%4")
    command = POINT.format(words=shlex.quote(str(path)))
    job = dataclasses.replace(FILES["array_sweep.sbatch"], command=command, array=arguments.array)
    return path.parent, [_of_options(arguments, path.parent, job, _nodes(arguments, 1)[0])]


def _nodes(arguments: argparse.Namespace, count: int) -> list[int]:
    """Nodes of each of `count` jobs: one number is for all of them."""
    words = arguments.nodes.split(",")
    if not all(word.isdigit() and int(word) > 0 for word in words) or len(words) not in (1, count):
        raise ConfigError(f"--nodes: {arguments.nodes!r} is not valid; it must be one number, or {count} with commas")
    return [int(word) for word in words] * (count if len(words) == 1 else 1)


def check_margin(time: str, margin_seconds: int) -> None:
    """Refuse a margin that leaves no time to work: SLURM may warn a minute early, and again after every requeue.

    Raises:
        ConfigError: the time is not written as SLURM wants it, or too short for the margin.
    """
    days, _, clock = time.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [*parts, days or "0"]) or len(parts) != 3:
        raise ConfigError(f"--time: {time!r} is not valid; it must be [D-]HH:MM:SS")
    hours, minutes, seconds = map(int, parts)
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total < 2 * margin_seconds + 60:
        raise ConfigError(
            f"--time: {time} is too short for --margin-seconds {margin_seconds}: the job would be stopped before it "
            "has done anything; it must be at least twice the margin and a minute"
        )


def submit(job: Job, folder: Path, after: str | None) -> str | None:
    """Keep the script, hand it to sbatch, and give the job's id; None if sbatch refused. It waits for job `after`."""
    path = folder / f"{job.name}.sbatch"
    path.write_text(job.script(), encoding="utf-8")
    chained = [] if after is None else [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    done = subprocess.run(["sbatch", "--parsable", *chained, str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"error: sbatch {path}: {done.stderr.strip()}", file=sys.stderr)
        return None
    job_id = done.stdout.strip().split(";")[0]
    print(f"{job_id}  {job.name}  {path}" + (f"  after {after}" if after else ""), flush=True)
    return job_id
