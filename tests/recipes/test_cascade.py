"""`cascade`: thresholds from one part of the questions, reported on the other, and served."""

import json

import numpy as np
import pytest

from jaxdistill.cli import main
from jaxdistill.errors import UserError
from jaxdistill.evals.cascade import Operating, Outcome, choice_confidence
from jaxdistill.evals.cascade_model import Answer, CascadeModel, choose
from jaxdistill.evals.choices import Question, load_choices, score_choices
from jaxdistill.models.hub import load_model
from jaxdistill.recipes.cascade import Cascade, cascade
from tests import tiny


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two models, and questions that each gets about half of right."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    words = ["fox", "dog", "brown", "quick", "row", "over", "the lazy", "jumps"]
    rows = (
        {
            "context": f"row {i} of {rng.choice(words)}",
            "choices": rng.choice(words, 2, replace=False).tolist(),
            "label": int(rng.integers(2)),
        }
        for i in range(60)
    )
    data = folder / "asked.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = [tiny.save_model(folder / name, seed=seed) for name, seed in (("s", 1), ("t", 2))]
    return (*models, str(data))


def scored_by(source, questions):
    model = load_model(source)
    tokenizer = model.text_tokenizer()
    return score_choices(
        model.apply_fn(), model.params, tokenizer, questions, max_length=128
    ).log_likelihoods


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory):
    student, teacher, data = inputs
    out = tmp_path_factory.mktemp("runs") / "cascade"
    options = {"student": student, "teacher": teacher, "data": data, "target_accuracy": 0.3}
    return out, cascade(Cascade(**options, out=out))


def test_the_report(made, inputs):
    out, report = made
    assert json.loads((out / "cascade.json").read_text()) == json.loads(json.dumps(report))
    assert {p.name for p in (out / "plots").iterdir()} == {"coverage.png", "cost.png"}
    assert report["questions"] == {"calibration": 30, "test": 30}
    assert report["unit"] == "GB read" and list(report["alone"]) == ["student", "teacher"]
    test = report["test"]
    assert sum(test["shares"]) == pytest.approx(1)
    low, high = test["interval"]
    assert 0 <= low < test["accuracy"] < high <= 1
    ends = {name: tier["accuracy"] for name, tier in report["alone"].items()}
    assert report["curve"]["accuracy"][-1] == pytest.approx(ends["student"])  # it answers all


@pytest.mark.parametrize("by", ["acc", "acc_norm"])
def test_what_is_served_is_what_was_reported(by, inputs, tmp_path, monkeypatch):
    """With a threshold that sends about half of the test questions on to the teacher."""
    student, teacher, data = inputs
    questions = load_choices(data)
    scores = {
        name: choose(questions, scored_by(source, questions), normalized=by == "acc_norm")
        for name, source in (("student", student), ("teacher", teacher))
    }
    sure = choice_confidence(scores["student"])["max_probability"]
    middle = float(np.median(sure))
    found = Operating((middle,), Outcome(0.5, 1.0, (0.5, 0.5)))
    monkeypatch.setattr("jaxdistill.recipes.cascade.calibrate", lambda *_, **__: found)
    given = {"student": student, "teacher": teacher, "data": data, "target_accuracy": 0.5}
    report = cascade(Cascade(**given, by=by, out=tmp_path / "c"))
    order = np.random.default_rng(0).permutation(60)[30:]
    test = [questions[i] for i in order]
    serve = CascadeModel.load(tmp_path / "c")
    answers = serve.answer([(q.context, q.choices) for q in test])
    for i, answer in zip(order, answers, strict=True):
        tier = "student" if sure[i] >= middle else "teacher"
        assert (answer.tier, answer.choice) == (tier, np.argmax(scores[tier][i]))
    shares = [np.mean([a.tier == name for a in answers]) for name in ("student", "teacher")]
    assert 0.2 < shares[0] < 0.8
    assert shares == pytest.approx(report["test"]["shares"])
    right = np.mean([a.choice == q.label for a, q in zip(answers, test, strict=True)])
    assert right == pytest.approx(report["test"]["accuracy"])
    assert serve(test[0].context, test[0].choices) == answers[0]
    with pytest.raises(UserError, match="accepted: two texts or more, none empty"):
        serve("q", ["one"])


def test_a_person_answers_what_no_model_is_sure_of(inputs):
    student, teacher, data = inputs
    models = {"student": load_model(student), "teacher": load_model(teacher)}
    asked = [(q.context, q.choices) for q in load_choices(data, 8)]
    (first, *_) = CascadeModel(models, [1.1, 1.1]).answer(asked)
    assert (first.choice, first.tier) == (None, "person") and 0 < first.confidence < 1
    sure = [a.confidence for a in CascadeModel(models, [0.0]).answer(asked)]
    cut = float(np.median(sure))
    found = CascadeModel(models, [cut, 1.1]).answer(asked)
    assert [a.tier == "student" for a in found] == [c >= cut for c in sure]
    assert {a.tier for a in found} == {"student", "person"}
    with pytest.raises(UserError, match="2 models, 3 thresholds"):
        CascadeModel(models, [0.1, 0.2, 0.3])


