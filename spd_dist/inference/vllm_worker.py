"""Decode a prompts file by vLLM: `PYTHON vllm_worker.py MODEL PROMPTS OUTPUT`, run by an interpreter that has vllm.

It imports nothing of this package: vllm pins other versions of torch and transformers, and has its own environment.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NOT_INSTALLED = 3
PROMPTS_A_CALL = 512


def main(model: str, prompts: str, output: str) -> int:
    """Write a line a completion; those of a call are written at its end."""
    rows = [json.loads(line) for line in Path(prompts).read_text(encoding="utf-8").splitlines()]
    try:
        from vllm import LLM
    except ImportError as error:
        sys.stderr.write(f"vllm is not installed in {sys.executable}: {error}\n")
        return NOT_INSTALLED
    longest = max(len(row["prompt_tokens"]) + row["max_new_tokens"] for row in rows)
    # A folded checkpoint is always a fresh engine: no prefix cache of other weights can be left over.
    engine = LLM(
        model=model,
        dtype=stored_dtype(model),
        skip_tokenizer_init=True,
        max_model_len=longest,
        gpu_memory_utilization=memory_fraction(),
        enable_prefix_caching=True,
        seed=0,
    )
    with open(output, "a", encoding="utf-8") as file:
        for start in range(0, len(rows), PROMPTS_A_CALL):
            part = rows[start : start + PROMPTS_A_CALL]
            prompts_ids = [{"prompt_token_ids": row["prompt_tokens"]} for row in part]
            for row, made in zip(part, engine.generate(prompts_ids, list(map(settings, part))), strict=True):
                file.write(json.dumps({"id": row["id"], "sample": row["sample"], "tokens": tokens(made)}) + "\n")
            file.flush()
    return 0


def stored_dtype(model: str) -> str:
    """That of the policy: left to itself, vLLM would take 16 bits for a float32 checkpoint."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "auto")


def memory_fraction() -> float:
    """What vLLM may reserve of all memory: most of what is free, since the policy itself is in the same memory."""
    import psutil
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return round(0.85 * free / total, 3)
    memory = psutil.virtual_memory()
    return round(0.4 * memory.available / memory.total, 3)  # vLLM looks at one NUMA node, which may be fuller


def settings(row: dict[str, Any]) -> Any:
    """The row's sampling, with its own seed: it does not depend on the batch."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=row["temperature"],
        top_p=row["top_p"],
        top_k=row["top_k"],
        min_p=row["min_p"],
        repetition_penalty=row["repetition_penalty"],
        max_tokens=row["max_new_tokens"],
        stop_token_ids=row["eos_token_ids"],
        seed=row["seed"],
        detokenize=False,
    )


def tokens(made: Any) -> list[int]:
    """The completion with its end-of-sequence token, which vLLM may keep to itself."""
    first = made.outputs[0]
    found = list(first.token_ids)
    if first.finish_reason == "stop" and isinstance(first.stop_reason, int) and found[-1:] != [first.stop_reason]:
        found.append(first.stop_reason)
    return found


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
