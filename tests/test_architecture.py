"""The rules of CONTRIBUTING.md that a machine can check, by reading the source: nothing is imported."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path("spd_dist")
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 300

BELOW = {"errors", "redaction", "yaml_files", "config", "types", "seeding", "distributed"}
MODEL = {"models", "projection", "inference"}
FILES = {"storage", "tracking", "analysis"}
MAY_IMPORT = {  # besides itself
    "__init__": {"config", "overrides", "python_api"},
    "errors": {"redaction"},
    "redaction": {"types"},
    "yaml_files": set(),
    "config": {"errors"},
    "seeding": set(),
    "types": set(),
    "arms": {"errors", "config"},
    "card_facts": {"arms", "config"},
    "overrides": {"config", "errors", "redaction", "yaml_files", "arms", "types"},
    "distributed": {"config", "types", "errors", "redaction"},
    "process": BELOW,
    "sandbox": {"errors"},
    "data": BELOW,
    "models": BELOW,
    "projection": BELOW | {"models"},
    "inference": BELOW | {"models", "projection"},
    "storage": BELOW | {"process"},
    "analysis": BELOW | {"storage"},
    "tracking": BELOW | {"storage", "analysis"},
    "hub": BELOW | FILES | {"arms", "card_facts", "data", "models", "overrides"},
    "judging": BELOW | {"data", "sandbox", "storage"},
    "stages": BELOW | MODEL | FILES | {"data"},
    "mechanism": BELOW | MODEL | FILES | {"arms", "data", "pipeline", "process", "reports", "run", "stages"},
    "planner": BELOW | MODEL | {"stages", "arms", "overrides"},
    "preflight": BELOW | {"data", "models", "process", "sandbox", "storage"},
    "python_api": BELOW | MODEL | FILES | {"arms", "data", "hub", "process", "runs", "stages", "overrides"},
    "run": BELOW | MODEL | FILES | {"stages", "data", "process", "arms", "card_facts", "overrides", "judging"},
    "stage_inputs": BELOW | MODEL | {"arms", "data", "run", "stages", "storage"},
    "student_corpus": BELOW | {"arms", "data", "models", "run", "storage"},
    "side_stages": BELOW | {"arms", "data", "run", "stage_inputs", "stages", "storage"},
    "reports": BELOW | FILES | {"data", "arms", "run"},
    "pipeline": BELOW
    | MODEL
    | FILES
    | {"arms", "data", "reports", "run", "side_stages", "stage_inputs", "stages", "student_corpus"},
    "launch": {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in MODULES},
    "runs": BELOW | MODEL | FILES | {"arms", "data", "pipeline", "process", "reports", "run", "stage_inputs", "stages"},
}
ONLY_IN = {
    "deepspeed": {"distributed"},
    "transformers": {*MODEL, "planner", "python_api"},
    "peft": {"models", "projection"},
    "gguf": {"models"},
    "datasets": {"data"},
    "huggingface_hub": {"hub", "models"},
    "wandb": {"tracking"},
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def offences(path: Path) -> Iterator[str]:
    """What a module imports that its room may not know."""
    layer, *rest = path.relative_to(PACKAGE).with_suffix("").parts
    for name in imports(path):
        package, *target = name.split(".")
        if package == PACKAGE.name and target:
            if target[0] not in MAY_IMPORT[layer] | {layer}:
                yield f"{path}: {layer} may not import {name}"
            of_a_stage = layer == "stages" == target[0] and target[1:2] not in ([], ["context"])
            if of_a_stage and target[1] != rest[0]:
                yield f"{path}: stage {rest[0]} may not import stage {name}"
        if layer not in ONLY_IN.get(package, {layer}):
            yield f"{path}: {package} is imported only in {sorted(ONLY_IN[package])}"


def test_imports_point_down():
    assert [line for path in MODULES for line in offences(path)] == []


def test_modules_are_small():
    lines = {str(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {path: num for path, num in lines.items() if num > MAX_LINES} == {}


FEW_LINES = 60
MAY_BE_SHORT = {
    "reports/run_end.py",  # the one module of its room that knows a run
}


def test_a_module_of_few_lines_has_more_than_one_importer():
    importers = {path: set() for path in MODULES}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                for target in {Path(*name.split(".")).with_suffix(".py") for name in names} & set(MODULES):
                    importers[target].add(path)
    short = {
        str(path.relative_to(PACKAGE))
        for path, found in importers.items()
        if path.name != "__init__.py" and len(path.read_text().splitlines()) < FEW_LINES and len(found) == 1
    }
    assert short - MAY_BE_SHORT == set()


UNPACKED = {  # calls whose arguments come out of a mapping: each at the boundary to what is not ours
    "data/conversations.py tokenizer.apply_chat_template": "the variables of a chat template are the model's",
    "inference/external/inside_vllm/kv_operators.py forward": "vLLM's modules are called as vLLM calls them",
    "inference/external/inside_vllm/kv_operators.py load_model": "the same, of its workers; options differ by version",
    "inference/external/inside_vllm/serve.py EngineArgs": "vLLM's engine takes what options the user has for it",
    "models/forward.py model": "which inputs a Hugging Face model takes differs between architectures",
    "models/kv_tracing.py forward": "a module is called as the model's own code calls it",
    "models/policy.py reader.from_pretrained": "transformers reads what is left out from the model's own config",
    "planner/dry_run.py operation": "what torch hands to __torch_dispatch__",
    "sandbox/inside/candidate.py function": "a foreign program's function, called as its test calls it",
    "types.py kind": "a JSON object or a section of YAML becomes a dataclass here, and nowhere else",
}


def test_arguments_are_unpacked_only_at_boundaries():
    unpacked = [
        f"{path.relative_to(PACKAGE)} {ast.unparse(node.func)}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and any(keyword.arg is None for keyword in node.keywords)
    ]
    assert sorted(unpacked) == sorted(UNPACKED)  # each of them once


def test_a_name_stands_for_one_file_and_one_class():
    files = [path.name for path in MODULES if path.name != "__init__.py"]
    classes = [
        node.name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    for names in (files, classes):
        assert sorted({name for name in names if names.count(name) > 1}) == []


def test_no_room_is_too_full():
    doors = {"__init__.py", "__main__.py"}  # what Python asks of a package by name
    rooms = [path.parent for path in MODULES if path.name not in doors]
    assert {str(room): rooms.count(room) for room in rooms if rooms.count(room) > 14} == {}


def test_the_pipeline_reads_on_one_page():
    assert len((PACKAGE / "pipeline.py").read_text().splitlines()) <= 160


def test_config_imports_no_torch():
    code = "import sys, spd_dist.config, spd_dist.overrides; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
