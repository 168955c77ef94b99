"""Run Self-Policy Distillation: `deepspeed launchers/spd.py --config configs/NAME.yaml [section.key=value ...]`.

Also by torchrun, by srun (one task a rank), or alone. Start the same command again to go on where a run stopped.
Exit codes: 0 done, 2 the config is wrong, 3 the data or the model is wrong, 75 stopped on request, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from spd_dist.config import STAGES, Config
from spd_dist.errors import UserError
from spd_dist.overrides import load_config, to_yaml
from spd_dist.signals import StopSignals

if TYPE_CHECKING:
    from spd_dist.distributed.world import World


def main() -> int:
    """Parse, check the config, run, and turn the outcome into an exit code."""
    signals = StopSignals()
    signals.install()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own lines say how far a stage is
    arguments = parse_arguments()
    try:
        config = load_config(arguments.config, arguments.overrides)
    except UserError as error:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if arguments.show_config:
        print(to_yaml(config), end="")
        return 0
    if arguments.preview_masks:
        return preview(config, arguments.preview_masks)
    return run(config, arguments, signals)


def parse_arguments() -> argparse.Namespace:
    """The command line; `--local_rank` is what the deepspeed launcher adds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", action="extend", default=[], metavar="YAML", help="later files win")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="win over every file")
    parser.add_argument("--from", dest="first", choices=STAGES, default=STAGES[0], help="stages before it are complete")
    parser.add_argument("--until", dest="last", choices=STAGES, default=STAGES[-1], help="stop after this stage")
    parser.add_argument("--show-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--preview-masks", type=int, metavar="N", help="print N examples, kept tokens marked")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    words = arguments.config + arguments.overrides  # argparse gives --config every word that follows it
    arguments.config = [word for word in words if "=" not in word]
    arguments.overrides = [word for word in words if "=" in word]
    return arguments


def preview(config: Config, num_examples: int) -> int:
    """Show which tokens the mask keeps, on a terminal in colour."""
    from rich.console import Console

    from spd_dist.data.preview import preview_masks
    from spd_dist.data.sources import load_rows
    from spd_dist.data.tasks import find_task
    from spd_dist.models.policy import load_tokenizer

    console = Console()
    try:
        task, tokenizer = find_task(config.data.task), load_tokenizer(config.model)
        rows = load_rows(task, "calibration", config.data)[:num_examples]
        colour = console.is_terminal
        for text in preview_masks(rows, task, tokenizer, config.data, config.calibrate, colour=colour):
            console.print(text, soft_wrap=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def run(config: Config, arguments: argparse.Namespace, signals: StopSignals) -> int:
    """The stages, on all ranks."""
    from spd_dist.launch import run_on_all_ranks
    from spd_dist.rounds import run_rounds

    def work(world: World) -> str:
        return run_rounds(config, world, signals, first=arguments.first, last=arguments.last)

    return run_on_all_ranks(config.distributed, work)


if __name__ == "__main__":
    sys.exit(main())
