"""Does the subspace carry correctness? `deepspeed launchers/mechanism.py --config configs/NAME.yaml [key=value ...]`.

Scores gold answers of held-out rows under the capability subspace and under controls; nothing is sampled or trained.
It calibrates first where the run folder has no subspace. Start the same command again to go on where it stopped.
Exit codes: 0 done, 2 the config is wrong, 3 the data or the model is wrong, 75 stopped on request, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from spd_dist.errors import UserError
from spd_dist.launch.run_method import on_every_rank
from spd_dist.overrides import load_config, split_words, to_yaml
from spd_dist.process.environment import make_room
from spd_dist.process.launcher_watchdog import watch_launchers
from spd_dist.process.signals import StopSignals

if TYPE_CHECKING:
    from spd_dist.distributed.world import World


def main() -> int:
    """Parse, check the config, measure, and turn the outcome into an exit code."""
    signals = StopSignals()
    signals.install()
    watch_launchers(os.environ)
    make_room(os.environ)
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

    def work(world: World) -> str:
        from spd_dist.mechanism.mechanism_stage import measure_mechanism

        return measure_mechanism(config, world, signals)

    return on_every_rank(config, work)


def parse_arguments() -> argparse.Namespace:
    """The command line; `--local_rank` is what the deepspeed launcher adds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", action="extend", default=[], metavar="YAML", help="later files win")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="win over every file")
    parser.add_argument("--show-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    arguments.config, arguments.overrides = split_words(arguments.config + arguments.overrides)
    return arguments
