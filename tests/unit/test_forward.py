"""Liger's kernels are used where they can be, and refused with a reason where they cannot."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from tiny import tiny_model

from spd_dist.errors import ConfigError
from spd_dist.models.forward import use_liger

CUDA = torch.device("cuda")


def test_the_cpu_is_refused():
    with pytest.raises(ConfigError, match=r"finetune\.liger: True is not valid on the CPU; set finetune\.liger=false"):
        use_liger(tiny_model(), torch.device("cpu"))


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_a_missing_package_is_named():
    with pytest.raises(ConfigError, match=r"finetune\.liger: True needs liger-kernel; pip install liger-kernel"):
        use_liger(tiny_model(), CUDA)


def test_only_norms_and_mlps_of_a_known_architecture_are_replaced(monkeypatch):
    """Liger itself imports only where there is a GPU: its two names that are used stand in for it."""
    calls: list[dict[str, object]] = []
    package, transformers, patches = (ModuleType(name) for name in ("liger_kernel", "transformers", "monkey_patch"))
    package.__spec__ = importlib.util.spec_from_loader("liger_kernel", None)
    transformers._apply_liger_kernel_to_instance = lambda **settings: calls.append(settings)
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patches)
    model = tiny_model()
    use_liger(model, CUDA)
    assert calls == [{"model": model, "rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}]
    model.config.model_type = "my_own"
    with pytest.raises(ConfigError, match=r"finetune\.liger: True is not valid for a my_own model; liger knows llama"):
        use_liger(model, CUDA)
