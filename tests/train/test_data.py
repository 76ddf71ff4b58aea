"""Checks the road from files to batches: rows, tokens and targets, packing, order and resume."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxdistill.errors import UserError
from jaxdistill.train import data
from jaxdistill.train.data import (
    Example,
    Packed,
    batches,
    encode_rows,
    eval_batches,
    fingerprint,
    load_rows,
    no_packing,
    pack,
)
from tests.tiny import CHATML, byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
FORMS = (
    "'text', or 'messages' (a list of {role, content}), or 'instruction' and 'output' (and 'input')"
)
ENDINGS = ".jsonl, .jsonl.gz, .json, .json.gz, .txt, .txt.gz, .parquet"
SOURCES = (
    f"a file ending in {ENDINGS}, a directory of such files, or the name of a hub data set such as "
    "'owner/name' or 'owner/name:config'"
)
# Trims, begins with BOS, has no generation prompt, and ends only the last turn.
BRACKETS = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ '</s>' if loop.last }}"
    "{% else %}{{ raise_exception('only user and assistant,\nplease') }}{% endif %}{% endfor %}"
)
# Like Qwen3: an empty thought before the last answer; earlier thoughts are cut out of the text.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is im_end?"},
    {"role": "assistant", "content": "im_end"},
    {"role": "user", "content": "Höflich, bitte: 北京?"},
    {"role": "assistant", "content": "  Grüße aus 北京 🙂\n"},
]


def words_tokenizer():
    """Makes a tokenizer of whole words, without any special token."""
    words = "the cat sat on mat a dog [UNK]".split()
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def write(path: Path, content: str | bytes) -> str:
    """Writes a file, compressed if it is named so, and gives its path."""
    raw = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.name.endswith(".gz") else raw)
    return str(path)


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def error_of(function, *args, **kwargs) -> str:
    """Gives the message of the UserError that a call must raise, which must be one line."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def targets(example: Example, tokenizer) -> str:
    return tokenizer.decode(example.tokens[example.loss_mask], skip_special_tokens=False)


def make_examples(*lengths: int) -> list[Example]:
    """Makes examples whose tokens count up over all of them, from 100."""
    examples, start = [], 100
    for n in lengths:
        tokens = np.arange(start, start + n, dtype=np.int32)
        examples.append(Example(tokens=tokens, loss_mask=np.arange(n) > 0))
        start += n
    return examples


# ------------------------------------------------------------------------------ load_rows


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
    assert [{k: v for k, v in row.items() if v is not None} for row in rows] == given
    assert len(encode_rows(rows, byte_tokenizer())) == 3


def test_strings_that_look_like_dates_stay_strings(tmp_path):
    given = [{"text": "2020-01-01 00:00:00"}, {"text": "2020-01-02 00:00:00"}]
    assert list(load_rows(write(tmp_path / "x.jsonl", lines(*given)))) == given


def test_columns_arrow_cannot_hold_are_left_out(tmp_path):
    path = write(tmp_path / "x.jsonl", lines({"text": "a", "n": 1}, {"text": "b", "n": [2]}))
    assert list(load_rows(path)) == [{"text": "a"}, {"text": "b"}]


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


def test_an_unreadable_source_is_named_in_one_line(tmp_path):
    missing = f"{tmp_path}/no.jsonl"
    assert error_of(load_rows, missing) == (
        f"data {missing!r} does not exist; accepted: {SOURCES}; check the path"
    )
    assert error_of(load_rows, "no.jsonl") == (
        f"data 'no.jsonl' does not exist; accepted: {SOURCES}; check the path"
    )
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
                "has 'messages' of another shape; accepted: a non-empty list of {role, content} "
                "with two strings; correct the row",
            )
            for messages in (
                [],
                "hi",
                ["hi"],
                {"role": "user", "content": "x"},
                [{"role": "user"}],
                [{"role": "user", "content": None}],
            )
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


def test_gsm8k(shared_data):
    rows = load_rows(str(shared_data / "instruct" / "gsm8k_train.jsonl.gz"))
    assert len(rows) == 7473
    tokenizer = byte_tokenizer()
    chosen = rows.select(range(50))
    for row, example in zip(
        chosen, encode_rows(chosen, tokenizer, loss_on="completion"), strict=True
    ):
        assert targets(example, tokenizer) == row["output"] + "<|im_end|>"


# ----------------------------------------------------------------------------- encode_rows


