"""Rows from files, the hub and what is built in; every fault names the place and the remedy."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from spd_dist.config import Data
from spd_dist.data import sources, text_files
from spd_dist.data.sources import Source, check_leaks, load_rows, parse_source, published_size, sources_of
from spd_dist.data.tasks import find_task
from spd_dist.errors import DataError
from spd_dist.overrides import load_config
from spd_dist.storage.artifacts import content_hash

GSM8K, ARITHMETIC = find_task("gsm8k"), find_task("arithmetic")


def row(number, **changes):
    return {
        "id": f"r{number}",
        "question": f"How much is {number} + 1?",
        "solution": f"{number} + 1",
        "answer": "1",
    } | changes


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ids(split, config, task=GSM8K):
    return [row["id"] for row in load_rows(task, split, config)]


def test_rows_keep_the_order_of_their_file_and_are_cut_by_count(tmp_path):
    path = write(tmp_path / "rows.jsonl", map(row, range(5)))
    config = Data(train=path, test=path, num_train=2, num_test=3)
    assert ids("train", config) == ["r0", "r1"]
    assert ids("test", config) == ["r0", "r1", "r2"]


def test_calibration_falls_back_to_the_training_rows_whatever_their_number(tmp_path):
    config = Data(train=write(tmp_path / "rows.jsonl", map(row, range(5))), num_train=2)
    assert ids("calibration", config) == ["r0", "r1", "r2", "r3", "r4"]
    own = write(tmp_path / "own.jsonl", [row(9)])
    assert ids("calibration", replace(config, calibration=own)) == ["r9"]
    assert ids("calibration", config, ARITHMETIC) == ids("calibration", config), (
        "not the task's own, as training is not"
    )
    assert len(ids("calibration", Data(), ARITHMETIC)) == 500


def test_parquet_and_jsonl_hold_the_same_rows(tmp_path):
    rows = [row(number) for number in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    jsonl = write(tmp_path / "rows.jsonl", rows)
    assert load_rows(GSM8K, "train", Data(train=str(tmp_path / "rows.parquet"))) == load_rows(
        GSM8K, "train", Data(train=jsonl)
    )


def test_many_rows_lie_in_a_file_and_are_the_same_with_the_same_hash(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", [row(number, tags=["a", {"b": number}]) for number in range(9)])
    config = Data(train=path, num_train=8)
    expected = load_rows(GSM8K, "train", config)
    monkeypatch.setattr(text_files, "MOST_IN_MEMORY", 3)
    found = load_rows(GSM8K, "train", config)
    assert (type(expected), type(found)) == (list, text_files.FiledRows)
    assert list(found) == expected == [found[place] for place in range(8)]
    assert (found[-1], len(found), list(reversed(found))) == (expected[-1], 8, expected[::-1])
    assert found[2:5] == expected[2:5], "few are a list"
    assert list(found[1:7][::2]) == expected[1:7][::2]
    assert content_hash(found) == content_hash(expected)
    assert content_hash([found, "more"]) == content_hash([expected, "more"])
    with pytest.raises(IndexError):
        found[8]
    with pytest.raises(TypeError, match="set is not plain data"):
        content_hash([{1, 2}])
    Path(path).write_text(Path(path).read_text() + "{")
    with pytest.raises(DataError, match=r"data\.train.*line 10.*not JSON"):
        load_rows(GSM8K, "train", config)


def test_sources_follow_each_other_and_can_be_sliced(tmp_path):
    path, more = write(tmp_path / "rows.jsonl", map(row, range(5))), write(tmp_path / "more.jsonl", [row(7)])
    assert ids("train", Data(train=f"{path}[:-3], {more}")) == ["r0", "r1", "r7"]
    assert ids("test", Data(test=f"{path}[-1:]")) == ["r4"]


def test_rows_without_an_id_take_their_line(tmp_path):
    rows = [{key: value for key, value in row(number).items() if key != "id"} for number in range(2)]
    assert ids("train", Data(train=write(tmp_path / "rows.jsonl", rows))) == ["rows/1", "rows/2"]


def test_blank_lines_are_skipped_and_numbers_become_text_ids(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(row(0, id=12)) + "\n\n")
    assert ids("train", Data(train=str(path))) == ["12"]


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("openai/gsm8k", Source("openai/gsm8k", "", "test", slice(None, None))),
        ("openai/gsm8k:main", Source("openai/gsm8k", "main", "test", slice(None, None))),
        ("openai/gsm8k:main:train", Source("openai/gsm8k", "main", "train", slice(None, None))),
        ("a/b::train[-100:]", Source("a/b", "", "train", slice(-100, None))),
        ("rows.jsonl[5:10]", Source("rows.jsonl", "", "", slice(5, 10))),
        ("C:/rows.parquet", Source("C:/rows.parquet", "", "", slice(None, None))),
        ("builtin:arithmetic:train", Source("builtin", "arithmetic", "train", slice(None, None))),
    ],
)
def test_sources_are_read_as_documented(text, source):
    assert parse_source(text, "test") == source


@pytest.mark.parametrize(
    "name", ["arithmetic", "gsm8k", "svamp", "math", "mbpp", "mbpp_sanitized", "codealpaca", "mmlu", "bbh"]
)
def test_every_task_says_where_its_test_rows_come_from(name):
    task = find_task(name)
    for text in task.sources["test"].split(","):
        assert parse_source(text, "").split
    assert sources_of(task, "calibration", Data()) == task.sources.get("calibration", task.sources.get("train"))


def test_the_hub_is_asked_for_config_and_split(monkeypatch):
    asked = []
    rows = [{"question": "Half of 4?", "answer": "4/2\n#### 2"}, {"question": "Half of 2?", "answer": "2/2\n#### 1"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or rows)
    found = load_rows(GSM8K, "test", Data())
    assert [row["id"] for row in found] == ["openai/gsm8k:main:test/0", "openai/gsm8k:main:test/1"]
    assert [row["answer"] for row in found] == ["2", "1"]
    load_rows(GSM8K, "calibration", Data(calibration="a/b"))
    load_rows(GSM8K, "train", Data(train="a/b@v2:main:dev[:1]"))
    assert asked == [
        (("openai/gsm8k", "main"), {"split": "test", "revision": None}),
        (("a/b", None), {"split": "train", "revision": None}),
        (("a/b", "main"), {"split": "dev", "revision": "v2"}),
    ]


def test_an_unreachable_hub_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"hub data set openai/gsm8k:main:train: cannot be loaded: .*or give a local path: data\.train"
    ):
        load_rows(GSM8K, "train", Data())


def test_a_task_without_the_split_says_what_to_set():
    with pytest.raises(
        DataError, match=r"data\.train: the task 'bbh' has no train split of its own; set data\.train=PATH"
    ):
        load_rows(find_task("bbh"), "train", Data())


MISSING = r"rows\.jsonl, line 1, field '{}': missing, the row has id, {}"
FAULTS = {
    "": r"rows\.jsonl holds no rows; name a source that does",
    "{not json}\n": r"rows\.jsonl, line 1: not JSON \(.*\); write one object a line",
    "\n[1, 2]\n": r"rows\.jsonl, line 2: \[1, 2\] is not a JSON object; write one object a line",
    json.dumps({"id": "a", "solution": "s"}): MISSING.format("question", "solution; the task 'gsm8k' needs"),
    json.dumps({"id": "a", "question": "q"}): MISSING.format("answer", "question"),
    json.dumps(row(0, answer=[3])): r"line 1, field 'answer': \[3\] is not of type str; .* \(data\.train",
    json.dumps(row(0)) + "\n" + json.dumps(row(0)): r"'id': 'r0' is also that of .*line 1; give every row an id",
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), FAULTS.items())
def test_a_wrong_file_names_line_field_and_remedy(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_rows(GSM8K, "train", Data(train=str(path)))


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(row(0)).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: not UTF-8 \(.*\); convert it"):
        load_rows(GSM8K, "train", Data(train=str(path)))


def test_a_missing_file_and_other_formats_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file \(from .*\); correct the path"):
        load_rows(GSM8K, "train", Data(train=str(tmp_path / "nowhere.jsonl")))
    (tmp_path / "rows.xml").write_text("<row/>")
    with pytest.raises(DataError, match=r"rows\.xml: a local file must be \.jsonl, .*; convert it, one row a line"):
        load_rows(GSM8K, "train", Data(train=str(tmp_path / "rows.xml")))
    (tmp_path / "rows.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"rows\.parquet: not readable as Parquet"):
        load_rows(GSM8K, "train", Data(train=str(tmp_path / "rows.parquet")))


@pytest.mark.parametrize("source", ["builtin:algebra:train", "builtin:arithmetic:dev", "builtin"])
def test_what_is_not_built_in_is_refused(source):
    with pytest.raises(
        DataError, match=r"not built in; there is builtin:arithmetic:SPLIT, of calibration, test, train"
    ):
        load_rows(ARITHMETIC, "test", Data(test=source))


def story(number, words="apples in the old blue box on the kitchen table of his aunt"):
    return f"Tom keeps {words}. He looks again and counts them with care. How many are there if he adds {number}?"


def leaking(tmp_path):
    train = write(
        tmp_path / "train.jsonl",
        [row(0, question=story(1)), row(1, question=story(2)), row(2, question="Quite another question of six words?")],
    )
    test = write(
        tmp_path / "test.jsonl",
        [row(10, question=story(1).upper()), row(11, question="Nothing of that kind is asked here, is it?")],
    )
    return Data(train=train, test=test)


def test_shared_problems_are_reported(tmp_path):
    reports = {
        (report.split, report.other): report for report in check_leaks(GSM8K, leaking(tmp_path), num_calibration=1)
    }
    leaked = reports["train", "test"]
    assert (leaked.num_rows, leaked.num_exact, leaked.num_near) == (3, 1, 1)
    assert [(leak.id, leak.other_id) for leak in leaked.leaks] == [("r0", "r10"), ("r1", "r10")]
    assert str(leaked) == "train against test: 1 exact and 1 near duplicates in 3 rows"
    assert reports["calibration", "train"].num_rows == 1
    assert len(reports) == 3


def test_shared_problems_are_removed_before_the_rows_are_counted(tmp_path):
    config = replace(leaking(tmp_path), leaks="remove", num_train=1)
    assert ids("train", config) == ["r2"]
    assert ids("calibration", config) == ["r2"]
    assert ids("test", config) == ["r10", "r11"]
    strict = replace(config, leak_similarity=1.0, num_train=None)
    assert ids("train", strict) == ["r1", "r2"]


def test_training_problems_of_a_calibration_split_of_its_own_are_removed_where_all_are(tmp_path):
    own = write(tmp_path / "calibration.jsonl", [row(20, question="Quite another question of six words?")])
    config = replace(
        leaking(tmp_path), calibration=own, test=write(tmp_path / "none.jsonl", [row(30, question="Why?")])
    )
    assert ids("train", replace(config, leaks="remove")) == ["r0", "r1", "r2"]
    everywhere = replace(config, leaks="remove_all")
    assert ids("train", everywhere) == ["r0", "r1"]
    assert ids("calibration", everywhere) == ["r20"]
    of_training = replace(everywhere, calibration=None)
    assert ids("train", of_training) == ids("calibration", of_training) == ["r0", "r1", "r2"]


def test_nothing_left_after_removal_is_an_error(tmp_path):
    config = replace(leaking(tmp_path), leaks="remove")
    with pytest.raises(
        DataError, match=r"data\.leaks=remove: every train row is also in the test split; correct data\.train"
    ):
        load_rows(GSM8K, "train", replace(config, test=config.train))


def test_a_split_without_a_source_is_not_compared(tmp_path):
    task = find_task("bbh")
    path = write(tmp_path / "rows.jsonl", [{"id": "1", "task": "t", "input": "?", "target": "Yes"}])
    assert check_leaks(task, Data(test=path), num_calibration=1) == []


def test_the_test_set_of_a_run_does_not_depend_on_its_seed_but_on_that_of_the_data():
    rows = {seed: load_rows(ARITHMETIC, "test", load_config(overrides=[f"seed={seed}"]).data) for seed in (1, 2)}
    assert rows[1] == rows[2]
    assert load_rows(ARITHMETIC, "test", Data(seed=7)) != rows[1]


def test_only_the_published_rows_have_the_published_size(tmp_path, monkeypatch):
    rows = [row(number) for number in range(3)]
    of_three = replace(GSM8K, test_size=3)
    path = write(tmp_path / "rows.jsonl", rows)
    assert published_size(of_three, Data()) == 3
    assert published_size(of_three, Data(test=path)) is None
    digest = sources._digest(of_three, load_rows(of_three, "test", Data(test=path)))
    monkeypatch.setattr(sources, "PUBLISHED_TESTS", {"gsm8k": digest})
    others = [row(number, id=str(number), solution=f"  {number} + 1") for number in (2, 0, 1)]
    assert published_size(of_three, Data(test=write(tmp_path / "others.jsonl", others), num_test=1)) == 3
    assert published_size(of_three, Data(test=write(tmp_path / "wrong.jsonl", [*rows[:2], row(2, answer="9")]))) is None
    assert published_size(of_three, Data(test=write(tmp_path / "more.jsonl", [*rows, row(4)]))) is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (" ", "source '': names nothing; give files"),
        ("@main", "source '@main': names nothing; give files"),
        ("x" * 300 + ".jsonl", "a name of 306 bytes, of which file systems take 255"),
        ("~nobody_of_this_name/rows.jsonl", "no such file"),
        ("/", "cannot be loaded"),
        ("rows.jsonl[99999999999999999999:]", "source 'rows.jsonl': a slice has more than 18 digits"),
    ],
)
def test_a_source_that_is_none_is_one_sentence(source, message):
    with pytest.raises(DataError, match=message):
        ids("test", Data(test=source))


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("mmlu", {"question": "?", "choices": [], "answer": 0}, "0 choices; give 1 to 26"),
        (
            "mbpp",
            {"task_id": 1, "text": "x", "code": "", "test_list": [["assert f()"]]},
            "a test is no text; write each",
        ),
        ("mbpp", {"id": 1, "prompt": "x", "code": "", "setup": "", "tests": [1]}, "a test is no text; write each"),
    ],
)
def test_lists_of_a_row_hold_what_the_task_reads(tmp_path, task, change, message):
    with pytest.raises(DataError, match=message):
        ids("test", Data(test=write(tmp_path / "rows.jsonl", [change])), find_task(task))
