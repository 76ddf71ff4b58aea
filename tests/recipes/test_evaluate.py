"""`evaluate`: text alone, choices alone, both, beside a teacher; what it prints and refuses."""

import json
from pathlib import Path

import pytest

from jaxdistill.cli import main
from jaxdistill.errors import UserError
from jaxdistill.evals.choices import load_choices, score_choices
from jaxdistill.models.hub import load_model
from jaxdistill.recipes.evaluate import Evaluate, evaluate
from tests import tiny


def save_questions(path, number, label=0):
    rows = (
        {"context": f"{i} and one is", "choices": [str(i + 1), "a fish"], "label": label}
        for i in range(number)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny.save_model(folder / "model")
    sums = save_questions(folder / "sums.jsonl", 4)
    fish = save_questions(folder / "fish.jsonl", 6, label=1)
    return model, tiny.save_text(folder / "text.jsonl", rows=4), sums, fish


def test_json_holds_each_file_and_the_mean(inputs, capsys):
    model, _, sums, fish = inputs
    main(["evaluate", "--model", model, "--choices", sums, fish, "--limit", "5", "--json"])
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    assert "sums" in captured.err and "fish" in captured.err  # the progress bars
    result = json.loads(line)
    assert list(result) == ["choices", "choices_mean"]
    loaded = load_model(model)
    for name, path, items in (("sums", sums, 4), ("fish", fish, 5)):
        want = score_choices(
            loaded.apply_fn(),
            loaded.params,
            loaded.text_tokenizer(),
            load_choices(path, limit=5),
            max_length=128,
        ).metrics
        assert result["choices"][name] == pytest.approx(want, rel=1e-6)
        assert result["choices"][name]["items"] == items
    # The questions of both files are the same and their labels opposite.
    first, second, mean = (*result["choices"].values(), result["choices_mean"])
    for key in ("acc", "acc_norm", "bits_per_byte"):
        assert mean[key] == pytest.approx((first[key] + second[key]) / 2)
    assert mean["items"] == 9


def test_text_keeps_its_keys_beside_choices(inputs):
    model, data, sums, _ = inputs
    text = evaluate(Evaluate(model=model, data=data, seq_len=32))
    assert list(text) == ["nll", "perplexity", "tokens"]
    both = evaluate(Evaluate(model=model, data=data, seq_len=32, choices=(sums,)))
    assert {key: both[key] for key in text} == text
    assert both["choices"].keys() == {"sums"} and both["choices_mean"]["items"] == 4


def test_teacher_may_read_with_another_tokenizer(inputs, tmp_path):
    """On choices alone vocabularies may differ; retention is accuracy over the teacher's."""
    model, _, sums, fish = inputs
    teacher = tiny.save_model(tmp_path / "teacher", seed=3, vocab_size=300)
    got = evaluate(Evaluate(model=model, teacher=teacher, choices=(sums, fish)))
    alone = evaluate(Evaluate(model=teacher, choices=(sums, fish)))
    kept = [*got["choices"].values(), got["choices_mean"]]
    of_teacher = [*alone["choices"].values(), alone["choices_mean"]]
    for student, best in zip(kept, of_teacher, strict=True):
        assert student["teacher_acc"] == best["acc"]
        want = student["acc"] / best["acc"] if best["acc"] else None
        assert student["retention"] == (None if want is None else pytest.approx(want))
    assert any(row["retention"] is not None for row in kept)
    with pytest.raises(SystemExit):  # on text they may not
        main(["evaluate", "--model", model, "--teacher", teacher, "--data", inputs[1]])


def test_tables_are_printed(inputs, capsys):
    model, data, sums, fish = inputs
    arguments = ["evaluate", "--model", model, "--choices", sums, fish, "--limit", "2"]
    main([*arguments, "--data", data, "--seq-len", "32", "--teacher", model])
    out = capsys.readouterr().out
    assert out.index("NLL") < out.index("accuracy")
    for word in ("sums", "fish", "mean", "kept", "100.0%", "±"):
        assert word in out
    main(["evaluate", "--model", model, "--choices", sums])
    out = capsys.readouterr().out
    assert "NLL" not in out and "teacher" not in out and "mean" not in out


def test_bad_input_is_one_line(inputs, tmp_path, capsys):
    model, _, sums, _ = inputs

    def said(*arguments):
        with pytest.raises(SystemExit) as e:
            main(["evaluate", "--model", model, *arguments])
        captured = capsys.readouterr()
        assert e.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
        return captured.err

    assert said() == "error: neither --data nor --choices given; accepted: one of them, or both\n"
    assert "--limit -1 given; accepted: 0 (all) or more" in said("--choices", sums, "--limit", "-1")
    assert "none.jsonl' does not exist; accepted" in said("--choices", str(tmp_path / "none.jsonl"))
    (tmp_path / "sums.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "label": 5}\n')
    assert "have one name, 'sums'" in said("--choices", sums, str(tmp_path / "sums.jsonl"))
    assert "have one name, 'sums'" in said("--choices", sums, sums)
    bad = said("--choices", str(tmp_path / "sums.jsonl"))
    assert f"{tmp_path / 'sums.jsonl'}:1 has the label 5 for 2 choices" in bad


def test_options_are_checked_before_anything_is_read():
    with pytest.raises(UserError, match="neither --data nor --choices given"):
        evaluate(Evaluate(model="none"))


def test_slices_of_text_and_choices(inputs, tmp_path):
    """The whole is what is found without slices; a slice is what is found on its items alone."""
    model, data, sums, fish = inputs
    teacher = tiny.save_model(tmp_path / "teacher", seed=3)
    given = {"model": model, "teacher": teacher, "data": data, "seq_len": 128}
    plain = evaluate(Evaluate(**given, packing="none", choices=(sums, fish)))
    specs = ("second=^row 1|^1 and", "longest:0.3")
    found = evaluate(Evaluate(**given, choices=(sums, fish), slice=specs))["slices"]
    assert list(found) == ["text", "sums", "fish"]
    whole = found["text"]["all"]
    assert whole["items"] == 4
    for name in ("nll", "kl", "agreement"):
        assert whole["metrics"]["student"][name][0] == pytest.approx(plain[name], rel=1e-4)
    lost = whole["metrics"]["student"]["nll"][0] - whole["metrics"]["teacher"]["nll"][0]
    assert whole["derived"]["lost"][0] == pytest.approx(lost)
    one = tmp_path / "one.jsonl"
    one.write_text(Path(data).read_text().splitlines()[1])
    alone = evaluate(Evaluate(model=model, data=str(one), seq_len=128))
    second = found["text"]["second"]
    assert second["items"] == 1 and second["metrics"]["student"]["nll"][1:] == [None, None]
    assert second["metrics"]["student"]["nll"][0] == pytest.approx(alone["nll"], rel=1e-4)
    for name in ("sums", "fish"):
        acc = found[name]["all"]["metrics"]["student"]["acc"][0]
        assert acc == pytest.approx(plain["choices"][name]["acc"])
        assert found[name]["second"]["items"] == 1


def test_a_text_longer_than_a_row_is_one_item(inputs):
    model, data, _, _ = inputs
    found = evaluate(Evaluate(model=model, data=data, seq_len=16, slice=("longest:0.5",)))
    assert found["slices"]["text"]["all"]["items"] == 4


def test_slices_are_shown(inputs, capsys):
    model, data, sums, _ = inputs
    given = ["--model", model, "--data", data, "--choices", sums, "--seq-len", "64"]
    main(["evaluate", *given, "--slice", "first=^row 0|^0 and"])
    shown = capsys.readouterr().out
    assert shown.count("first") == 2 and "student nll" in shown and "student acc" in shown


def test_a_slice_of_no_source_is_refused(inputs):
    model, data, sums, _ = inputs
    with pytest.raises(UserError, match="--slice topic given"):
        evaluate(Evaluate(model=model, data=data, choices=(sums,), slice=("topic",)))