def test_text_has_the_tokenizers_own_bos_and_one_eos():
    for bos in (False, True):
        tokenizer = byte_tokenizer(bos=bos)
        for text in ("héllo", "héllo</s>"):
            (example,) = encode_rows([{"text": text}], tokenizer)
            assert tokenizer.decode(example.tokens) == "<s>" * bos + "héllo</s>"
            assert example.tokens.dtype == np.int32
            assert example.loss_mask.tolist() == [False] + [True] * (len(example.tokens) - 1)
    (example,) = encode_rows([{"text": "hi"}], byte_tokenizer(), add_eos=False)
    assert byte_tokenizer().decode(example.tokens) == "hi"
    (example,) = encode_rows([{"text": "hi"}], byte_tokenizer(eos=False))
    assert byte_tokenizer().decode(example.tokens) == "hi"
    (example,) = encode_rows([{"text": "the cat sat"}], words_tokenizer())
    assert example.tokens.tolist() == [0, 1, 2]


def test_a_blank_text_gives_no_tokens():
    first, second, third = encode_rows(
        [{"text": ""}, {"text": "a"}, {"text": " \n"}], byte_tokenizer(bos=True)
    )
    assert (len(first.tokens), len(second.tokens), len(third.tokens)) == (0, 3, 0)


def test_more_rows_than_one_chunk_keep_their_order(capfd):
    tokenizer = byte_tokenizer()
    rows = [
        {"text": f"{i}"} if i % 3 else {"instruction": f"{i}", "output": "o"} for i in range(2500)
    ]
    examples = encode_rows(rows, tokenizer)
    for i, example in enumerate(examples):
        text = f"<|im_start|>user\n{i}<|im_end|>\n<|im_start|>assistant\no<|im_end|>\n"
        assert tokenizer.decode(example.tokens) == (f"{i}</s>" if i % 3 else text)
    assert capfd.readouterr() == ("", "")


def test_messages_through_the_chat_template():
    tokenizer = byte_tokenizer(bos=True)
    (example,) = encode_rows([{"messages": CONVERSATION}], tokenizer, template="chat")
    rendered = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert tokenizer.decode(example.tokens) == rendered  # no BOS: the template wrote none
    assert example.loss_mask[1:].all() and not example.loss_mask[0]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "im_end<|im_end|>  Grüße aus 北京 🙂\n<|im_end|>"),
        (
            THINKING,
            "im_end<|im_end|><think>\n\n</think>\n\n  Grüße aus 北京 🙂\n<|im_end|>",
        ),
        (BRACKETS, " im_end Grüße aus 北京 🙂</s>"),
        (None, "im_end</s>  Grüße aus 北京 🙂\n</s>"),
    ],
)
def test_completion_is_what_the_assistant_says_and_the_end_of_turn(template, expected):
    tokenizer = byte_tokenizer(template, bos=True)
    messages = CONVERSATION[1:] if template == BRACKETS else CONVERSATION
    (example,) = encode_rows([{"messages": messages}], tokenizer, loss_on="completion")
    assert targets(example, tokenizer) == expected
    (all_of_it,) = encode_rows([{"messages": messages}], tokenizer)
    assert (all_of_it.tokens == example.tokens).all()


def test_an_answer_that_the_template_changes_ends_at_its_own_end_of_turn():
    tokenizer = byte_tokenizer(THINKING)
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>hm</think>two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    (example,) = encode_rows([{"messages": messages}], tokenizer, loss_on="completion")
    expected = "two<|im_end|><think>\n\n</think>\n\nfour<|im_end|>"
    assert targets(example, tokenizer) == expected
    # The end of a later turn is not taken for its own.
    end = "{{ '<|im_end|>' if loop.last or m.role == 'user' }}"
    tokenizer = byte_tokenizer(THINKING.replace("<|im_end|>", end))
    message = error_of(encode_rows, [{"messages": messages}], tokenizer, loss_on="completion")
    assert "its answers are not found" in message


def test_a_generation_prompt_that_the_rendering_does_not_repeat():
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = byte_tokenizer(template)
    (example,) = encode_rows([{"messages": CONVERSATION[:3]}], tokenizer, loss_on="completion")
    assert targets(example, tokenizer) == "im_end<|im_end|>"


