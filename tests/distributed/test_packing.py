"""Packing is refused for the architectures that would mix the sequences of a row, and only for those."""

from pathlib import Path

import pytest
import torch
from families import FAMILIES, family_model
from ranks import run_on_ranks

from spd_dist.config import Finetune
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError
from spd_dist.models.loss import Student
from spd_dist.stages.finetune.sequences import TrainingSequence
from spd_dist.stages.finetune.step import check_student

MIX = {
    "qwen3_next": "the state of its linear attention runs on",
    "falcon": "ALiBi counts positions in the row",
    "falcon_grouped": "ALiBi counts positions in the row",
    "gpt_oss": "its eager mask knows no packing",
}
ALONE = World(0, 1, torch.device("cpu"))


def check_every_family() -> None:
    draw = torch.Generator().manual_seed(0)
    sequences = [
        TrainingSequence(str(length), tuple(torch.randint(3, 64, (length,), generator=draw).tolist()), 1, length)
        for length in (20, 30)
    ]
    for name in FAMILIES:
        student = Student(family_model(name))
        check_student(student, sequences, Finetune(), ALONE, varlen=False)
        assert student.tail is not None, f"the chunked loss of {name} is the model's own"
        if name not in MIX:
            check_student(student, sequences, Finetune(packing=True), ALONE, varlen=False)
            continue
        with pytest.raises(ConfigError, match=r"finetune\.packing: True is not valid .* set finetune\.packing=false"):
            check_student(student, sequences, Finetune(packing=True), ALONE, varlen=False)


def test_packing_is_refused_exactly_where_sequences_would_see_each_other(tmp_path: Path):
    run_on_ranks(1, tmp_path / "store", check_every_family)
