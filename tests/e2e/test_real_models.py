"""The whole method on a real model of another family, where `make qwen` has put it."""

from __future__ import annotations

import pytest
from fetch_qwen import QWEN, qwen_path
from launching import SMALL, Launch
from transformers import AutoTokenizer

from spd_dist.models.gguf import converted
from spd_dist.storage.artifacts import read_json

TINY = [
    "data.num_train=8", "data.num_test=4", "calibrate.num_examples=4", "calibrate.num_shards=2",
    "generate.max_new_tokens=6", "finetune.num_epochs=1", "evaluate.max_new_tokens=4",
    "distributed.timeout_seconds=600",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.timeout(2400)
def test_the_method_runs_on_qwen(tmp_path):
    gguf = qwen_path()
    if not gguf.is_file() or gguf.stat().st_size != QWEN.num_bytes:
        pytest.skip(f"{gguf} is not there: make qwen")
    run = tmp_path / "run"
    started = Launch(2, [*SMALL, *TINY, f"model.name={gguf}", f"run_dir={run}"], tmp_path / "log")
    assert started.wait(2100) == [0, 0], started.output()
    assert "SPD against BASE" in started.output()
    assert read_json(run / "project" / "summary.json")["sites"]
    assert AutoTokenizer.from_pretrained(converted(gguf, None)).encode("<|im_start|>") == [151644]
