"""What is rendered and handed to sbatch; the jobs themselves run in tests/cluster."""

from __future__ import annotations

import os
import runpy
import subprocess
from pathlib import Path

import pytest

SUBMIT = runpy.run_path("spd_dist/launch/submit.py")
main = SUBMIT["main"]
QUICKSTART = ["--config", "configs/quickstart.yaml"]


def shown(capsys, *words: str) -> str:
    assert main([*words, "--dry-run"]) == 0
    return capsys.readouterr().out


def error(capsys, *words: str) -> str:
    assert main([*words]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", SUBMIT["FILES"])
def test_the_files_in_slurm_are_what_the_template_makes(name):
    script = Path("slurm") / name
    assert script.read_text() == SUBMIT["FILES"][name].script()
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


@pytest.mark.parametrize("name", ["slurm/launch.sh", "slurm/stages.sh"])
def test_shell_scripts_parse(name):
    assert subprocess.run(["bash", "-n", name], check=False).returncode == 0


def test_the_help_writes_an_array_as_sbatch_does(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    help_text = capsys.readouterr().out
    assert "0-N%K is N + 1 tasks" in help_text
    assert "%%" not in help_text


def test_a_script_asks_for_what_the_options_say(capsys, tmp_path):
    options = ["--nodes", "4", "--ranks-per-node", "2", "--cpus-per-rank", "5", "--time", "2-00:00:00", "--no-gpus"]
    more = ["--sbatch=--partition=a100", "--sbatch=--account=lab", "--launcher", "deepspeed", "--margin-seconds", "600"]
    script = shown(capsys, "fused", *options, *more, *QUICKSTART, "seed=7", f"run_dir={tmp_path / 'a run'}")
    for line in (
        "#SBATCH --nodes=4", "#SBATCH --ntasks-per-node=2", "#SBATCH --cpus-per-task=5", "#SBATCH --time=2-00:00:00",
        "#SBATCH --signal=B:USR1@600", "#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --partition=a100",
        "#SBATCH --account=lab", "export SPD_LAUNCHER=deepspeed", f"#SBATCH --output={tmp_path}/a run/slurm/%x-%j.out",
        f"launch --config configs/quickstart.yaml seed=7 'run_dir={tmp_path}/a run'",
    ):  # fmt: skip
        assert line in script.splitlines(), script
    assert "gpus" not in script
    assert not list(tmp_path.iterdir())


def test_a_chain_has_a_job_a_stage_with_its_own_nodes(capsys):
    script = shown(capsys, "stages", "--nodes", "1,4,2,1", *QUICKSTART)
    assert [line for line in script.splitlines() if "--nodes" in line] == [f"#SBATCH --nodes={n}" for n in (1, 4, 2, 1)]
    launches = [line.split(" --config")[0] for line in script.splitlines() if line.startswith("launch ")]
    assert launches == [
        "launch --from calibrate --until project",
        "launch --from generate --until generate",
        "launch --from finetune --until finetune",
        "launch --from evaluate --until evaluate",
    ]


def test_arrays_say_their_tasks_and_their_throttle(capsys):
    script = shown(capsys, "generate", "--array", "0-7%4", *QUICKSTART)
    assert "#SBATCH --array=0-7%4" in script
    assert "#SBATCH --output=runs/quickstart/slurm/%x-%A_%a.out" in script
    assert "launch --from generate --until generate --config configs/quickstart.yaml \\" in script
    experiment = "configs/experiments/arithmetic_smollm2.yaml"
    script = shown(capsys, "experiment", "--array", "0-17%6", "--config", experiment, "finetune.num_epochs=2")
    assert "#SBATCH --array=0-17%6" in script
    assert "#SBATCH --output=runs/experiments/arithmetic_smollm2/slurm/%x-%A_%a.out" in script
    assert f'launch --config {experiment} finetune.num_epochs=2 --num-tasks "$SLURM_ARRAY_TASK_COUNT" --task' in script
    script = shown(capsys, "sweep", "--array", "0-3", "runs/s/plan.json")
    assert 'words=$(python launchers/sweep.py words runs/s/plan.json "$SLURM_ARRAY_TASK_ID") || exit $?' in script


def test_a_wrong_config_or_option_is_refused_before_anything_is_submitted(capsys):
    wrong = error(capsys, "fused", *QUICKSTART, "finetune.num_epoch=1")
    assert "the nearest valid key is finetune.num_epochs" in wrong
    assert "seeds: [1] is not valid; name at least two" in error(capsys, "experiment", "seeds=[1]")
    assert "--nodes: '1,2' is not valid; it must be one number, or 4 with commas" in error(
        capsys, "stages", "--nodes", "1,2", *QUICKSTART
    )
    short = error(capsys, "fused", "--time", "0:10:00", *QUICKSTART)
    assert "--time: 0:10:00 is too short for --margin-seconds 300" in short
    assert "--time: '10' is not valid; it must be [D-]HH:MM:SS" in error(capsys, "fused", "--time", "10", *QUICKSTART)
    assert "submit.py sweep takes one plan" in error(capsys, "sweep", "runs/s/plan.json", "seed=1")
    assert "--array: not given; launchers/sweep.py plan says it" in error(capsys, "sweep", "runs/s/plan.json")


FAKE = """#!/usr/bin/env bash
echo "$*" >> {calls}
[ ! -e {refuses} ] || {{ echo "no such partition" >&2; exit 1; }}
wc -l < {calls}
"""


def test_each_job_of_a_chain_waits_for_the_one_before_and_scripts_are_kept(capsys, tmp_path, monkeypatch):
    fake = tmp_path / "sbatch"
    fake.write_text(FAKE.format(calls=tmp_path / "calls", refuses=tmp_path / "refuses"))
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = tmp_path / "run"
    assert main(["stages", *QUICKSTART, f"run_dir={run}"]) == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    names = ["project", "generate", "finetune", "evaluate"]
    after = ["", *(f"--dependency=afterok:{n} --kill-on-invalid-dep=yes " for n in (1, 2, 3))]
    assert calls == [
        f"--parsable {chained}{run}/slurm/spd-{name}.sbatch" for chained, name in zip(after, names, strict=True)
    ]
    assert capsys.readouterr().out.splitlines()[1] == f"2  spd-generate  {run}/slurm/spd-generate.sbatch  after 1"
    assert "--from finetune" in (run / "slurm" / "spd-finetune.sbatch").read_text()
    (tmp_path / "refuses").touch()
    assert main(["fused", *QUICKSTART, f"run_dir={run}"]) == 1
    assert "no such partition" in capsys.readouterr().err