def test_costs_and_a_person_in_the_command(inputs, capsys):
    student, teacher, data = inputs
    given = ["--student", student, "--teacher", teacher, "--data", data]
    more = ["--costs", "1", "10", "100", "--target-accuracy", "0.8", "--by", "acc_norm", "--json"]
    main(["cascade", *given, *more])
    report = json.loads(capsys.readouterr().out)
    assert report["unit"] == "given" and list(report["alone"]) == ["student", "teacher", "person"]
    assert report["alone"]["person"].items() >= {"accuracy": 1.0, "cost": 100.0}.items()
    assert len(report["thresholds"]) == 2 and report["test"]["accuracy"] > 0.6
    assert report["test"]["shares"][2] > 0.3  # chance is half
    main(["cascade", *given, "--costs", "1", "10", "100", "--target-accuracy", "0.8"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "cascade" in shown and "person alone" in shown
    assert "With confidence 95% the accuracy" in shown


def test_no_threshold_may_be_trusted(inputs, tmp_path, capsys):
    student, teacher, data = inputs
    given = ["--student", student, "--teacher", teacher, "--data", data]
    main(["cascade", *given, "--target-accuracy", "0.99", "--out", str(tmp_path / "c")])
    assert "No threshold was found that keeps 99.0%" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="no thresholds, for none kept 0.99 with"):
        CascadeModel.load(tmp_path / "c")


def test_a_greatest_drop_instead_of_a_target(inputs, tmp_path, capsys):
    student, teacher, data = inputs
    given = ["--student", student, "--teacher", teacher, "--data", data, "--confidence", "0.8"]
    main(["cascade", *given, "--max-drop", "0.2", "--out", str(tmp_path / "c")])
    assert "20.0% below the teacher's" in " ".join(capsys.readouterr().out.split())
    report = json.loads((tmp_path / "c" / "cascade.json").read_text())
    assert report["target_accuracy"] is None and report["max_drop"] == 0.2
    main(["cascade", *given, "--max-drop", "0.01", "--out", str(tmp_path / "none")])
    shown = " ".join(capsys.readouterr().out.split())
    assert "keeps a drop of at most 1.0%" in shown and "a greater --max-drop" in shown
    with pytest.raises(UserError, match="none kept a drop of at most 0.01 with confidence 0.8"):
        CascadeModel.load(tmp_path / "none")


def test_choices_by_bytes():
    question = Question(context="c", choices=("ab", "abcd"), label=0)
    (scores,) = choose([question], [np.array([-4.0, -6.0])], normalized=True)
    np.testing.assert_allclose(scores, [-6.0, -4.5])
    assert Answer(0, "a", 1.0).choice == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_accuracy": 1.0}, "--target-accuracy 1.0 given; accepted: between 0 and 1"),
        ({"max_drop": 0.1}, "neither or both of --target-accuracy and --max-drop given"),
        ({"target_accuracy": None, "max_drop": 1.5}, "--max-drop 1.5 given; accepted: between"),
        ({"calibration": 0.0}, "--calibration 0.0 given"),
        ({"costs": (1.0,)}, "accepted: two, of student and teacher, or three"),
        ({"person_accuracy": 0.9}, "--person-accuracy 0.9 given with 0 costs"),
        ({"seed": -1}, "--seed -1 given"),
        ({"limit": 3}, "holds 3 questions; accepted: 4 or more"),
        ({"data": "nowhere.jsonl"}, "does not exist"),
    ],
)
def test_bad_options(changes, message, inputs, tmp_path):
    student, teacher, data = inputs
    given = {"student": student, "teacher": teacher, "data": data, "target_accuracy": 0.5}
    with pytest.raises(UserError) as e:
        cascade(Cascade(**(given | {"out": tmp_path / "c"} | changes)))
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "c").exists()


def test_a_damaged_directory(tmp_path):
    whole = {"student": "s", "teacher": "t", "signal": "margin", "normalized": False}
    whole |= {"target_accuracy": 0.5, "max_drop": None, "confidence": 0.9}
    for text in ('{"student": 1', *(json.dumps(whole | {"thresholds": t}) for t in (3, ["a"]))):
        (tmp_path / "cascade.json").write_text(text)
        with pytest.raises(UserError, match="is no cascade"):
            CascadeModel.load(tmp_path)


def test_the_student_alone_is_what_evaluate_finds(made, inputs):
    _, report = made
    questions = load_choices(inputs[2])
    scores = scored_by(inputs[0], questions)
    order = np.random.default_rng(0).permutation(60)[30:]
    right = [np.argmax(scores[i]) == questions[i].label for i in order]
    assert report["alone"]["student"]["accuracy"] == pytest.approx(np.mean(right))
