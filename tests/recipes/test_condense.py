"""`condense`: every method end to end on tiny data, resumed runs, slices, texts, bad input."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdistill.cli import main
from jaxdistill.dd.stored_set import load_set
from jaxdistill.errors import UserError
from jaxdistill.models.decoder import init_params
from jaxdistill.models.hf import save_hf
from jaxdistill.recipes.condense import condense
from jaxdistill.recipes.condense_data import read_real
from jaxdistill.recipes.condense_methods import (
    batches_of,
    classifier_of,
    keeps_easiest,
    kept_every,
)
from jaxdistill.recipes.condense_options import _USED_BY, Condense, condense_identity
from jaxdistill.train.data import load_rows
from jaxdistill.train.labelled import held_out_rows, load_labelled
from jaxdistill.train.run_directory import read_metrics
from tests import tiny

TINY = {
    "per_class": 2,
    "architecture": "linear",
    "inner_steps": 3,
    "steps": 3,
    "batch_size": 12,
    "experts": 2,
    "expert_steps": 6,
    "checkpoint_every": -1,
}
LEARNED = (
    "meta-gradient",
    "gradient-matching",
    "distribution-matching",
    "trajectory-matching",
    "kernel-ridge",
)


def small(method):
    """The options of a small run, those that the method has a use for."""
    return {k: v for k, v in TINY.items() if method in _USED_BY.get(k, (method,))}


SELECTED = ("random", "herding", "k-center", "el2n", "meta-gradient-score")


def save_points(path, number=60, seed=0, shape=(5,)):
    """Three Gaussian classes, far apart; every tenth row is rare."""
    rng = np.random.default_rng(seed)
    labels = np.arange(number) % 3
    centres = np.random.default_rng(99).normal(size=(3, *shape)) * 3
    inputs = centres[labels] + rng.normal(size=(number, *shape))
    rare = np.arange(number) % 10 == 0
    np.savez(path, inputs=inputs.astype(np.float32), labels=labels, rare=rare)
    return str(path)


def save_texts(path, number=24):
    words = [("good", "fine", "lovely"), ("bad", "poor", "awful")]
    rows = [
        {"text": f"{words[i % 2][i % 3]} film {i}", "label": ("pos", "neg")[i % 2]}
        for i in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def save_small_model(path):
    """A model of one layer with random weights, made by numpy: nothing to compile."""
    c = tiny.config(vocab_size=260, hidden_size=32, num_layers=1)
    shapes = jax.eval_shape(lambda: init_params(c, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    save_hf(path, c, params, tiny.byte_tokenizer())
    return str(path)


def lines_of(path):
    return Path(path).read_text().splitlines()


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    return save_points(tmp_path_factory.mktemp("points") / "train.npz")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    model = save_small_model(folder / "model")
    return save_texts(folder / "train.jsonl"), model, folder / "cache"


@pytest.mark.parametrize("method", LEARNED)
def test_learned_sets_move_and_are_resumed(method, points, tmp_path):
    """A run cut off after a checkpoint ends as one that was not."""
    every = 1 if method == "meta-gradient" else -1
    options = small(method) | {"checkpoint_every": every}
    job = Condense(data=points, out=tmp_path / "r", method=method, **options)
    result = condense(job)
    assert result["examples"] == 6 and np.isfinite(result["last_loss"])
    stored = load_set(tmp_path / "r" / "set")
    assert stored.method == method and stored.level == "features"
    assert np.asarray(stored.synthetic.fixed["labels"]).tolist() == [0, 0, 1, 1, 2, 2]
    learned = np.asarray(stored.synthetic.learned["inputs"])
    with np.load(points) as file:
        real = file["inputs"][stored.settings["rows"]]
    reading = stored.settings["reading"]
    start = (real - np.float32(reading["mean"])) / np.float32(reading["deviation"])
    assert 0 < np.abs(learned - start).max() < 0.2  # three updates of at most --lr each
    for name in ("README.md", "results.json", "metrics.jsonl", "plots/outer_loss.png"):
        assert (tmp_path / "r" / name).is_file(), name
    if method != "meta-gradient":  # every method runs in the same loop
        return
    shutil.copytree(tmp_path / "r", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "set")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "3")
    condense(dataclasses.replace(job, out=tmp_path / "cut", resume=True))
    again = load_set(tmp_path / "cut" / "set")
    np.testing.assert_array_equal(learned, np.asarray(again.synthetic.learned["inputs"]))
    losses = [[r["loss"] for r in read_metrics(tmp_path / name)] for name in ("r", "cut")]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_labels_and_rates_are_learned_through_a_window(points, tmp_path):
    job = Condense(
        data=points,
        out=tmp_path / "r",
        soft_labels=True,
        learn_rates=True,
        inner_optimizer="adam",
        window=2,
        random_window=True,
        networks=2,
        start="noise",
        **small("meta-gradient"),
    )
    condense(job)
    learned = load_set(tmp_path / "r" / "set").synthetic.learned
    assert learned["label_logits"].shape == (6, 3) and learned["log_rates"].shape == (3,)
    assert np.abs(np.asarray(learned["log_rates"]) - np.log(0.05)).max() > 1e-4
    readme = (tmp_path / "r" / "README.md").read_text()
    assert "soft label" in readme


@pytest.mark.parametrize("method", SELECTED)
def test_selected_examples_are_real_ones(method, points, tmp_path):
    result = condense(Condense(data=points, out=tmp_path / "r", method=method, **small(method)))
    assert "last_loss" not in result
    stored = load_set(tmp_path / "r" / "set")
    rows, reading = stored.settings["rows"], stored.settings["reading"]
    with np.load(points) as file:
        inputs, labels = file["inputs"], file["labels"]
    np.testing.assert_array_equal(labels[rows], np.asarray(stored.synthetic.fixed["labels"]))
    assert len(set(rows)) == 6
    assert not set(rows) & set(held_out_rows(load_labelled(points).labels)[1])
    got = np.asarray(stored.synthetic.learned["inputs"]) * reading["deviation"] + reading["mean"]
    np.testing.assert_allclose(got, inputs[rows], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(reading["mean"], inputs.mean(0), rtol=1e-4, atol=1e-5)


def test_rare_slices_are_kept(points, tmp_path):
    for method in ("herding", "distribution-matching"):
        job = Condense(
            data=points,
            out=tmp_path / method,
            method=method,
            slice=("rare",),
            per_slice=3,
            **small(method),
        )
        assert condense(job)["slices"]["rare"] >= 3
        stored = load_set(tmp_path / method / "set")
        rows = np.asarray(stored.settings["rows"])[stored.slices["rare"]]
        assert (rows % 10 == 0).all()


def test_images_are_drawn(tmp_path):
    data = save_points(tmp_path / "x.npz", 30, shape=(6, 6))
    method = "distribution-matching"
    usual = small(method) | {"architecture": None, "steps": 1}
    job = Condense(data=data, out=tmp_path / "r", method=method, **usual)
    assert condense(job)["level"] == "images"
    assert (tmp_path / "r" / "plots" / "set.png").is_file()
    assert load_set(tmp_path / "r" / "set").settings["architecture"] == "convnet"


@pytest.mark.parametrize("level", ["features", "embeddings"])
def test_texts(level, texts, tmp_path, capsys):
    data, model, cache = texts
    options = ["--data", data, "--model", model, "--level", level, "--per-class", "2"]
    options += ["--method", "distribution-matching", "--width", "8", "--steps", "2"]
    options += ["--seq-len", "12"]
    options += ["--batch-size", "6", "--feature-cache", str(cache), "--out", str(tmp_path / "r")]
    main(["condense", *options, "--json"])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["level"] == level and result["examples"] == 4 and result["classes"] == 2
    stored = load_set(tmp_path / "r" / "set")
    assert stored.classes == ("neg", "pos") and stored.texts is not None
    if level == "features":
        known = {row["text"]: row["label"] for row in map(json.loads, lines_of(data))}
        assert [known[text] for text in stored.texts] == ["neg", "neg", "pos", "pos"]
        (kept,) = cache.glob("features-*.npy")
        assert np.load(kept).shape == (24, 32)
    else:  # two small updates do not leave the nearest token
        assert all("film" in text for text in stored.texts)
        assert stored.synthetic.learned["inputs"].shape == (4, 12, 32)
    assert stored.texts[0] in (tmp_path / "r" / "README.md").read_text()


def test_plain_text_for_language_models(texts, tmp_path):
    data, model, cache = texts
    job = Condense(data=data, out=tmp_path / "r", examples=5, method="random", seed=3)
    result = condense(job)
    assert result["level"] == "text" and result["examples"] == 5
    lines = lines_of(tmp_path / "r" / "set" / "train.jsonl")
    all_texts = [json.loads(line)["text"] for line in lines_of(data)]
    stored = load_set(tmp_path / "r" / "set")
    assert [json.loads(line) for line in lines] == [{"text": t} for t in stored.texts]
    assert [all_texts[i] for i in stored.settings["rows"]] == list(stored.texts)
    # What distill and quantize read as --data.
    assert list(load_rows(str(tmp_path / "r" / "set"))["text"]) == list(stored.texts)
    job = dataclasses.replace(
        job,
        out=tmp_path / "k",
        method="k-center",
        model=model,
        seq_len=12,
        feature_cache=cache,
        slice=("ten=film 1",),
        per_slice=4,
    )
    assert condense(job)["slices"]["ten"] >= 4


def test_texts_that_training_gains_from_are_selected(texts, tmp_path):
    # Of 30 texts 24 are alike, and so are the ones that the loss is taken on: odd ones do not help.
    alike = [f"the cat sat on the mat {i % 7}" for i in range(24)]
    odd = ["zqx jvk", "qqzzq", "xkcd wvz", "jjjj", "vvkkz", "wqzxj"]
    mixed = [*alike[:12], *odd, *alike[12:]]
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in mixed))
    job = Condense(
        data=str(data),
        out=tmp_path / "r",
        examples=6,
        method="meta-gradient-score",
        model=texts[1],
        seq_len=12,
        inner_steps=2,
        batch_size=16,
    )
    condense(job)
    assert set(load_set(tmp_path / "r" / "set").texts) <= set(alike)


@pytest.mark.parametrize(
    ("steps", "span", "every"), [(100, 50, 5), (100, 20, 5), (96, 36, 4), (97, 30, 1), (6, 3, 1)]
)
def test_stored_points_divide_the_experts_steps_and_the_span(steps, span, every):
    assert kept_every(steps, span) == every
    assert steps % every == span % every == 0


def test_an_experts_span_is_not_the_steps_on_the_set(points):
    """Four expert steps are matched, whatever --inner-steps is."""
    data, real = points, read_real(load_labelled(points), level="features")
    for inner_steps in (1, 3):
        job = Condense(
            data=data,
            out=Path("r"),
            method="trajectory-matching",
            inner_rate=0.1,
            expert_span=4,
            **small("trajectory-matching") | {"inner_steps": inner_steps, "experts": 1},
        )
        net = classifier_of(job, "features", (5,), 3)
        batches = batches_of(job, real, net, None)
        path = fetch_tree(batches._points)
        points = [jax.tree.map(lambda x, i=i: x[0, i], path) for i in range(path_length(path))]
        pair = fetch_tree(batches[0])
        start, end = (
            next(i for i, point in enumerate(points) if all_equal(point, pair[name]))
            for name in ("start", "end")
        )
        assert end - start == 4


def fetch_tree(tree):
    return jax.tree.map(np.asarray, tree)


def path_length(path):
    return jax.tree.leaves(path)[0].shape[1]


def all_equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.mark.parametrize(
    ("per_class", "hardness", "easiest"),
    [(2, "auto", True), (9, "auto", True), (10, "auto", False), (2, "hardest", False)],
)
def test_el2n_keeps_the_easiest_of_a_small_budget(per_class, hardness, easiest):
    job = Condense(data="d", out=Path("o"), per_class=per_class, method="el2n", hardness=hardness)
    assert keeps_easiest(job, np.repeat(np.int32([0, 1]), [20, 50])) is easiest


def test_numbers_of_numpy_become_pythons():
    job = Condense(data="d", out=Path("o"), per_class=2)
    object.__setattr__(job, "per_class", np.int64(3))  # the tests' type checks would refuse it
    job.__post_init__()
    assert json.loads(json.dumps(condense_identity(job)))["per_class"] == 3


def test_bad_input_is_one_line_and_writes_nothing(points, texts, tmp_path, capsys):
    data, model, _ = texts

    def said(*arguments):
        with pytest.raises(SystemExit) as e:
            main(["condense", "--out", str(tmp_path / "r"), *arguments])
        captured = capsys.readouterr()
        assert e.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
        assert not (tmp_path / "r").exists()
        return captured.err

    assert "give either --per-class N" in said("--data", points)
    assert "no model reads them; give --model" in said("--data", data, "--per-class", "2")
    assert "--model given for data" in said("--data", points, "--per-class", "2", "--model", model)
    per = ("--data", points, "--per-class", "2")
    assert "--steps 0 given" in said(*per, "--steps", "0")
    assert "--lr -1.0 given" in said(*per, "--lr=-1")
    assert "a window of 30 given" in said(*per, "--window", "30")
    assert "--soft-labels given" in said(*per, "--method", "random", "--soft-labels")
    assert "has no use for it" in said(*per, "--method", "kernel-ridge", "--learn-rates")
    assert "belong together" in said(*per, "--slice", "rare")
    assert "--slice x given" in said(*per, "--slice", "x", "--per-slice", "1")
    assert "--mix given; accepted with" in said(*per, "--mix", "rare.jsonl:0.1")
    assert "quota" in said("--data", points, "--per-class", "21")
    assert "--expert-span must be at most --expert-steps (100), got 101" in said(
        *per, "--method", "trajectory-matching", "--expert-span", "101"
    )
    assert "a convnet reads images" in said(*per, "--architecture", "convnet")
    assert "none.jsonl" in said("--data", str(tmp_path / "none.jsonl"), "--per-class", "1")
    plain = ("--data", data, "--examples", "3")
    assert "given for plain text" in said(*plain, "--method", "el2n")
    assert "no model reads them" in said(*plain, "--method", "herding")
    assert "quota is 30" in said("--data", data, "--examples", "30", "--method", "random")
    read = ("--data", data, "--per-class", "2", "--model", model)
    assert "accepted: 1 to its 128 positions" in said(*read, "--seq-len", "129")
    assert "a convnet reads images" in said(*read, "--architecture", "convnet")
    long = ("--method", "herding", "--model", model, "--seq-len", "129")
    assert "accepted: 1 to its 128 positions" in said(*plain, *long)
    with pytest.raises(UserError, match="--resume"):
        condense(Condense(data=points, out=tmp_path / "r", per_class=1, resume=True))
