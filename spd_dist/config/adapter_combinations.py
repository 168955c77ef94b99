"""What adapters do not go together with: rows of `combinations.py`, in the order in which they are looked at."""

from __future__ import annotations

from spd_dist.config.combination import Combination, above, is_set, other_than

_ON_WEIGHT = ("olora", "pissa", "corda")
_ADAPTED_EXPERTS = {"finetune.mode": "lora", "finetune.lora_parameters": bool}
_EXPERTS = "finetune.lora_parameters=[experts.down_proj]"
_NO_EXPERTS = "finetune.lora_parameters=[]"

OF_ADAPTERS = (
    Combination(
        ("finetune.lora_variant", "evaluate.engine"),
        {"finetune.mode": "lora", "finetune.lora_variant": "dora", "evaluate.engine": "vllm"},
        "which serves plain adapters alone", ("finetune.lora_variant=rslora", "evaluate.engine=hf"),
        ("finetune.lora_variant=dora", "generate.vllm_python=PYTHON"),
    ),
    Combination(
        ("finetune.lora_variant", "finetune.lora_init"),
        {"finetune.mode": "lora", "finetune.lora_variant": "dora", "finetune.lora_init": _ON_WEIGHT},
        "which takes a part off the weight whose norm DoRA trains",
        ("finetune.lora_variant=rslora", "finetune.lora_init=eva"),
        ("finetune.lora_variant=dora", "finetune.lora_init=pissa"),
    ),
    Combination(
        ("finetune.lora_rank", "finetune.lora_init"),
        {"finetune.lora_rank": lambda rank: rank % 2 == 1, "finetune.lora_init": "orthogonal"},
        "which halves it", ("finetune.lora_rank=8", "finetune.lora_init=default"),
        ("finetune.lora_rank=7", "finetune.lora_init=orthogonal"),
    ),
    Combination(
        ("finetune.lora_init", "project.insertion"),
        {"finetune.mode": "lora", "finetune.lora_init": "spd", "project.insertion": other_than("linear")},
        "whose directions are none of a linear module's outputs",
        ("finetune.lora_init=eva", "project.insertion=linear"), ("finetune.lora_init=spd", "project.insertion=rope"),
    ),
    Combination(
        ("finetune.lora_init_iterations", "finetune.lora_init"),
        {"finetune.lora_init_iterations": is_set, "finetune.lora_init": other_than("pissa")},
        "which has none", ("finetune.lora_init=pissa", "finetune.lora_init_iterations=null"),
        ("finetune.lora_init_iterations=4",),
    ),
    Combination(
        ("finetune.lora_parameters", "finetune.mode"),
        {"finetune.lora_parameters": bool, "finetune.mode": "full"},
        "which trains every parameter", ("finetune.mode=lora", _NO_EXPERTS),
        (_EXPERTS, "finetune.lora_dropout=0", "finetune.mode=full"),
    ),
    Combination(
        ("finetune.lora_parameters", "finetune.lora_dropout"),
        _ADAPTED_EXPERTS | {"finetune.lora_dropout": above(0)},
        "since the update of an expert is added to its weight, in front of which nothing is dropped",
        ("finetune.lora_dropout=0", _NO_EXPERTS), (_EXPERTS,),
    ),
    Combination(
        ("finetune.lora_parameters", "finetune.lora_variant"),
        _ADAPTED_EXPERTS | {"finetune.lora_variant": "dora"},
        "whose norms PEFT has of linear modules alone", ("finetune.lora_variant=rslora", _NO_EXPERTS),
        (_EXPERTS, "finetune.lora_dropout=0", "finetune.lora_variant=dora"),
    ),
    Combination(
        ("finetune.lora_parameters", "finetune.lora_init"),
        _ADAPTED_EXPERTS | {"finetune.lora_init": other_than("default", "gaussian")},
        "which PEFT has for linear modules alone", ("finetune.lora_init=gaussian", _NO_EXPERTS),
        (_EXPERTS, "finetune.lora_dropout=0", "finetune.lora_init=olora"),
    ),
    Combination(
        ("finetune.lora_parameters", "evaluate.engine"),
        _ADAPTED_EXPERTS | {"evaluate.engine": "vllm"},
        "which was not tried with adapters of experts in one tensor", ("evaluate.engine=hf", _NO_EXPERTS),
        (_EXPERTS, "finetune.lora_dropout=0", "generate.vllm_python=PYTHON"),
    ),
)  # fmt: skip
