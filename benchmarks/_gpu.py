"""What a GPU gives: `make bench-gpu`, one JSON that can be attached to a report.

`python benchmarks/_gpu.py [--device cpu] [--smoke] [--json FILE]`: gradient rows, generation and fine-tuning by their
own benchmarks on the first GPU, each in a process of its own, and what share of the card's bfloat16 peak LoRA training
takes (4 operations a weight and token: forward, and backward to the activations). Which cards it ran on stands in
README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import SMOLLM2, machine

HERE = Path(__file__).resolve().parent
NO_GPU = "error: torch sees no GPU here, so nothing was measured: make doctor looks for the reason"
BENCHMARKS = {
    "capture": ("--examples", "32", "--repeats", "3"),
    "generate": ("--repeats", "1", "--skip", "static"),
    "finetune": ("--repeats", "3", "--sides", "ours", "ours packed"),
}
LORA_OPERATIONS = 4
"""A weight and token: the gradients of frozen weights are not made."""
PEAK_OPERATIONS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}
"""A second in bfloat16 without sparsity, by the data sheets, under a part of the card's name."""


def main() -> int:
    """Run each, print its table, and write all that was found; 1 if one fails, 2 without a GPU."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script itself")
    options.add_argument("--smoke", action="store_true", help="at sizes whose numbers say nothing")
    options.add_argument("--json", type=Path, default=Path("build/bench_gpu.json"), help="what is written")
    options.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    chosen = options.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    found: dict[str, Any] = {"machine": machine(), "gpus": torch.cuda.device_count(), "is_smoke": chosen.smoke}
    found |= {name: measured(name, chosen) for name in chosen.only}
    if found.get("finetune"):
        found["finetune_flops_fraction"] = flops_fraction(found["finetune"])
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{chosen.json}: attach it to a report")
    return int(any(found[name] is None for name in chosen.only))


def measured(name: str, chosen: argparse.Namespace) -> dict[str, Any] | None:
    """What a benchmark writes; None if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        words = ["--smoke"] if chosen.smoke else list(BENCHMARKS[name])
        if name == "finetune" and chosen.smoke:
            words += BENCHMARKS[name][2:]  # TRL, the other side, belongs to the table of the README
        given = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if chosen.device == "cpu" else {}
        command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(file), *words]
        if subprocess.run(command, check=False, env=os.environ | given).returncode:
            print(f"error: {name}: failed; why stands above", file=sys.stderr)
            return None
        return json.loads(file.read_text(encoding="utf-8"))


def flops_fraction(finetune: dict[str, Any]) -> float | None:
    """Operations of the best side over the card's peak; None on a card that is not known, and on a CPU."""
    card = finetune["machine"]["accelerator"] or ""
    peaks = [peak for name, peak in PEAK_OPERATIONS.items() if name in card]
    if not peaks:
        return None
    from spd_dist.config import Model
    from spd_dist.models.model_stats import meta_model, outline_of
    from spd_dist.models.policy import load_settings

    weights = outline_of(meta_model(load_settings(Model(SMOLLM2)), torch.bfloat16)).num_parameters
    tokens_per_second = max(row["tokens_per_second"] for row in finetune["rows"])
    return LORA_OPERATIONS * weights * tokens_per_second / peaks[0]


if __name__ == "__main__":
    sys.exit(main())
