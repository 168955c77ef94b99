"""The rules of CONTRIBUTING.md that a machine can check, by reading the source: nothing is imported."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path("spd_dist")
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 300

BELOW = {"errors", "config", "types", "distributed"}
MAY_IMPORT = {  # besides itself
    "__init__": {"config", "overrides", "python_api"},
    "python_api": BELOW | {"data", "models", "runtime", "stages", "overrides"},
    "errors": set(),
    "config": set(),
    "overrides": {"config", "errors", "arms"},
    "types": set(),
    "distributed": {"config", "types", "errors"},
    "models": BELOW,
    "data": BELOW,
    "runtime": BELOW,
    "stages": BELOW | {"models", "data", "runtime"},
    "arms": {"errors"},
    "signals": set(),
    "orphans": set(),
    "preflight": BELOW | {"models", "data", "runtime"},
    "stopping": BELOW | {"signals"},
    "judge": BELOW | {"data", "runtime"},
    "run": BELOW | {"models", "data", "runtime", "arms", "signals", "stopping", "overrides", "judge"},
    "planner": BELOW | {"models", "runtime", "stages", "arms"},
    "inputs": {"arms", "run", "runtime"},
    "reporting": BELOW | {"data", "runtime", "arms", "run"},
    "pipeline": BELOW | {"models", "data", "runtime", "stages", "arms", "run", "inputs", "reporting"},
    "alone": BELOW | {"models", "data", "runtime", "stages", "arms", "signals", "stopping", "run", "inputs"},
    "run_parts": {"arms", "config", "runtime"},
    "rounds": BELOW | {"models", "runtime", "arms", "signals", "stopping", "run", "run_parts", "pipeline"},
    "experiment": BELOW | {"data", "runtime", "signals", "stopping", "rounds"},
}
ONLY_IN = {
    "deepspeed": {"distributed"},
    "transformers": {"models", "python_api"},
    "peft": {"models"},
    "gguf": {"models"},
    "datasets": {"data"},
    "wandb": {"runtime"},
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_down(path):
    layer, *rest = path.relative_to(PACKAGE).with_suffix("").parts
    for name in imports(path):
        package, *target = name.split(".")
        if package == PACKAGE.name and target:
            assert target[0] in MAY_IMPORT[layer] | {layer}, f"{layer} may not import {name}"
            same_stage = layer == "stages" and target[0] == "stages" and len(target) > 1 and target[1] == rest[0]
            assert layer != "stages" or target[0] != "stages" or same_stage, f"stage {rest} may not import stage {name}"
        assert layer in ONLY_IN.get(package, {layer}), f"{package} is imported only in {ONLY_IN.get(package)}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_modules_are_small(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_the_pipeline_reads_on_one_page():
    assert len((PACKAGE / "pipeline.py").read_text().splitlines()) <= 160


def test_config_imports_no_torch():
    code = "import sys, spd_dist.config, spd_dist.overrides; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
