"""One vLLM engine for as long as its standard input is open: `PYTHON serve.py`, run by an interpreter that has vllm.

Both directions are a JSON object a line. In: first the settings of the engine, then any of

    {"do": "request", "key": "7", "tokens": [...], "seed": 1, "adapter": null, "sampling": {...}}
    {"do": "operators", "path": null}     what the sites hold their keys and values to from now on
    {"do": "seen"}                        what the operators counted and measured

and out: {"ready": {...}}, then a line for each of them. Requests are answered as they end, and new ones join at any
time. It imports nothing of the package that it comes with: vllm pins other versions of torch and transformers.
"""

# vLLM is not installed where the types are checked: its pins are its own.
# pyright: reportMissingImports=false
from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import Any

NOT_INSTALLED = 3
EXTENSION = "kv_operators.KVOperators"


def main() -> int:
    """Serve until the input ends; a failure of the engine ends the process, with its own words on standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the engine prints is no answer
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        import vllm
    except ImportError as error:
        sys.stderr.write(f"vllm is not installed in {sys.executable}: {error}\n")
        return NOT_INSTALLED
    import vllm.v1.engine.llm_engine  # takes long, and may be over when the settings come

    line = sys.stdin.readline()
    if not line:
        return 0
    server = _Server(json.loads(line), answers)
    server.say({"ready": {"vllm": vllm.__version__, "settings": server.arguments}})
    server.serve()
    return 0


def engine_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of vLLM's engine; `options` of the user come last."""
    import torch

    arguments = {
        "model": settings["model"],
        "revision": settings["revision"],
        "dtype": settings["dtype"],
        "trust_remote_code": settings["trust_remote_code"],
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # the model's own suggestions are for its users, and not taken silently
        "max_model_len": settings["max_length"],
        "tensor_parallel_size": settings["tensor_parallel"],
        "pipeline_parallel_size": settings["pipeline_parallel"],
        "enable_prefix_caching": True,
        "worker_extension_cls": EXTENSION,
        "additional_config": {"spd_sites": settings["sites"]},  # part of the key of compiled graphs
        "disable_log_stats": True,
        "seed": 0,
    }
    if settings["lora_rank"]:
        rank = next(rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= settings["lora_rank"])
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        arguments["gpu_memory_utilization"] = round(0.9 * free / total, 3)
    else:
        # A request with a generator of its own can't be prefilled in parts: the CPU's generator has no offset to
        # set back. Whole prompts never need it. And what is compiled there starts minutes later.
        arguments |= {"enforce_eager": True, "enable_chunked_prefill": False}
        arguments["max_num_batched_tokens"] = max(2048, settings["max_length"])
        arguments["kv_cache_memory_bytes"] = cache_bytes()
        if settings["tensor_parallel"] * settings["pipeline_parallel"] == 1:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return arguments | json.loads(settings["options"])


def cache_bytes() -> int:
    """Of the keys and values on a CPU: at most 2 GiB, and a quarter of what is free."""
    import psutil

    return min(2 * 2**30, psutil.virtual_memory().available // 4)


class _Server:
    """The engine, what is asked of it, and where answers go."""

    def __init__(self, settings: dict[str, Any], answers: Any) -> None:
        os.environ["SPD_VLLM_SITES"] = json.dumps(settings["sites"])
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self.answers, self.arguments = answers, engine_arguments(settings)
        self.engine = LLMEngine.from_engine_args(EngineArgs(**self.arguments))
        self.inbox: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.adapters: dict[str, int] = {}
        self.is_open = True
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            self.inbox.put(json.loads(line))
        self.inbox.put(None)

    def say(self, answer: dict[str, Any]) -> None:
        """Write one line at once."""
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()

    def serve(self) -> None:
        """Take what has come, make a step, give what has ended."""
        while True:
            is_idle = not self.engine.has_unfinished_requests()
            if is_idle and not self.is_open:
                return
            self._take(wait=is_idle)
            if self.engine.has_unfinished_requests():
                for made in self.engine.step():
                    if made.finished:
                        self.say({"key": made.request_id, "tokens": tokens(made), "ended": ended(made)})

    def _take(self, *, wait: bool) -> None:
        while self.is_open:
            try:
                asked = self.inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if asked is None:
                self.is_open = False
            elif asked["do"] == "request":
                self._add(asked)
            elif asked["do"] == "operators":
                self.engine.reset_prefix_cache()
                found = self.engine.collective_rpc("spd_set_operators", args=(asked["path"],))
                self.say({"operators": max(found)})
            else:
                self.say({"seen": merged(self.engine.collective_rpc("spd_seen"))})

    def _add(self, asked: dict[str, Any]) -> None:
        from vllm.lora.request import LoRARequest

        adapter = asked["adapter"]
        lora = None
        if adapter is not None:
            number = self.adapters.setdefault(adapter, len(self.adapters) + 1)
            lora = LoRARequest(f"adapter-{number}", number, adapter)
        prompt = {"prompt_token_ids": asked["tokens"]}
        self.engine.add_request(asked["key"], prompt, sampling_of(asked), lora_request=lora)


def sampling_of(asked: dict[str, Any]) -> Any:
    """The request's sampling with its own seed: every field that may change a token, nothing is left to defaults."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    wanted = asked["sampling"]
    return SamplingParams(
        temperature=wanted["temperature"],
        top_p=wanted["top_p"],
        top_k=wanted["top_k"],
        min_p=wanted["min_p"],
        repetition_penalty=wanted["repetition_penalty"],
        max_tokens=wanted["max_new_tokens"],
        stop_token_ids=wanted["eos_token_ids"],
        seed=asked["seed"],
        output_kind=RequestOutputKind.FINAL_ONLY,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        min_tokens=0,
        ignore_eos=False,
        stop=[],
        logit_bias=None,
        bad_words=[],
        n=1,
        detokenize=False,
    )


def tokens(made: Any) -> list[int]:
    """The completion with its end-of-sequence token, which vLLM may keep to itself."""
    first = made.outputs[0]
    found = list(first.token_ids)
    if first.finish_reason == "stop" and isinstance(first.stop_reason, int) and found[-1:] != [first.stop_reason]:
        found.append(first.stop_reason)
    return found


def ended(made: Any) -> str:
    """Why the completion ended, in vLLM's words."""
    return str(made.outputs[0].finish_reason)


def merged(found: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """What all workers have seen of each site: ranks of a tensor-parallel group see the same."""
    sites: dict[str, list[float]] = {}
    for one in found:
        for name, seen in one.items():
            sites[name] = [max(pair) for pair in zip(seen, sites.get(name, seen), strict=True)]
    return sites


if __name__ == "__main__":
    sys.exit(main())
