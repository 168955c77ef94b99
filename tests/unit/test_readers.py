"""Rows of every kind of file that people have: the same rows, or one sentence that names file, row and field."""

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow
import pytest

from spd_dist.config import Data
from spd_dist.data.readers import read_rows
from spd_dist.data.sources import load_rows
from spd_dist.data.tasks import find_task
from spd_dist.errors import DataError

ROWS = [
    {"question": "How much is 1 + 1?", "solution": "1 + 1", "answer": "007"},
    {"question": 'Say "a, b"\nand \u00e9.', "solution": "", "answer": "2"},
    {"question": "tab\there", "solution": "s", "answer": "3"},
]
GSM8K = find_task("gsm8k")


def rows_of(name, split="train", task=GSM8K):
    return [
        {key: value for key, value in row.items() if key != "id"} for row in load_rows(task, split, Data(train=name))
    ]


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def as_csv(path: Path, delimiter=",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FILES = {
    "rows.jsonl": LINES,
    "rows.ndjson": LINES.replace(b"\n", b"\r\n"),
    "marked.jsonl": b"\xef\xbb\xbf" + LINES,
    "list.json": json.dumps(ROWS, indent=1).encode(),
    "lines.json": LINES,
    "columns.json": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}).encode(),
    "inside.json": json.dumps({"data": ROWS}).encode(),
    "rows.jsonl.gz": gzip.compress(LINES),
    "rows.jsonl.bz2": bz2.compress(LINES),
    "rows.json.xz": lzma.compress(json.dumps(ROWS).encode()),
    "rows.jsonl.zst": zstd(LINES),
}


@pytest.mark.parametrize(("name", "content"), FILES.items())
def test_json_is_read_in_every_form_and_packing(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert rows_of(str(tmp_path / name)) == ROWS
    assert load_rows(GSM8K, "train", Data(train=str(tmp_path / name)))[0]["id"] == f"{name.partition('.')[0]}/1"


def test_csv_and_tsv_are_text_as_it_stands(tmp_path):
    assert rows_of(str(as_csv(tmp_path / "rows.csv"))) == ROWS
    assert rows_of(str(as_csv(tmp_path / "rows.tsv", "\t"))) == ROWS
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress((tmp_path / "rows.csv").read_bytes()))
    assert rows_of(str(tmp_path / "rows.csv.gz")) == ROWS


def test_what_datasets_saved_is_read_by_split(tmp_path):
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=saved, dev=saved.select([1])).save_to_disk(tmp_path / "several")
    assert rows_of(str(tmp_path / "one")) == rows_of(str(tmp_path / "several")) == ROWS
    assert rows_of(f"{tmp_path}/several::dev") == ROWS[1:2]
    assert rows_of(f"{tmp_path}/several::train[1:]") == ROWS[1:]
    [arrow] = (tmp_path / "one").glob("*.arrow")
    assert rows_of(str(arrow)) == ROWS
    with pytest.raises(DataError, match=r"several: has no split 'test', of train, dev; name one: .*several::train"):
        load_rows(GSM8K, "test", Data(test=f"{tmp_path}/several"))


def test_a_pattern_is_all_its_files_by_name_and_rows_of_equal_numbers_stay_apart(tmp_path):
    for folder, part in (("b", LINES), ("a", LINES.splitlines()[0])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "part[0].jsonl").write_bytes(part)
    assert rows_of(f"{tmp_path}/*/part*.jsonl") == [ROWS[0], *ROWS]
    assert rows_of(f"{tmp_path}/**/*.jsonl[1:2]") == ROWS[:1]
    assert rows_of(f"{tmp_path}/a/part[0].jsonl") == ROWS[:1]
    found = load_rows(GSM8K, "train", Data(train=f"{tmp_path}/*/part*.jsonl"))
    assert [row["id"] for row in found[:2]] == ["part[0]/1", f"{tmp_path}/b/part[0].jsonl/1"]
    with pytest.raises(DataError, match=r"none\*\.jsonl: no file matches this pattern"):
        rows_of(f"{tmp_path}/none*.jsonl")
    with pytest.raises(DataError, match=r"field 'id': 'part\[0\]/1' is also that of"):
        rows_of(f"{tmp_path}/a/part[0].jsonl,{tmp_path}/a/part[0].jsonl")


def test_lists_in_cells_are_lists_and_other_cells_are_not(tmp_path):
    path = tmp_path / "rows.csv"
    cells = ['["a", "b"]', "['a', 'b']", '[{"role": "user"}]', "[1, 2]", "[0, 1)", "['a' 'b']", "[]"]
    path.write_text("".join('"' + cell.replace('"', '""') + '"\n' for cell in ["cell", *cells]))
    expected = [["a", "b"], ["a", "b"], [{"role": "user"}], "[1, 2]", "[0, 1)", "['a' 'b']", "[]"]
    assert [row.row["cell"] for row in read_rows(str(path))] == expected


