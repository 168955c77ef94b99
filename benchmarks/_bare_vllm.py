"""`LLM.generate` with nothing around it, for `engines.py`: run by an interpreter that has vllm.

In: a JSON line with the engine's settings and requests, then a line for each round. Out: a line when the first of all
requests is answered, and one for each round, with its seconds and tokens. Arguments and sampling are those of our own
engine.
"""

import json
import os
import sys
import time


def main() -> None:
    """Serve rounds until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    settings, requests, inside = json.loads(sys.stdin.readline())
    os.environ["SPD_VLLM_SITES"] = "[]"
    sys.path.insert(0, inside)
    import serve
    from vllm import LLM

    engine = LLM(**serve.engine_arguments(settings))
    prompts = [{"prompt_token_ids": one["tokens"]} for one in requests]
    sampling = [serve.sampling_of(one) for one in requests]

    def say(**found: float) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    for number, (prompt, asked) in enumerate(zip(prompts, sampling, strict=True)):
        engine.llm_engine.add_request(str(number), prompt, asked)
    while not any(one.finished for one in engine.llm_engine.step()):
        pass
    say(first=1.0)
    while engine.llm_engine.has_unfinished_requests():
        engine.llm_engine.step()
    for _ in sys.stdin:
        engine.reset_prefix_cache()
        started, cpu = time.perf_counter(), time.process_time()
        found = engine.generate(prompts, sampling, use_tqdm=False)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        say(seconds=seconds, cpu_seconds=cpu, tokens=sum(len(serve.tokens(one)) for one in found))


if __name__ == "__main__":
    main()
