"""Push what a run made to the Hugging Face hub: `python launchers/push.py RUN_DIR PRODUCT OWNER/NAME`.

PRODUCT is adapter, merged, full, subspace, or corpus (a data set). The repository is made if there is none, private
unless `--public`. Interrupted, or with a hub that is busy, the same command goes on: what arrived is not sent again.
Log in by `hf auth login` or HF_TOKEN; HF_ENDPOINT names another hub.
Exit codes: 0 done, 2 the command is wrong, 3 the run lacks it or the hub refuses it, 1 the hub did not answer.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from spd_dist.hub.publish import PRODUCTS, Publication, publish
from spd_dist.hub.repository import Patience
from spd_dist.launch import at_least, launcher


@launcher
def main(words: Sequence[str] | None = None) -> int:
    """Parse and push."""
    arguments = parse_arguments(words)
    logging.basicConfig(format="%(message)s")
    patience = Patience(arguments.attempts)
    address = publish(
        Publication(
            run_dir=arguments.run_dir,
            product=arguments.product,
            repository=arguments.repository,
            arm=arguments.arm,
            base_model=arguments.base_model,
            is_public=arguments.public,
        ),
        patience,
    )
    print(f"pushed: {address}")
    return 0


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run's folder")
    parser.add_argument("product", choices=PRODUCTS, help="what of it")
    parser.add_argument("repository", metavar="OWNER/NAME", help="where to")
    parser.add_argument("--arm", default="spd", help="of which arm (default: spd)")
    parser.add_argument("--base-model", metavar="OWNER/NAME", help="the base model's name on the hub, for the card")
    parser.add_argument("--public", action="store_true", help="everybody may see it")
    parser.add_argument(
        "--attempts", type=at_least(1), default=Patience().num_attempts, help="of a request (default: %(default)s)"
    )
    return parser.parse_args(words)
