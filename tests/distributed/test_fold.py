"""Under ZeRO-3 on 2 ranks a projection is what it is on one model, and the weights come back bit by bit."""

import pytest
import torch
from projections import four_sites, logits, num_hooks
from ranks import run_on_ranks
from tiny import tiny_model
from torch import nn
from torch.testing import assert_close

from spd_dist.config import Distributed
from spd_dist.distributed.zero import frozen_engine, full_replica, gathered, weights_fingerprint
from spd_dist.projection.hooks import projected

SHARDED = Distributed(deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}})
SMALL_ONES_WHOLE = Distributed()


def _expected() -> torch.Tensor:
    model = tiny_model()
    with projected(model, four_sites()):
        return logits(model)


def _bits(module: nn.Module) -> dict[str, torch.Tensor]:
    with gathered(module.parameters()):
        return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def _assert_untouched(module: nn.Module) -> None:
    plain = dict(tiny_model().named_parameters())
    assert all(torch.equal(parameter, plain[name]) for name, parameter in _bits(module).items())


def _check_fold_and_hook() -> None:
    expected, base = _expected(), logits(tiny_model())
    for config in (SHARDED, SMALL_ONES_WHOLE):
        engine = frozen_engine(tiny_model(), config, torch.float32)
        module = engine.module
        fingerprint, hooks = weights_fingerprint(module), num_hooks(module)
        for mode in ("hook", "fold"):
            with projected(module, four_sites(), mode) as applied:
                assert_close(logits(module), expected, atol=3e-6, rtol=0)
            assert applied.leakage() < 1e-5
            assert num_hooks(module) == hooks
            assert weights_fingerprint(module) == fingerprint
            assert_close(logits(module), base, atol=3e-6, rtol=0)
        _assert_untouched(module)
        with full_replica(engine, module) as replica:
            for mode in ("hook", "fold"):
                with projected(replica, four_sites(), mode):
                    assert_close(logits(replica), expected, atol=3e-6, rtol=0)
                assert_close(logits(replica), base, atol=3e-6, rtol=0)
        assert weights_fingerprint(module) == fingerprint
        with projected(module, four_sites(), "fold"), full_replica(engine, module) as replica:
            assert_close(logits(replica), expected, atol=3e-6, rtol=0)
        assert weights_fingerprint(module) == fingerprint
        _check_one_rank_failing(module)
        assert weights_fingerprint(module) == fingerprint
        _assert_untouched(module)
        engine.destroy()


def _check_one_rank_failing(module: nn.Module) -> None:
    def run() -> None:
        with projected(module, four_sites(), "fold"):
            logits(module)
            if torch.distributed.get_rank() == 1:
                raise KeyError("rank 1 fails alone")

    if torch.distributed.get_rank() == 1:
        with pytest.raises(KeyError, match="fails alone"):
            run()
    else:
        run()


def _check_hooks_registered_before_sharding() -> None:
    model = tiny_model()
    with projected(model, four_sites()) as applied:
        engine = frozen_engine(model, SHARDED, torch.float32)
        assert_close(logits(engine.module), _expected(), atol=3e-6, rtol=0)
    assert set(applied.calls.values()) == {1}
    _assert_untouched(engine.module)
    engine.destroy()


def _check_all() -> None:
    _check_fold_and_hook()
    _check_hooks_registered_before_sharding()


def test_two_sharded_ranks_project_as_one_whole_model(tmp_path):
    run_on_ranks(2, tmp_path / "store", _check_all)