def test_an_empty_answer_teaches_the_end_of_turn():
    tokenizer = byte_tokenizer()
    row = {"instruction": "i", "input": None, "output": ""}
    (example,) = encode_rows([row], tokenizer, loss_on="completion")
    assert targets(example, tokenizer) == "<|im_end|>"


def test_instruction_and_input_are_joined_by_a_blank_line():
    tokenizer = byte_tokenizer()
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "not this"},
        {"instruction": "Add.", "input": "", "output": "3"},
        {"instruction": "Add.", "output": "3"},
    ]
    first, second, third = encode_rows(rows, tokenizer, template="plain")
    assert tokenizer.decode(first.tokens) == (
        "### Instruction:\nAdd.\n\n1 2\n\n### Response:\n3</s>"
    )
    assert tokenizer.decode(second.tokens) == "### Instruction:\nAdd.\n\n### Response:\n3</s>"
    assert (second.tokens == third.tokens).all()
    (bare,) = encode_rows(rows[1:2], tokenizer, template="plain", add_eos=False)
    assert tokenizer.decode(bare.tokens) == "### Instruction:\nAdd.\n\n### Response:\n3"


def test_plain_conversation():
    tokenizer = byte_tokenizer(None, bos=True)
    (example,) = encode_rows([{"messages": CONVERSATION[:4]}], tokenizer)
    assert tokenizer.decode(example.tokens) == (
        "<s>Be kind.\n\n### Instruction:\nWhat is im_end?\n\n### Response:\nim_end</s>\n\n"
        "### Instruction:\nHöflich, bitte: 北京?"
    )


def test_a_token_over_the_border_of_an_answer_is_a_target():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*alphabet, ":a", "</s>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(":", "a")]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        chat_template=(
            "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% endfor %}"
            "{{ 'a:' if add_generation_prompt else '</s>' }}"
        ),
    )
    row = {"instruction": "x", "output": "ab"}
    (example,) = encode_rows([row], tokenizer, loss_on="completion")
    said = [tokenizer.decode([t]) for t in example.tokens[example.loss_mask]]
    assert said == [":a", "b", "</s>"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "a"},
            "row 2 is a plain text, which has no completion; loss_on='completion' accepts "
            "'messages', or 'instruction' and 'output'; use loss_on='all'",
        ),
        (
            {"messages": CONVERSATION[:2]},
            "row 2 has no answer to learn from; loss_on='completion' accepts rows with an "
            "assistant's answer; remove the row or use loss_on='all'",
        ),
        (
            {"context": "a"},
            "row 2 has the fields 'context' with values in 'context'; "
            f"accepted: {FORMS}; rename the fields or fill them",
        ),
        ({"text": 1}, "row 2 has a int in 'text'; accepted: a string; correct the row"),
    ],
)
def test_a_row_that_cannot_be_encoded_is_named(row, message):
    rows = [{"instruction": "i", "output": "o"}, row]
    assert error_of(encode_rows, rows, byte_tokenizer(), loss_on="completion") == message


def test_template_errors():
    rows = [{"messages": CONVERSATION}]
    assert error_of(encode_rows, rows, byte_tokenizer(None), template="chat") == (
        "template is 'chat' but the tokenizer has no chat template; accepted: 'auto', 'plain', "
        "or a tokenizer with one; use template='plain'"
    )
    assert error_of(encode_rows, rows, byte_tokenizer(BRACKETS)) == (
        "row 1 is rejected by the tokenizer's chat template (only user and assistant, please); "
        "accepted: the roles and the order that the template knows; correct the row or use "
        "template='plain'"
    )
    strange = [{"messages": [{"role": "tool", "content": "x"}]}]
    assert error_of(encode_rows, strange, byte_tokenizer(None)) == (
        "row 1 has the role 'tool'; without a chat template the accepted roles are 'system', "
        "'user', 'assistant'; rename it or use a tokenizer with a chat template"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages | reverse %}{{ m.content }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m.role }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
    ],
)
def test_answers_that_a_template_hides(template):
    rows = [{"messages": CONVERSATION}]
    assert error_of(encode_rows, rows, byte_tokenizer(template), loss_on="completion") == (
        "row 1 is rendered by the tokenizer's chat template so that its answers are not found; "
        "loss_on='completion' accepts templates that keep the turns in order; use "
        "template='plain' or loss_on='all'"
    )


# -------------------------------------------------------------------- pack and no_packing


