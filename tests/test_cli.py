"""The command line: JSON as the last line, help for every verb, one line, code 2 on bad input."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxdistill.cli import VERBS, main
from jaxdistill.models.hub import load_model
from tests import tiny


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return tiny.save_model(folder / "model"), tiny.save_text(folder / "text.jsonl", rows=6)


def fails(capsys, *arguments):
    """Run a command that must fail; return its one line."""
    with pytest.raises(SystemExit) as e:
        main(list(arguments))
    assert e.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_there_for_every_verb(verb, capsys):
    with pytest.raises(SystemExit) as e:
        main([verb, "--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    # Every option is explained: none of them stands alone.
    assert VERBS[verb].__doc__.split()[0] in text and "--" in text


def test_evaluate_prints_json_as_its_last_line(inputs, capsys):
    model, data = inputs
    args = ["evaluate", "--model", model, "--teacher", model, "--data", data, "--seq-len", "32"]
    main([*args, "--packing", "none", "--json"])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["kl"] == pytest.approx(0, abs=1e-5) and result["agreement"] == 1
    assert result["tokens"] == 6 * 31
    # By hand: each row on its own, cut at 32 tokens.
    loaded = load_model(model)
    apply, total = loaded.apply_fn(), 0.0
    for line in Path(data).read_text().splitlines():
        ids = loaded.tokenizer(json.loads(line)["text"])["input_ids"][:32]
        z = np.asarray(apply(loaded.params, np.asarray([ids], np.int32)).logits()[0], np.float64)
        z = z - z.max(-1, keepdims=True)
        log_q = z - np.log(np.exp(z).sum(-1, keepdims=True))
        total -= log_q[np.arange(31), ids[1:]].sum()
    assert result["nll"] == pytest.approx(total / (6 * 31), rel=1e-5)
    assert result["perplexity"] == pytest.approx(np.exp(total / (6 * 31)), rel=1e-4)


def test_quantize_prints_json_as_its_last_line(inputs, tmp_path, capsys):
    model, data = inputs
    args = ["quantize", "--model", model, "--data", data, "--out", str(tmp_path / "r"), "--steps"]
    args += ["1", "--batch-size", "2", "--seq-len", "32", "--freeze", "mlp", "--bits", "8"]
    main([*args, "--group-size", "channel", "--ranges", "absmax", "--json"])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert list(result) == ["teacher", "ptq", "student"]
    assert result["ptq"]["kl"] < 0.1


def test_generate_prints_an_answer(inputs, capsys):
    model, _ = inputs
    asked = ["generate", "--model", model, "--prompt", "hello", "--max-new-tokens", "5"]
    said = []
    for mesh in ([], ["--mesh", "data=2,fsdp=2,tensor=2"]):
        main([*asked, *mesh])
        said.append(capsys.readouterr().out)
    assert len(said[0]) > 1 and said[0] == said[1]


def test_bad_inputs_are_one_line_and_write_nothing(inputs, tmp_path, capsys):
    model, data = inputs
    out = tmp_path / "out"
    base = ["quantize", "--out", str(out), "--steps", "1", "--seq-len", "32"]

    said = fails(capsys, *base, "--model", str(tmp_path / "none.gguf"), "--data", data)
    assert said.startswith(f"{tmp_path / 'none.gguf'} does not exist; accepted: ")
    said = fails(capsys, *base, "--model", model, "--data", str(tmp_path / "none.jsonl"))
    assert "none.jsonl" in said and "accepted" in said
    said = fails(capsys, *base, "--model", model, "--data", data, "--group-size", "48")
    assert said == (
        "group size 48 does not divide the 64 inputs of layers/mlp/gate_proj/kernel; choose a "
        "divisor of 64, or channel"
    )
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    said = fails(capsys, *base, "--model", model, "--data", str(empty))
    assert "empty.jsonl" in said
    said = fails(capsys, *base, "--model", model, "--data", data, "--freeze", "vproj")
    assert said.startswith("freeze pattern 'vproj' matches no parameter")
    said = fails(capsys, *base, "--model", model, "--data", data, "--batch-size", "0")
    assert said == "--batch-size 0 given; accepted: 1 or more"
    said = fails(capsys, *base[:-1], "4096", "--model", model, "--data", data)
    assert said.startswith("--seq-len 4096 exceeds the 128 positions of ")
    assert not out.exists()

    other = tiny.save_model(tmp_path / "other", vocab_size=300)
    larger = tiny.byte_tokenizer()
    larger.add_tokens(["the quick"])
    larger.save_pretrained(other)
    said = fails(capsys, "evaluate", "--model", model, "--teacher", other, "--data", data)
    assert "300" in said and "260" in said and "vocabulary" in said
    said = fails(capsys, "export", "--run", model, "--format", "gguf", "--out", str(tmp_path / "g"))
    assert said.startswith(f"{model} holds no finished student; give the --out of a finished")


def test_unwanted_resume_and_rerun_are_refused(inputs, tmp_path, capsys):
    model, data = inputs
    args = ["quantize", "--model", model, "--data", data, "--out", str(tmp_path / "r")]
    args += ["--steps", "0", "--seq-len", "32", "--group-size", "32"]
    said = fails(capsys, *args, "--resume")
    assert said == f"{tmp_path / 'r'} holds no run to resume; start it without --resume"
    main(args)
    capsys.readouterr()
    assert "already holds a run; pass --resume" in fails(capsys, *args)
    said = fails(capsys, *args, "--resume", "--lr", "0.5")
    assert "was started with lr=0.0001, now 0.5 is given" in said


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("--out", "r/" + "é" * 128, "--out has a name of 256 bytes"),
        ("--data", "x" * 300, "--data has a name of 300 bytes"),
        ("--model", "a\udcff", r"--model 'a\udcff' given"),
    ],
)
def test_a_name_that_no_file_can_have_is_refused_first(name, value, message, capsys):
    options = {"--model": "m", "--data": "d", "--out": "o"} | {name: value}
    said = fails(capsys, "quantize", *(word for pair in options.items() for word in pair))
    assert said.startswith(message)
