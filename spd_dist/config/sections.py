"""The settings of the method: one section a stage verb, and model and data; `side_sections.py` has the others.

A field has its type, default, bounds and sentence here and nowhere else. `spd_dist.overrides` merges YAML files and
`key=value` overrides into a `Config`. Importing this module imports no torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from spd_dist.config.engines import BatchSize, Engine, Server, engine_of
from spd_dist.config.setting import setting

STAGES = ("calibrate", "sketch", "reduce", "project", "generate", "finetune", "evaluate")
"""The method's verbs, in their order: modules, config sections, metric prefixes, and words after --from and --until."""


@dataclass(frozen=True)
class Model:
    """The policy that learns from itself."""

    name: str = setting("HuggingFaceTB/SmolLM2-135M-Instruct", "hub name, folder, GGUF file, or package:NAME")
    revision: str | None = setting(None, "branch, tag or commit on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("auto", "auto: bfloat16, float32 on CPU")
    quantization: Literal["none", "nf4"] = setting("none", "nf4: frozen weights of 4 bits by bitsandbytes (QLoRA)")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = setting("auto", "auto: what the model prefers")
    cache_dir: str | None = setting(None, "of converted GGUF weights; spd_dist in XDG_CACHE_HOME or ~/.cache")
    trust_remote_code: bool = setting(False, "run the model's own Python code")


@dataclass(frozen=True)
class Data:
    """The task, and where its rows come from."""

    task: str = setting("arithmetic", "a task's name, or its YAML file: prompts, target spans and scoring")
    seed: int = setting(42, "order and splits of what is built in: runs of other seeds have the same test", at_least=0)
    train: str | None = setting(None, "training prompts: hub name or file; the task's own if not given")
    calibration: str | None = setting(None, "calibration examples; the task's own split, else the first training rows")
    test: str | None = setting(None, "held-out examples; the task's own test split if not given")
    num_train: int | None = setting(None, "use only the first N training prompts", at_least=1)
    num_test: int | None = setting(None, "use only the first N test examples", at_least=1)
    template: Literal["chat", "plain"] = setting("chat", "chat: the tokenizer's chat template; plain: the bare prompt")
    template_options: dict[str, Any] = setting({}, "variables for the chat template, as {enable_thinking: false}")
    system: str | None = setting(None, "system prompt of the chat; the template's own if not given")
    thinking: Literal["keep", "drop", "off"] = setting(
        "keep", "thoughts: a student learns them, or what follows them alone; off: the chat template asks for none"
    )
    date: str = setting("2024-07-26", "the day, YYYY-MM-DD, for a chat template that asks for it; never the real one")
    turn: int | Literal["last", "first", "all"] = setting("last", "of messages: asked for and supervised, from 0")
    thinking_marks: tuple[str, ...] = setting((), "[OPEN,CLOSE] around thoughts, beside the known ones")
    max_prompt_tokens: int = setting(1024, "a longer prompt is an error", at_least=1)
    leaks: Literal["report", "remove", "remove_all"] = setting(
        "report", "rows whose problem is in the test split; all: training rows whose is in data.calibration, too"
    )
    leak_similarity: float = setting(0.5, "Jaccard similarity of 5-grams: one problem", above=0, at_most=1)


@dataclass(frozen=True)
class Calibrate:
    """The gradient of the masked loss at the KV sites (paper, Eq. 6)."""

    num_examples: int = setting(50, "calibration examples, the first of their split", at_least=1)
    layers: tuple[int | Literal["middle", "last"], ...] = setting(("middle", "last"), "of those with K and V")
    mask: str = setting("task", "supervised characters: task | full | regex:PATTERN | entry point name")
    span_policy: Literal["inside", "overlap"] = setting("inside", "how a token must meet a span")
    allow_empty: bool = setting(False, "skip and count examples whose span is missing or truncated, instead of failing")
    max_tokens: int = setting(1024, "longer examples are cut", at_least=2)
    batch_size: int = setting(8, "examples a micro-batch; the rows do not depend on it", at_least=1)
    num_shards: int = setting(8, "logical shards of the examples, whatever the world size", at_least=1)
    checkpointing: bool = setting(False, "recompute activations in the backward pass (non-reentrant)")


@dataclass(frozen=True)
class Sketch:
    """The streaming form of the second moment of the gradient rows."""

    method: Literal["auto", "frequent_directions", "gram"] = setting("auto", "auto: gram if it fits memory_gib")
    size: int | None = setting(None, "rows kept; min(width, max(2 rank, rank + 32)) if not given", at_least=1)
    alpha: float = setting(1.0, "share of the directions that a shrink touches", above=0, at_most=1)
    memory_gib: float = setting(2.0, "for auto: budget of the Gram matrices of all sites and shards", above=0)
    non_finite: Literal["raise", "skip"] = setting("raise", "a row with NaN or Inf: an error, or dropped and counted")


@dataclass(frozen=True)
class Reduce:
    """The sum of all ranks' sketches."""

    energy_tolerance: float = setting(1e-6, "largest relative gap between energy in and energy kept + lost", above=0)


@dataclass(frozen=True)
class Project:
    """The subspace, and how generation is held to it (paper, Eq. 12)."""

    directions: Literal["gradient", "gradient_x_activation", "activation"] = setting(
        "gradient", "the gradients' strongest; those whose removal raises the loss most; or activation-PCA, a control"
    )
    rank_rule: Literal["half", "fixed", "fraction", "energy"] = setting("half", "how the rank is chosen")
    rank: int | None = setting(None, "the rank, for rank_rule=fixed", at_least=1)
    fraction: float = setting(0.5, "share of the width, for rank_rule=fraction", above=0, at_most=1)
    energy: float = setting(0.95, "share of the energy to keep, for rank_rule=energy", above=0, at_most=1)
    centered: bool = setting(False, "take the rows about their mean")
    mode: Literal["hard", "blend", "soft", "random", "isotropic", "identity"] = setting("hard", "the fate of the rest")
    rho: float = setting(0.0, "share of the outside part that blend, random and isotropic keep", at_least=0, at_most=1)
    match_kl: bool = setting(
        False, "random: blend it down until it moves the policy as far as the gradients' own, by KL on calibration rows"
    )
    kinds: Literal["both", "key", "value"] = setting("both", "project keys and values, or one of them")
    insertion: Literal["linear", "rope", "head"] = setting("linear", "linear output; after RoPE (keys); or per KV head")

    def planned_rank(self, width: int) -> int:
        """The rank at a site of this width; half of it under `energy`, which only the spectrum decides."""
        if self.rank_rule == "fixed":
            return self.rank or 0
        return max(1, int(width * self.fraction) if self.rank_rule == "fraction" else width // 2)


@dataclass(frozen=True)
class Generate:
    """The policy's own training data: raw completions, nothing filtered."""

    engine: Engine = setting("auto", "auto chooses, and logs why")
    placement: Literal["auto", "replica", "layerwise"] = setting("auto", "whole on each rank, or sharded in lock-step")
    apply_as: Literal["hook", "fold"] = setting("hook", "project by forward hooks, or by folding into the weights")
    contrast: float = setting(
        1.0, "beta of log p + beta (log q - log p): p the policy, q the projected one, which 1 is", at_least=0
    )
    temperature: float = setting(0.7, "0 is greedy", at_least=0)
    top_p: float = setting(0.9, "nucleus sampling", above=0, at_most=1)
    top_k: int = setting(0, "0 is off", at_least=0)
    min_p: float = setting(0.0, "0 is off", at_least=0, at_most=1)
    repetition_penalty: float = setting(1.0, "1 is off", above=0)
    num_samples: int = setting(1, "completions a prompt", at_least=1)
    max_new_tokens: int = setting(256, "a completion is cut there", at_least=1)
    max_thought_tokens: int | None = setting(
        None, "engine hf: a thought is closed there; none if not given", at_least=1
    )
    batch_size: BatchSize = setting(
        32, "rows decoded together; samples do not depend on it; auto: as many as fit in memory", at_least=1
    )
    batch_invariant: bool = setting(False, "engine hf: bf16 samples depend on no rank or kill either; costs speed")
    compile: bool = setting(
        False, "engine hf, of evaluate, too: passes that add tokens are compiled, on a GPU captured as CUDA graphs"
    )
    num_tasks: int = setting(1, "jobs that share one corpus, as a SLURM array", at_least=1)
    task_index: int = setting(0, "which of them this one is", at_least=0)
    vllm_python: str | None = setting(None, "interpreter that has vllm, for engine=vllm")
    vllm_options: dict[str, Any] = setting({}, "arguments of vLLM's engine beside ours, as {max_num_seqs: 512}")
    tensor_parallel: int = setting(1, "engine=vllm: devices that share each layer; one rank leads them", at_least=1)
    pipeline_parallel: int = setting(1, "engine=vllm: groups of devices that share the layers", at_least=1)
    command: str | None = setting(
        None, "template with {model}, {prompts}, {output} (and {adapter}), for engine=command"
    )
    server: Server = field(default_factory=Server, metadata={"sentence": "an endpoint, for engine=server"})
    engine_timeout_seconds: float = setting(1800.0, "an engine silent for so long has failed", above=0)
    ssd_temperature: float = setting(1.6, "of the SSD arm; arXiv 2604.01193 samples instruct models so", at_least=0)
    ssd_top_p: float = setting(0.8, "of the SSD arm", above=0, at_most=1)
    ssd_top_k: int = setting(20, "of the SSD arm", at_least=0)
    max_empty_rate: float = setting(0.5, "largest share of empty completions", at_least=0, at_most=1)
    max_repetition_rate: float = setting(0.5, "largest share of completions that go in circles", at_least=0, at_most=1)
    max_unfinished_rate: float = setting(
        1.0, "largest share whose thought was cut at max_new_tokens; 1 only warns", at_least=0, at_most=1
    )
    max_length_rate: float = setting(1.0, "largest share cut at max_new_tokens; 1 only warns", at_least=0, at_most=1)


@dataclass(frozen=True)
class Finetune:
    """Supervised fine-tuning of the untouched model on its own completions (paper, Eq. 14)."""

    mode: Literal["lora", "full"] = setting("lora", "adapters by peft, or all parameters")
    lora_rank: int = setting(8, "rank of the adapters", at_least=1)
    lora_alpha: float = setting(8.0, "scale of the adapters, over the rank", above=0)
    lora_dropout: float = setting(0.05, "dropout in front of the adapters", at_least=0, at_most=1)
    lora_targets: tuple[str, ...] = setting(
        ("q_proj", "k_proj", "v_proj", "o_proj"), "modules that get an adapter: names, regex:PATTERN, or all-linear"
    )
    lora_parameters: tuple[str, ...] = setting((), "also experts in one tensor: [experts.gate_up_proj, ...]")
    lora_variant: Literal["lora", "rslora", "dora"] = setting("lora", "plain, rank-stabilised, or weight-decomposed")
    lora_init: Literal["default", "gaussian", "orthogonal", "eva", "olora", "pissa", "corda", "spd"] = setting(
        "default", "what adapters begin as, by PEFT's names, or spd: in the subspace; the base weights stay as they are"
    )
    lora_init_iterations: int | None = setting(
        None, "pissa: by so many subspace iterations (PEFT's pissa_niter_N); exact if not given", at_least=1
    )
    lora_init_examples: int = setting(32, "eva, corda: sequences of the corpus whose activations count", at_least=1)
    filter: tuple[Literal["ended", "loops", "agreed"], ...] = setting(
        (), "completions left out: not ended; in circles; not of the answer that most samples of the prompt give"
    )
    loss: Literal["cross_entropy", "distil"] = setting(
        "cross_entropy", "of the next tokens; distil: KL from the projected policy's next-token distributions"
    )
    divergence: Literal["forward", "reverse", "js"] = setting(
        "forward", "of distil: KL(teacher || student), KL(student || teacher), or Jensen-Shannon's between them"
    )
    num_on_policy_iterations: int = setting(
        4, "of arms that learn from their student's samples: in each it answers other prompts", at_least=1
    )
    loss_on: Literal["prompt_and_completion", "completion", "thought", "after_thought"] = setting(
        "prompt_and_completion", "Eq. 14 takes both; of a completion also its thought alone, or what follows it"
    )
    pads_in_loss: bool = setting(False, "prototype: pad to max_tokens, and train on the pads too")
    stop_on_train_loss: bool = setting(False, "prototype: stop when the training loss no longer falls, keep the best")
    optimizer: Literal["adamw", "adamw_8bit"] = setting("adamw", "adamw_8bit: states of 8 bits by bitsandbytes")
    learning_rate: float = setting(1e-5, "peak", above=0)
    weight_decay: float = setting(0.01, "of AdamW, decoupled", at_least=0)
    warmup_epochs: float = setting(0.5, "linear warm-up, then cosine to zero", at_least=0)
    max_grad_norm: float = setting(1.0, "gradients are clipped there", above=0)
    num_epochs: int = setting(5, "passes over the corpus", at_least=1)
    global_batch_size: int = setting(4, "sequences an optimizer step, over all ranks and accumulation", at_least=1)
    micro_batch_size: int = setting(4, "largest number of sequences a rank runs at once", at_least=1)
    packing: bool = setting(False, "several sequences a row, with block-diagonal attention")
    length_grouping: bool = setting(True, "global batches of sequences of similar length")
    max_tokens: int = setting(1024, "longer sequences are cut", at_least=2)
    checkpointing: bool = setting(False, "recompute activations in the backward pass (non-reentrant)")
    offload_activations: bool = setting(False, "with checkpointing: what is kept of a layer waits in host memory")
    checkpoint_every: int = setting(50, "optimizer steps between checkpoints", at_least=1)
    keep_checkpoints: int = setting(2, "newest checkpoints that are kept", at_least=1)
    keep_every: int | None = setting(None, "and one of every N steps, for good", at_least=1)
    validation_fraction: float = setting(0.0, "share of the corpus that is held out", at_least=0, at_most=0.5)
    keep_best: bool = setting(False, "save the weights of the epoch with the lowest validation loss, not the last ones")
    patience: int | None = setting(None, "stop after N epochs without a lower validation loss", at_least=1)
    merge: bool = setting(False, "lora: write the model with its adapters merged, too")
    liger: bool = setting(False, "fused norms and MLPs of liger-kernel, on an accelerator")

    @property
    def adapter_rank(self) -> int:
        """Of the adapter that is saved: with what it begins at, where that is a part of the base weight."""
        return self.lora_rank * (2 if self.lora_init in ("olora", "pissa", "corda") else 1)


@dataclass(frozen=True)
class Choices:
    """Tasks whose answer is one of several choices."""

    scoring: Literal["generated", "likelihood"] = setting(
        "generated", "judge the written answer, or take the likeliest choice (lm-eval's acc and acc_norm)"
    )


@dataclass(frozen=True)
class Evaluate:
    """Answers of every arm to the held-out examples."""

    arms: tuple[str, ...] = setting(("base", "psr", "spd", "projected"), "what is compared: spd_dist/arms.py")
    max_new_tokens: int = setting(256, "an answer is cut there", at_least=1)
    max_thought_tokens: int | None = setting(
        None, "engine hf: a thought is closed there; none if not given", at_least=1
    )
    temperature: float = setting(0.0, "0 is greedy", at_least=0)
    also: tuple[str, ...] = setting((), "tasks of other domains to answer, TASK or TASK=SOURCE: what an arm forgot")
    temperatures: tuple[float, ...] = setting((), "also base and students at these: the decode-only control")
    top_p: float = setting(1.0, "nucleus sampling", above=0, at_most=1)
    top_k: int = setting(0, "0 is off", at_least=0)
    min_p: float = setting(0.0, "0 is off", at_least=0, at_most=1)
    num_samples: int = setting(1, "answers an example; of several, the mean counts, and pass@k is shown", at_least=1)
    engine: Engine = setting("auto", "auto: vllm if generate.vllm_python is set, else hf; set up by generate's keys")
    batch_size: BatchSize = setting(32, "answers decoded together; auto: as many as fit in memory", at_least=1)
    batch_invariant: bool = setting(False, "engine hf: bf16 answers depend on no rank, kill or placement; costs speed")
    placement: Literal["auto", "replica", "layerwise"] = setting("auto", "as generate.placement")
    allow_code_execution: bool = setting(False, "run model-written code, in the sandbox")
    num_coloured: int = setting(64, "completions an arm whose tokens report.html colours; 0 for none", at_least=0)

    def decoding(self, generate: Generate | None = None) -> Generate:
        """The settings of an engine that answers; `generate` says how one with a process of its own is set up."""
        shared = dataclasses.replace(generate or Generate(), apply_as="hook", batch_invariant=self.batch_invariant)
        shared = dataclasses.replace(shared, engine=engine_of(self.engine, shared.vllm_python, None))
        shared = dataclasses.replace(shared, placement=self.placement, batch_size=self.batch_size, contrast=1.0)
        return dataclasses.replace(shared, max_new_tokens=self.max_new_tokens)
