"""DeepSpeed's settings are ours and the user's, conflicts named; checkpoint files are copied first, written later."""

import time

import pytest
import torch

from spd_dist.config import Distributed
from spd_dist.distributed.heartbeat import Heartbeat, naming_lagging_ranks
from spd_dist.distributed.training_engine import BackgroundWriter, training_settings
from spd_dist.distributed.world import World
from spd_dist.distributed.zero import sharding_settings
from spd_dist.errors import ConfigError, DataError


def settings_with(deepspeed: dict, dtype: torch.dtype = torch.float32) -> dict:
    return training_settings(Distributed(zero_stage=2, deepspeed=deepspeed), dtype, max_grad_norm=0.5)


def test_users_settings_join_ours_and_auto_means_ours():
    found = settings_with(
        {
            "zero_optimization": {"stage": "auto", "offload_optimizer": {"device": "cpu"}, "overlap_comm": True},
            "gradient_clipping": "auto",
            "optimizer": {"type": "Muon", "params": {"lr": 1e-3}},
        },
        torch.bfloat16,
    )
    assert found["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True}
    assert found["gradient_clipping"] == 0.5
    assert found["bf16"] == {"enabled": True}
    assert found["optimizer"]["type"] == "Muon"


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Muon"])
def test_nothing_is_compiled_for_an_optimizer_on_a_cpu_unless_asked_for(name):
    params = {"lr": 1e-3}
    found = settings_with({"optimizer": {"type": name, "params": params}})
    assert found["optimizer"]["params"] == {"lr": 1e-3, "torch_adam": True}
    assert params == {"lr": 1e-3}
    compiled = {"optimizer": {"type": name, "params": {"torch_adam": False}}}
    assert settings_with(compiled)["optimizer"] == compiled["optimizer"]
    assert "params" not in settings_with({"optimizer": {"type": "Lion"}})["optimizer"]


@pytest.mark.parametrize(("deepspeed", "message"), [
    ({"zero_optimization": {"stage": 3}}, r"distributed\.deepspeed\.zero_optimization\.stage: 3 conflicts with 2"),
    ({"gradient_clipping": 1.0}, r"distributed\.deepspeed\.gradient_clipping: 1\.0 conflicts with 0\.5"),
    ({"scheduler": {"type": "WarmupLR"}}, r"deepspeed\.scheduler: .* set finetune\.learning_rate and finetune\.warmup"),
    ({"train_batch_size": 32}, r"deepspeed\.train_batch_size: 32 .* set finetune\.global_batch_size"),
])  # fmt: skip
def test_a_conflict_is_named_with_both_values_and_the_remedy(deepspeed, message):
    with pytest.raises(ConfigError, match=message):
        settings_with(deepspeed)


def test_a_file_holds_what_the_state_was_when_it_was_saved(tmp_path):
    writer = BackgroundWriter()
    state = {"weights": [torch.arange(1 << 20)], "step": 3, "nested": {"lr": [0.1]}}
    writer.save(state, str(tmp_path / "a.pt"))
    state["weights"][0].zero_()
    state["nested"]["lr"][0] = 9.0
    digests = writer.digests()
    loaded = torch.load(tmp_path / "a.pt")
    assert torch.equal(loaded["weights"][0], torch.arange(1 << 20))
    assert loaded["nested"]["lr"] == [0.1]
    assert digests.keys() == {"a.pt"}
    assert writer.digests() == {}
    assert writer.is_idle
    writer.close()


def test_a_file_that_cannot_be_written_fails_when_asked_and_not_before(tmp_path):
    writer = BackgroundWriter()
    writer.save({"a": torch.ones(3)}, str(tmp_path / "nowhere" / "a.pt"))
    with pytest.raises(DataError, match=r"nowhere/a\.pt cannot be written: .*; make room or fix the permissions"):
        writer.digests()
    writer.close()


def test_the_silent_rank_is_named_first(tmp_path):
    beats = [Heartbeat(tmp_path, World(rank, 3, torch.device("cpu"))) for rank in range(3)]
    beats[0].beat("step 4")
    time.sleep(0.01)
    beats[1].beat("step 5")
    beats[1].beat("step 6, not due yet")
    with pytest.raises(RuntimeError) as caught, naming_lagging_ranks(beats[1]):
        raise RuntimeError("connection closed")
    assert [line.partition(" on ")[0] for line in caught.value.__notes__[0].splitlines()[1:]] == [
        "rank 2: never seen",
        "rank 0",
        "rank 1",
    ]
    assert caught.value.__notes__[0].endswith("last at step 6, not due yet, failed")


@pytest.mark.parametrize("name", ["offload_param", "offload_optimizer"])
def test_offload_to_nvme_is_refused_in_every_stage(name):
    config = Distributed(deepspeed={"zero_optimization": {name: {"device": "nvme", "nvme_path": "/tmp"}}})
    match = rf"distributed.deepspeed.zero_optimization.{name}.device: nvme is not supported; set cpu"
    with pytest.raises(ConfigError, match=match):
        training_settings(config, torch.bfloat16, max_grad_norm=1.0)
    with pytest.raises(ConfigError, match=match):
        sharding_settings(config, torch.bfloat16)


def test_gradients_in_bfloat16_are_added_in_float32_unless_the_user_says_otherwise():
    def added(zero_stage, dtype, **deepspeed):
        settings = training_settings(Distributed(zero_stage=zero_stage, deepspeed=deepspeed), dtype, max_grad_norm=1.0)
        return settings.get("data_types", {}).get("grad_accum_dtype")

    assert [added(stage, torch.bfloat16) for stage in (2, 3)] == ["fp32", "fp32"]
    assert added(3, torch.float32) is None
    assert added(3, torch.bfloat16, data_types={"grad_accum_dtype": "bf16"}) == "bf16"
