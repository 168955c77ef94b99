"""A run with secrets in its command: its folder, with what W&B would send, is searched for them."""

from __future__ import annotations

from launching import BRIEF, launch
from tiny import save_tiny_model

FROM_VARIABLE, LITERAL, UNUSED = "c4n4ry-5f1d9a7b", "l1t3r4l-77aa01", "0000aaaa1111bbbb2222cccc"


def test_no_artifact_of_a_run_holds_a_secret(tmp_path):
    run = tmp_path / "run"
    command = f"engine {{prompts}} {{output}} {{model}} --at ${{oc.env:ENGINE_PLACE}} --key {LITERAL}"
    words = [
        f"model.name={save_tiny_model(tmp_path / 'model')}", f"run_dir={run}", *BRIEF,
        "generate.engine=hf", f"generate.command='{command}'", "evaluate.arms=[base,spd]", "metrics.wandb=offline",
    ]  # fmt: skip
    variables = {"ENGINE_PLACE": FROM_VARIABLE, "HF_TOKEN": UNUSED}
    output = launch(1, words, tmp_path / "log", **variables)
    files = [path for path in run.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.yaml", "environment.json", "report.html", "report.json"} <= names
    assert any(name.endswith(".wandb") for name in names)
    held = {str(path.relative_to(run)) for path in files for one in _SECRETS if one in path.read_bytes()}
    assert held == set()
    assert [one for one in _SECRETS if one.decode() in output] == []
    assert "${oc.env:ENGINE_PLACE}" in (run / "config.yaml").read_text()


_SECRETS = (FROM_VARIABLE.encode(), LITERAL.encode(), UNUSED.encode())
