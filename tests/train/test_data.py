"""Reading rows: every kind of source, and one line for each that cannot be read."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from jaxdistill.train import data
from jaxdistill.train.chat_rows import FORMS
from jaxdistill.train.data import (
    encode_rows,
    load_rows,
)
from tests.errors import error_of
from tests.tiny import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ENDINGS = ".jsonl, .jsonl.gz, .json, .json.gz, .txt, .txt.gz, .parquet"
SOURCES = (
    f"a file ending in {ENDINGS}, a directory of such files, or the name of a hub data set such as "
    "'owner/name' or 'owner/name:config'"
)


def write(path: Path, content: str | bytes) -> str:
    """Writes a file, compressed if it is named so, and gives its path."""
    raw = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.name.endswith(".gz") else raw)
    return str(path)


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".JSONL"])
def test_json_lines(tmp_path, ending):
    path = write(tmp_path / f"x{ending}", "\ufeff" + lines({"text": "ä"}) + "\n" + '{"text": "b"}')
    rows = load_rows(path)
    assert isinstance(rows, datasets.Dataset)
    assert list(rows) == [{"text": "ä"}, {"text": "b"}]


@pytest.mark.parametrize("ending", [".json", ".json.gz"])
def test_json_list(tmp_path, ending):
    path = write(tmp_path / f"x{ending}", json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    assert load_rows(path)["text"][:] == ["a", "b"]


@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
def test_a_text_file_is_one_document(tmp_path, ending):
    assert list(load_rows(write(tmp_path / f"x{ending}", "a\n\nb\n"))) == [{"text": "a\n\nb\n"}]


def test_parquet(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(str(tmp_path / "x.parquet"))
    assert load_rows(str(tmp_path / "x.parquet"))["text"][:] == ["a", "b"]


def test_rows_of_several_forms_share_a_file(tmp_path):
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    given = [
        {"text": "t", "id": 1},
        {"messages": messages, "id": 2},
        {"instruction": "i", "input": "", "output": "o", "id": 3},
    ]
    rows = load_rows(write(tmp_path / "x.jsonl", lines(*given)))
    given[1]["messages"] = json.dumps(messages)
    assert [{k: v for k, v in row.items() if v is not None} for row in rows] == given
    assert len(encode_rows(rows, byte_tokenizer())) == 3


def test_each_row_keeps_its_own_keys(tmp_path):
    calls = [{"function": {"name": "add", "arguments": a}} for a in ({"x": 1}, {"y": [None, 2.5]})]
    given = [
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [c]},
        ]
        for c in calls
    ]
    rows = load_rows(write(tmp_path / "x.jsonl", lines(*({"messages": m} for m in given))))
    assert [json.loads(row["messages"]) for row in rows] == given


def test_parquet_rows_of_objects_lose_the_keys_of_others(tmp_path):
    arguments = [{"x": 1, "y": None}, {"x": None, "y": 2}]  # as Arrow must hold them
    given = [
        [{"role": "user", "content": "q", "tool_calls": [{"arguments": a}]}] for a in arguments
    ]
    datasets.Dataset.from_dict({"messages": given}).to_parquet(str(tmp_path / "x.parquet"))
    rows = [json.loads(row["messages"]) for row in load_rows(str(tmp_path / "x.parquet"))]
    assert [row[0]["tool_calls"][0]["arguments"] for row in rows] == [{"x": 1}, {"y": 2}]


def test_strings_that_look_like_dates_stay_strings(tmp_path):
    given = [{"text": "2020-01-01 00:00:00"}, {"text": "2020-01-02 00:00:00"}]
    assert list(load_rows(write(tmp_path / "x.jsonl", lines(*given)))) == given


def test_columns_arrow_cannot_hold_are_left_out_and_no_others(tmp_path):
    given = [
        {"text": "a", "n": 1, "weight": 1, "k": 1},
        {"text": "b", "n": [2], "weight": 0.5, "k": 2},
    ]
    rows = list(load_rows(write(tmp_path / "x.jsonl", lines(*given))))
    assert rows == [{k: v for k, v in row.items() if k != "n"} for row in given]
    path = write(
        tmp_path / "y.jsonl", lines({"text": "a", "weight": 1}, {"text": "b", "weight": "2"})
    )
    assert "'weight'" in error_of(load_rows, path)


def test_a_directory_is_read_in_the_order_of_its_paths(tmp_path):
    write(tmp_path / "b.jsonl", lines({"text": "2", "id": 7}))
    write(tmp_path / "a.txt", "1")
    write(tmp_path / "c" / "d.json.gz", '[{"text": "3"}]')
    write(tmp_path / ".hidden" / "x.txt", "no")
    write(tmp_path / "README.md", "no")
    rows = load_rows(str(tmp_path))
    assert rows["text"][:] == ["1", "2", "3"]
    assert rows["id"][:] == [None, 7, None]


def test_a_directory_keeps_its_splits_apart(tmp_path):
    names = {
        "gsm8k_train.jsonl": "train",
        "other.jsonl": "train",
        "test-00000-of-00001.jsonl": "test",
        "gsm8k_test-00000-of-00001.jsonl": "test",
        "Dev.jsonl": "validation",
        "val/x.jsonl": "validation",
        "trainer-test-notes.jsonl": "train",
    }
    for name in names:
        write(tmp_path / name, lines({"text": name}))
    for split in ("train", "test", "validation"):
        got = set(load_rows(str(tmp_path), split=split)["text"])
        assert got == {name for name, of in names.items() if of == split}
    assert load_rows(str(tmp_path), split="valid")["text"][:] == ["Dev.jsonl", "val/x.jsonl"]
    assert load_rows(str(tmp_path / "test-00000-of-00001.jsonl"))["text"][:]  # one file, one split


def test_directory_files_that_agree_on_the_rows_alone(tmp_path):
    write(tmp_path / "a.jsonl", lines({"text": "1", "label": 0}))
    write(tmp_path / "b.jsonl", lines({"text": "2", "label": "zero"}))
    write(tmp_path / "c.jsonl", "")
    assert list(load_rows(str(tmp_path))) == [{"text": "1"}, {"text": "2"}]


def test_an_unreadable_source_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for empty in ("", " "):  # not the working directory
        assert "--data" in error_of(load_rows, empty)
    missing = f"{tmp_path}/no.jsonl"
    assert error_of(load_rows, missing) == (
        f"data {missing!r} does not exist; accepted: {SOURCES}; check the path"
    )
    assert error_of(load_rows, "no.jsonl") == (
        f"data 'no.jsonl' does not exist; accepted: {SOURCES}; check the path"
    )
    assert "'stories' does not exist" in error_of(load_rows, "stories")  # not owner/name
    csv = write(tmp_path / "x.csv", "a,b")
    assert error_of(load_rows, csv) == (
        f"data file {csv!r} has the ending '.csv'; accepted: {ENDINGS}; convert it"
    )
    empty = str(tmp_path / "empty")
    Path(empty).mkdir()
    assert error_of(load_rows, empty) == (
        f"directory {empty!r} holds no data files; accepted: files ending in {ENDINGS}; "
        "put one there or give another directory"
    )
    write(tmp_path / "splits" / "train.jsonl", lines({"text": "a"}))
    assert error_of(load_rows, f"{tmp_path}/splits", split="test") == (
        f"directory '{tmp_path}/splits' has no files of the split 'test'; accepted: train; "
        "choose one of these or give a single file"
    )


@pytest.mark.parametrize(
    ("name", "content"), [("x.jsonl", ""), ("x.jsonl", "\n\n"), ("x.json", "[]"), ("x.txt", " \n")]
)
def test_no_rows(tmp_path, name, content):
    path = write(tmp_path / name, content)
    for source in (path, str(tmp_path)):
        assert error_of(load_rows, source) == (
            f"data {source!r} holds no rows; accepted: at least one row; add some"
        )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            '{"text": "b"',
            "is not JSON (Expecting ',' delimiter: line 2 column 1 (char 13)); "
            "accepted: one object a line; correct or remove the line",
        ),
        ("[1]", f"is a list; accepted: an object with {FORMS}; correct the row"),
        ('{"text": 3}', "has a int in 'text'; accepted: a string; correct the row"),
        (
            '{"instruction": "i", "output": ["o"]}',
            "has a list in 'output'; accepted: a string; correct the row",
        ),
        (
            '{"context": "c", "text": null}',
            "has the fields 'context', 'text' with values in 'context'; "
            f"accepted: {FORMS}; rename the fields or fill them",
        ),
        (
            "{}",
            "has the fields (none) with values in (none); "
            f"accepted: {FORMS}; rename the fields or fill them",
        ),
        *(
            (
                json.dumps({"messages": messages}),
                "has 'messages' of another shape; accepted: a non-empty list of objects; correct "
                "the row",
            )
            for messages in ([], "hi", ["hi"], {"role": "user", "content": "x"})
        ),
        *(
            (
                json.dumps({"messages": messages}),
                "has a message 1 with nothing as its content; accepted: a string, a list of text "
                "parts, or null next to tool calls",
            )
            for messages in ([{"role": "user"}], [{"role": "user", "content": None}])
        ),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, bad, message):
    path = write(tmp_path / "x.jsonl", '{"text": "a"}\n' + bad + "\n")
    assert error_of(load_rows, path) == f"{path}:2 {message}"


def test_files_that_cannot_be_parsed(tmp_path):
    path = write(tmp_path / "x.json", '[{"text": "a"},]')
    assert error_of(load_rows, path).startswith(f"data file {path!r} is not JSON (")
    path = write(tmp_path / "y.json", '[{"text": "a"}, 3]')
    assert error_of(load_rows, path) == (
        f"{path} row 2 is a int; accepted: an object with {FORMS}; correct the row"
    )
    for name, content in [
        ("latin.txt", "ä".encode("latin-1")),
        ("latin.jsonl", b'{"text": "\xe4"}'),
    ]:
        path = write(tmp_path / name, content)
        start, end = error_of(load_rows, path).split(" (")[0], error_of(load_rows, path)
        assert start == f"data file {path!r} cannot be read"
        assert end.endswith(
            "; accepted: UTF-8 text, gzip-compressed where the name ends in .gz; write it again"
        )
    whole = gzip.compress(lines({"text": "a" * 1000}).encode())
    for content in (b"not gzip", whole[:-12], whole[:12] + b"\xff" * 20):
        (tmp_path / "x.jsonl.gz").write_bytes(content)
        assert " cannot be read (" in error_of(load_rows, str(tmp_path / "x.jsonl.gz"))
    path = write(tmp_path / "x.parquet", "not parquet")
    message = error_of(load_rows, path)
    assert message.startswith(f"data file {path!r} cannot be read (Parquet")
    assert message.endswith("; accepted: a Parquet file; write it again")


def test_unknown_columns(tmp_path):
    path = str(tmp_path / "x.parquet")
    datasets.Dataset.from_dict({"context": ["a"], "instruction": ["b"]}).to_parquet(path)
    assert error_of(load_rows, path) == (
        f"data {path!r} has the columns context, instruction; accepted: {FORMS}; rename them"
    )


def test_a_hub_name_without_network():
    # conftest.py forbids the network, which the hub's client reports at once.
    message = error_of(load_rows, "nobody/nothing")
    assert message.startswith(
        "data 'nobody/nothing' is neither a file nor a directory, and the split 'train' of a hub "
        "data set of that name cannot be loaded ("
    )
    assert message.endswith(
        f"); accepted: {SOURCES}; check the name and the network, or download the data and give "
        "its path"
    )


@pytest.mark.parametrize("writable", [True, False])
def test_a_hub_name_goes_to_datasets(monkeypatch, capfd, writable):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        assert not datasets.is_progress_bar_enabled()
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(data.huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(data, "_writable", lambda _: writable)
    assert load_rows("owner/name:config", split="train[:1%]")["text"][:] == ["a"]
    ((args, kwargs),) = calls
    assert args == ("owner/name", "config")
    assert kwargs["split"] == "train[:1%]"
    assert kwargs["keep_in_memory"] is not writable
    assert (kwargs["cache_dir"] is None) is writable
    assert writable or not Path(kwargs["cache_dir"]).exists()
    assert datasets.is_progress_bar_enabled()
    assert capfd.readouterr() == ("", "")


def test_a_prepared_hub_data_set_is_found_again(tmp_path):
    (tmp_path / "my-owner___my_name").mkdir()
    assert data._cached(tmp_path, "my-owner/MyName")
    assert not data._cached(tmp_path, "my-owner/other")
    assert not data._cached(tmp_path / "none", "my-owner/other")


def test_reading_is_silent_and_needs_no_home(tmp_path):
    """Reads every kind of file where neither the home nor the working directory can be used."""
    write(tmp_path / "d" / "a.jsonl.gz", lines({"text": "1"}))
    write(tmp_path / "d" / "b.txt", "2")
    datasets.Dataset.from_dict({"text": ["3"]}).to_parquet(str(tmp_path / "d" / "c.parquet"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "cwd").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))} | {
        "HOME": "/nonexistent/home",
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(tmp_path / "tmp"),
    }
    code = (
        "from jaxdistill.train.data import load_rows\n"
        f"rows = load_rows({str(tmp_path / 'd')!r})\n"
        "assert rows['text'][:] == ['1', '2', '3'], rows[:]"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path / "cwd",
        env=environment,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list((tmp_path / "tmp").iterdir())
    assert not list((tmp_path / "cwd").iterdir())
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        "a.jsonl.gz",
        "b.txt",
        "c.parquet",
    ]