@pytest.mark.parametrize("seq_len", [2, 3, 7, 8, 50, 200])
def test_packing_keeps_the_stream_and_counts_its_targets(seq_len):
    lengths = [5, 1, 0, 20, 2, 8, 3, 0, 17, 1]
    examples = make_examples(*lengths)
    packed = pack(examples, seq_len, pad_id=9)
    total = sum(lengths)
    assert packed.tokens.shape == (-(-total // seq_len), seq_len)
    stream = packed.tokens.reshape(-1)
    assert (stream[:total] == np.concatenate([e.tokens for e in examples])).all()
    assert (stream[total:] == 9).all()

    # The same by hand, token by token.
    segment, position, mask = (np.zeros(stream.shape, kind) for kind in (int, int, bool))
    at = expected_targets = 0
    for n in lengths:
        pieces = len({i // seq_len for i in range(at, at + n)})
        expected_targets += n - pieces
        for k in range(n):
            here = at + k
            new_row, first = here % seq_len == 0, k == 0 or here % seq_len == 0
            segment[here] = 1 if new_row else segment[here - 1] + first
            position[here] = 0 if first else position[here - 1] + 1
            mask[here] = not first
        at += n
    assert (packed.segment_ids.reshape(-1) == segment).all()
    assert (packed.positions.reshape(-1) == position).all()
    assert (packed.loss_mask.reshape(-1) == mask).all()
    assert packed.num_targets == expected_targets
    assert {a.dtype.name for a in packed[:].values()} == {"int32", "bool"}


def test_packing_keeps_masks():
    tokens = np.arange(6, dtype=np.int32)
    mask = np.array([False, False, True, True, False, True])
    packed = pack([Example(tokens=tokens, loss_mask=mask)] * 2, 4)
    expected = [[0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 0, 1]]  # token 0 of row 2 was a target before
    assert packed.loss_mask.astype(int).tolist() == expected
    # An example may not sneak its first token in as a target.
    packed = pack([Example(tokens=tokens, loss_mask=np.ones(6, bool))], 8)
    assert packed.loss_mask[0].tolist() == [False] + [True] * 5 + [False] * 2


def test_one_example_a_row():
    packed = no_packing(make_examples(3, 1, 0, 2, 6), 4, pad_id=7)
    assert packed.tokens.tolist() == [[100, 101, 102, 7], [104, 105, 7, 7], [106, 107, 108, 109]]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert packed.positions.tolist() == [[0, 1, 2, 0], [0, 1, 0, 0], [0, 1, 2, 3]]
    assert packed.loss_mask.astype(int).tolist() == [[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1]]
    greedy = Example(tokens=np.arange(3, dtype=np.int32), loss_mask=np.ones(3, bool))
    assert no_packing([greedy], 3).loss_mask.tolist() == [[False, True, True]]


@pytest.mark.parametrize("lay_out", [pack, no_packing])
def test_nothing_to_lay_out(lay_out):
    for examples in ([], make_examples(0, 0)):
        packed = lay_out(examples, 4)
        assert packed.tokens.shape == packed.positions.shape == (0, 4)
    assert error_of(lay_out, make_examples(3), 1) == (
        "seq_len is 1; accepted: 2 or more, as the first token of a row is never predicted; "
        "raise it"
    )


# ---------------------------------------------------------- batches, eval_batches, fingerprint


def rows_of(batch: dict[str, np.ndarray]) -> list[int]:
    """Names the rows of a batch by their first token."""
    return batch["tokens"][:, 0].tolist()


@pytest.fixture
def ten_rows() -> Packed:
    packed = pack(make_examples(7, 40, 13), 6)
    assert len(packed) == 10
    return packed


@pytest.mark.parametrize(("batch_size", "steps"), [(5, 2), (4, 5), (3, 10), (20, 1)])
def test_every_row_comes_once_an_epoch_in_a_new_order(ten_rows, batch_size, steps):
    ds = batches(ten_rows, batch_size=batch_size, seed=3)
    epochs = batch_size * steps // 10
    seen = [row for step in range(3 * steps) for row in rows_of(ds[step])]
    orders = [seen[at : at + 10] for at in range(0, 30 * epochs, 10)]
    assert all(sorted(order) == sorted(ten_rows.tokens[:, 0]) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)


def test_a_batch_holds_whole_rows(ten_rows):
    batch = batches(ten_rows, batch_size=4, seed=0)[11]
    assert set(batch) == {"tokens", "loss_mask", "segment_ids", "positions"}
    where = [ten_rows.tokens[:, 0].tolist().index(row) for row in rows_of(batch)]
    for name, array in batch.items():
        assert isinstance(array, np.ndarray)
        assert array.dtype == getattr(ten_rows, name).dtype
        assert (array == getattr(ten_rows, name)[where]).all()


def test_a_run_resumes_exactly(ten_rows):
    whole = batches(ten_rows, batch_size=3, seed=1)
    run = [rows_of(whole[i]) for i in range(40)]
    for start in (0, 1, 17, 39):
        fresh = batches(pack(make_examples(7, 40, 13), 6), batch_size=3, seed=1)
        assert [rows_of(fresh[i]) for i in range(start, 40)] == run[start:]
    assert [rows_of(whole[i]) for i in reversed(range(40))] == run[::-1]
    assert [rows_of(batches(ten_rows, batch_size=3, seed=2)[i]) for i in range(40)] != run
    assert len(whole) > 10**15  # endless for every purpose


def test_order_and_fingerprint_are_the_same_in_another_process():
    code = (
        "import numpy as np\n"
        "from jaxdistill.train.data import Example, pack, batches, fingerprint\n"
        "tokens = np.arange(60, dtype=np.int32)\n"
        "packed = pack([Example(tokens=tokens, loss_mask=tokens > 0)], 6)\n"
        "ds = batches(packed, batch_size=4, seed=5)\n"
        "order = [ds[i]['tokens'][:, 0].tolist() for i in range(9)]\n"
        "result = fingerprint(packed), order\n"
    )
    here: dict = {}
    exec(code, here)
    done = subprocess.run(
        [sys.executable, "-c", code + "print(result)"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout == f"{here['result']}\n"


def test_without_shuffling_rows_come_in_order(ten_rows):
    ds = batches(ten_rows, batch_size=4, seed=0, shuffle=False)
    seen = [row for step in range(5) for row in rows_of(ds[step])]
    assert seen == ten_rows.tokens[:, 0].tolist() * 2


def test_fewer_rows_than_a_batch_are_repeated():
    packed = pack(make_examples(12), 6)
    for step in range(3):
        assert sorted(rows_of(batches(packed, batch_size=4, seed=0)[step])) == [100, 100, 106, 106]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 10, 16])
def test_eval_batches_keep_order_shape_and_count(ten_rows, batch_size):
    got = eval_batches(ten_rows, batch_size)
    assert {b["tokens"].shape for b in got} == {(batch_size, 6)}
    for name in ("tokens", "loss_mask", "segment_ids", "positions"):
        joined = np.concatenate([b[name] for b in got])
        assert joined.dtype == getattr(ten_rows, name).dtype
        assert (joined[:10] == getattr(ten_rows, name)).all()
        assert not joined[10:].any()
    assert sum(int(b["loss_mask"].sum()) for b in got) == ten_rows.num_targets


def test_batch_errors(ten_rows):
    empty = pack([], 6)
    no_rows = (
        "the data has no rows of tokens to make batches of; accepted: at least one row; "
        "give examples of two tokens or more"
    )
    assert error_of(batches, empty, batch_size=2, seed=0) == no_rows
    assert error_of(eval_batches, empty, 2) == no_rows
    too_small = "batch_size is 0; accepted: 1 or more; raise it"
    assert error_of(batches, ten_rows, batch_size=0, seed=0) == too_small
    assert error_of(eval_batches, ten_rows, 0) == too_small
    assert error_of(batches, ten_rows, batch_size=1, seed=-1) == (
        "seed is -1; accepted: 0 to 4294967295; choose one of these"
    )


def test_fingerprint_sees_every_array_and_shape(ten_rows):
    fingerprints = {fingerprint(ten_rows)}
    assert fingerprints == {fingerprint(pack(make_examples(7, 40, 13), 6))}
    for name in ("tokens", "loss_mask", "segment_ids", "positions"):
        arrays = {k: v.copy() for k, v in ten_rows[:].items()}
        arrays[name][2, 1] = not arrays[name][2, 1]
        fingerprints.add(fingerprint(Packed(**arrays)))
    fingerprints.add(fingerprint(Packed(**{k: v.reshape(6, 10) for k, v in ten_rows[:].items()})))
    assert len(fingerprints) == 6
    assert all(len(f) == 16 and int(f, 16) >= 0 for f in fingerprints)