def test_numbers_become_text_where_text_belongs(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": 1.0, "question": 12, "solution": 0.5, "answer": 7.0}))
    assert load_rows(GSM8K, "train", Data(train=str(path))) == [
        {"id": "1", "question": "12", "solution": "0.5", "answer": "7"}
    ]
    path.write_text(json.dumps({"Body": "Two.", "Question": 3, "Equation": 2, "Answer": 2.0}))
    assert load_rows(GSM8K, "train", Data(train=str(path)))[0]["question"] == "Two. 3"


def test_lists_hold_texts_and_nothing_else(tmp_path):
    path = tmp_path / "rows.jsonl"
    mmlu = {"question": "Which?", "choices": [1, 2.0], "answer": "1"}
    path.write_text(json.dumps(mmlu))
    [row] = load_rows(find_task("mmlu"), "test", Data(test=str(path)))
    assert (row["choices"], row["answer"]) == (["1", "2"], "B")
    for choices in (["a", None], [None], ["a", {"b": 1}]):
        path.write_text(json.dumps(mmlu | {"choices": choices}))
        with pytest.raises(DataError, match=r"line 1, field 'choices': .* holds what is no text"):
            load_rows(find_task("mmlu"), "test", Data(test=str(path)))
    path.write_text(json.dumps({"task_id": 3, "text": "t", "code": "c", "test_list": "['assert f(1)'"}))
    with pytest.raises(DataError, match=r"line 1: mbpp row 3: its test_list is one text; write it as a list"):
        load_rows(find_task("mbpp"), "test", Data(test=str(path)))


def test_a_folder_of_files_is_read_by_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.csv").write_text("question,solution,answer\nq,s,007\nr,s,2\n")
    (tmp_path / "folder" / "test.csv").write_text("question,solution,answer\nq,s,1\n")
    assert [row["answer"] for row in rows_of(f"{tmp_path}/folder")] == ["7", "2"], "types are guessed"
    assert [row["answer"] for row in load_rows(GSM8K, "test", Data(test=f"{tmp_path}/folder"))] == ["1"]


DEEP = "[" * 100_000 + "]" * 100_000
FAULTS = {
    b'{"question": null, "solution": "", "answer": "1"}': r"line 1, field 'question': None is not of type str",
    b'{"question": true, "solution": "", "answer": "1"}': r"field 'question': True is not of type str",
    b'{"question": "q", "solution": "", "answer": NaN}': r"field 'answer': nan is not of type str",
    b'{"Body": null, "Question": "q"}': r"line 1, field 'Body': None is not what belongs there; the task 'gsm8k' needs",
    b'{"Body": [1], "Question": "q"}': r"line 1, field 'Body': \[1\] is not what belongs there",
    b'{"question": "\\ud800"}': r"line 1, field 'question': holds \\ud800, half of a character",
    b'{"a": {"\\udc00": 1}}': r"line 1, field 'a': holds \\udc00, half of a character",
    b'{"a": ' + DEEP.encode() + b"}": r"line 1: lists or objects lie deeper than 32",
    b'{"a": ' + DEEP[99_950:100_050].encode() + b"}": r"line 1, field 'a': lists or objects lie deeper than 32",
    b'{"a": ' + b"9" * 5000 + b"}": r"line 1: not JSON \(Exceeds the limit",
    b'{"question": "\xff"}': r"line 1: not UTF-8 \(.*\); convert it",
    b'{"question": "q"': r"line 1: not JSON",
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), FAULTS.items(), ids=range(len(FAULTS)))
def test_a_bad_row_is_one_sentence(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        rows_of(str(tmp_path / "rows.jsonl"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


FILE_FAULTS = {
    "a.csv": (b"a,a\n1,2\n", r"a\.csv, line 1: the columns \['a'\] stand twice"),
    "b.csv": (b'a,b\n"x\ny",2\n\n1\n', r"b\.csv, line 5: 1 cells, but the header has 2"),
    "c.csv": (b"a\n\xff\n", r"c\.csv: not UTF-8"),
    "d.csv": (b'a\n"x', r"d\.csv, line 2: not readable as CSV"),
    "e.jsonl.gz": (b"no gzip", r"e\.jsonl\.gz: not readable as \.gz"),
    "f.jsonl.gz": (gzip.compress(LINES * 99)[:-20], r"f\.jsonl\.gz: not readable as \.gz"),
    "g.jsonl.zst": (b"no zstd", r"g\.jsonl\.zst: not readable as \.zst"),
    "h.json": (b"[1]", r"h\.json, row 1: 1 is not a JSON object; write a list of objects"),
    "i.arrow": (b"nothing", r"i\.arrow: not readable as Arrow"),
    "j.zip": (b"PK", r"j\.zip: a local file must be \.jsonl"),
}


@pytest.mark.parametrize(("name", "fault"), FILE_FAULTS.items())
def test_a_bad_file_is_one_sentence(tmp_path, name, fault):
    content, message = fault
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(str(tmp_path / name)))
