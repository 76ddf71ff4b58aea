"""`evaluate-set`: what each row is trained on, that the judge tells good sets from bad, errors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.cli import main
from jaxdistill.dd.stored_set import load_set, save_set
from jaxdistill.dd.train_on import train_classifier, train_points
from jaxdistill.evals.judge_set import Judged, Trainer
from jaxdistill.models.classifiers import make_classifier
from jaxdistill.recipes.condense import condense
from jaxdistill.recipes.condense_options import Condense
from tests.recipes.test_condense import save_points, save_small_model, save_texts

FAST = ("--seeds", "2", "--train-steps", "40", "--rates", "0.03", "--width", "8")


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """Train and test data, and a learned set with its own training."""
    folder = tmp_path_factory.mktemp("points")
    data = save_points(folder / "train.npz", 90)
    test = save_points(folder / "test.npz", 60, seed=1)
    condense(
        Condense(
            data=data,
            out=folder / "run",
            per_class=2,
            architecture="linear",
            inner_steps=5,
            inner_rate=0.3,
            steps=5,
            slice=("rare",),
            per_slice=1,
            checkpoint_every=-1,
        )
    )
    return folder, data, test


def test_training_is_adams(points):
    """Full-batch updates of a linear classifier, against numpy's Adam on the closed gradient."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 4)), np.arange(7) % 3
    net = make_classifier("linear", input_shape=(4,), num_classes=3)
    data = {"inputs": jnp.asarray(x, jnp.float32), "labels": jnp.asarray(y, jnp.int32)}
    start = net.init(jax.random.key(5))
    key = jax.random.key(0)
    got = jax.jit(
        lambda start: train_classifier(net, data, steps=6, rate=0.05, key=key, init=start)
    )(start)
    w = np.asarray(start["head"]["kernel"], np.float64)
    b = np.asarray(start["head"]["bias"], np.float64)
    moments = [[np.zeros_like(p), np.zeros_like(p)] for p in (w, b)]
    for t in range(1, 7):
        z = x @ w + b
        p = np.exp(z - z.max(1, keepdims=True))
        error = (p / p.sum(1, keepdims=True) - np.eye(3)[y]) / 7
        for param, g, m in zip((w, b), (x.T @ error, error.sum(0)), moments, strict=True):
            m[0] = 0.9 * m[0] + 0.1 * g
            m[1] = 0.999 * m[1] + 0.001 * g**2
            param -= 0.05 * m[0] / (1 - 0.9**t) / (np.sqrt(m[1] / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(got["head"]["kernel"], w, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(got["head"]["bias"], b, rtol=1e-3, atol=1e-5)
    # A point of a longer training is the end of a shorter one, in vmap too, with minibatches.
    keys = jax.random.split(jax.random.key(1), 2)

    def many(key, points):
        return train_points(net, data, points=points, rate=0.05, key=key, batch_size=3)

    long = jax.jit(jax.vmap(lambda key: many(key, [2, 6])))(keys)
    short = jax.jit(lambda key: many(key, [2]))(keys[1])
    np.testing.assert_allclose(
        long["head"]["kernel"][1, 0], short["head"]["kernel"][0], rtol=1e-5, atol=1e-6
    )


def test_a_report_counts():
    judged = Judged(predictions=np.array([[0, 1, 1, 0], [0, 0, 1, 1]]), rate=0.1, steps=3)
    labels = np.array([0, 1, 1, 1], np.int32)
    rare = np.array([False, True, False, True])
    report = judged.report(labels, {"rare": rare, "none": np.zeros(4, bool)})
    assert report["accuracies"] == [0.75, 0.75] and report["std"] == 0
    assert report["slices"] == {"rare": 0.5}
    assert Trainer(steps=100).points == [3, 10, 30, 100]


def test_rows_and_results(points, capsys, tmp_path):
    folder, _, test = points
    out = tmp_path / "out"
    arguments = ["evaluate-set", "--set", str(folder / "run"), "--test", test, *FAST]
    arguments += ["--architectures", "linear", "--out", str(out)]
    main([*arguments, "--json"])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["set"] == {"method": "meta-gradient", "level": "features", "examples": 6}
    names = ["set", "full", "random", "herding", "k-center", "set, own training"]
    rows = result["results"]
    assert [r["name"] for r in rows] == names
    assert [r["architecture"] for r in rows] == ["linear"] * 6
    assert {r["examples"] for r in rows if r["name"] != "full"} == {6}
    full = {r["architecture"]: r for r in rows if r["name"] == "full"}
    for row in rows:
        assert row["mean"] == pytest.approx(np.mean(row["accuracies"]))
        assert row["retention"] == pytest.approx(row["mean"] / full[row["architecture"]]["mean"])
        assert set(row["slices"]) == {"rare"} and len(row["accuracies"]) == 2
    # The classes are far apart: whatever is trained on them in earnest finds them.
    assert all(r["mean"] > 0.9 for r in rows if r["name"] in ("full", "k-center", "herding"))
    assert json.loads((out / "results.json").read_text()) == result
    assert (out / "comparison.png").is_file()

    # The same set with wrong labels is found out, and the directory of the set alone will do.
    stored = load_set(folder / "run" / "set")
    labels = jnp.asarray((np.asarray(stored.synthetic.fixed["labels"]) + 1) % 3, jnp.int32)
    wrong = stored.synthetic.replace(fixed={"labels": labels})
    save_set(tmp_path / "wrong", dataclasses.replace(stored, synthetic=wrong))
    main(
        ["evaluate-set", "--set", str(tmp_path / "wrong"), "--test", test, *FAST]
        + ["--architectures", "linear", "--baselines", "none"]
    )
    shown = capsys.readouterr().out
    assert "kept" in shown and "full" not in shown
    found = json.loads((tmp_path / "evaluation" / "results.json").read_text())["results"]
    assert found[0]["mean"] < rows[0]["mean"] - 0.2 and found[0]["retention"] is None


def test_texts_are_judged_as_text_too(tmp_path, capsys):
    model = save_small_model(tmp_path / "model")
    data = save_texts(tmp_path / "train.jsonl", 40)
    condense(
        Condense(
            data=data,
            out=tmp_path / "run",
            model=model,
            per_class=2,
            method="distribution-matching",
            seq_len=16,
            architecture="linear",
            steps=2,
            slice=("bad=^(bad|poor)",),
            per_slice=1,
            checkpoint_every=-1,
        )
    )
    main(
        ["evaluate-set", "--set", str(tmp_path / "run"), "--test", data, *FAST]
        + ["--architectures", "linear", "--baselines", "full", "--json"]
    )
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["results"]
    assert [r["name"] for r in rows] == ["set", "set, as text", "full"]
    assert all(set(r["slices"]) == {"bad"} for r in rows)
    assert rows[2]["mean"] > 0.9


def test_bad_input_is_one_line(points, tmp_path, capsys):
    folder, data, test = points
    run = str(folder / "run")

    def said(*arguments):
        with pytest.raises(SystemExit) as e:
            main(["evaluate-set", *arguments])
        captured = capsys.readouterr()
        assert e.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
        return captured.err

    assert "holds no synthetic.safetensors" in said("--set", str(tmp_path), "--test", test)
    some = ("--set", run, "--test", test)
    assert "--baselines best given; accepted: full, random" in said(*some, "--baselines", "best")
    assert "--architectures gru given" in said(*some, "--architectures", "gru")
    assert "--seeds 0 given" in said(*some, "--seeds", "0")
    assert "a convnet reads images" in said(*some, "--architectures", "convnet")
    texts = tmp_path / "t.jsonl"
    texts.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    assert "are texts, the set was made of arrays" in said("--set", run, "--test", str(texts))
    other = save_points(tmp_path / "o.npz", 12, shape=(4,))
    assert "examples of shape (4,)" in said("--set", run, "--test", other)
    moved = save_points(tmp_path / "m.npz", 90, seed=5)
    before = load_set(folder / "run" / "set")
    settings = before.settings | {"data": moved}
    save_set(tmp_path / "moved", dataclasses.replace(before, settings=settings))
    assert "has the fingerprint" in said("--set", str(tmp_path / "moved"), "--test", test)
    for name, changes, line in (
        ("no data", {"settings": {"reading": settings["reading"]}}, "name the data with --data"),
        (
            "no reading",
            {"settings": {"data": moved}},
            "no reading/level, reading/shape, reading/model",
        ),
        ("no labels", {"synthetic": before.synthetic.replace(fixed={})}, "has no labels"),
    ):
        save_set(tmp_path / name, dataclasses.replace(before, **changes))
        assert line in said("--set", str(tmp_path / name), "--test", test)
    condense(Condense(data=str(texts), out=tmp_path / "lm", examples=1, method="random"))
    capsys.readouterr()
    assert "text for language models" in said("--set", str(tmp_path / "lm"), "--test", test)
