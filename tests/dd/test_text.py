"""Text for a synthetic set, against numpy, an exhaustive search and a model asked one by one."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.dd.text import (
    filter_generated,
    generate_texts,
    nearest_examples,
    nearest_rows,
    nearest_tokens,
)
from jaxdistill.errors import UserError
from jaxdistill.models.generate import Sampling
from jaxdistill.models.hub import Model
from tests import tiny


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def distances(x, table):
    return ((x[..., None, :] - table) ** 2).sum(-1)


def cosines(x, table):
    unit = [y / np.linalg.norm(y, axis=-1, keepdims=True) for y in (x, table)]
    return np.einsum("...d,vd->...v", *unit)


@pytest.mark.parametrize("chunk", [4, 256])
def test_nearest_tokens_are_those_of_numpy(chunk):
    x, table = normal(3, 5, 4), 2 + 3 * normal(37, 4, seed=1)
    expected = {"l2": distances(x, table).argmin(-1), "cosine": cosines(x, table).argmax(-1)}
    assert (expected["l2"] != expected["cosine"]).any()
    for metric, ids in expected.items():
        got = nearest_tokens(jnp.asarray(x), jnp.asarray(table), metric=metric, chunk=chunk)
        np.testing.assert_array_equal(got, ids)


def test_only_allowed_tokens_are_taken():
    x, table = normal(2, 6, 4), normal(20, 4, seed=1)
    allowed = np.arange(20) % 3 == 0
    got = nearest_tokens(jnp.asarray(x), jnp.asarray(table), allowed=jnp.asarray(allowed))
    np.testing.assert_array_equal(got, 3 * cosines(x, table[::3]).argmax(-1))


def test_nearest_rows_come_in_order_with_exact_distances():
    # Far from the origin, where |x|^2 - 2 x.e + |e|^2 in float32 keeps few digits.
    x, table = 100 + normal(7, 4), 100 + normal(30, 4, seed=1)
    ids, found = nearest_rows(jnp.asarray(x), jnp.asarray(table), k=5, metric="l2")
    exact = distances(x.astype(np.float64), table.astype(np.float64))
    np.testing.assert_allclose(found, np.take_along_axis(exact, np.asarray(ids), 1), rtol=1e-4)
    near, table = normal(7, 4), normal(30, 4, seed=1)
    ids, _ = nearest_rows(jnp.asarray(near), jnp.asarray(table), k=5, metric="l2")
    np.testing.assert_array_equal(ids, distances(near, table).argsort(-1)[:, :5])


def test_nearest_examples_are_the_best_choice_without_repeats():
    features, labels = normal(9, 2), np.array([0, 1, 0, 1, 0, 1, 0, 1, 1])
    inputs, of_labels = 0.5 * normal(5, 2, seed=5), np.array([1, 0, 1, 1, 0])
    got = nearest_examples(inputs, features, labels, of_labels)
    assert len(set(got)) == 5 and (labels[got] == of_labels).all()
    free = np.where(labels[None] == of_labels[:, None], distances(inputs, features), np.inf)
    assert len(set(free.argmin(1))) < 5  # some want the same, else this tests little
    for label in (0, 1):
        rows, choices = np.flatnonzero(of_labels == label), np.flatnonzero(labels == label)
        cost = distances(inputs[rows], features)
        every = itertools.permutations(choices, len(rows))
        best = min(every, key=lambda c, cost=cost: sum(cost[i, j] for i, j in enumerate(c)))
        np.testing.assert_array_equal(got[rows], best)


def test_nearest_examples_without_rivals_are_everyones_nearest():
    features = normal(40, 3)
    inputs = features[[4, 17, 30]] + 1e-3
    got = nearest_examples(inputs, features, np.zeros(40, int), np.zeros(3, int))
    np.testing.assert_array_equal(got, [4, 17, 30])


def test_too_few_real_examples_are_named():
    with pytest.raises(UserError, match="class 1 has 2 synthetic examples and 1 real"):
        nearest_examples(normal(2, 2), normal(3, 2), np.array([0, 1, 0]), np.array([1, 1]))


def generated():
    """Six texts a class: 0 to 5 for class 0, 6 to 11 for class 1."""
    labels = np.repeat([0, 1], 6)
    right = np.array([0.99, 0.9, 0.8, 0.7, 0.6, 0.2, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9])
    probs = np.stack([np.where(labels == 0, right, 1 - right)] * 2, 1)
    probs[:, 1] = 1 - probs[:, 0]
    return np.eye(12, dtype=np.float32), labels, probs.astype(np.float32)


def test_unconfirmed_texts_are_left_out():
    features, labels, probs = generated()
    got = filter_generated(features, labels, probs, per_class=3)  # the median of class 0 is .75
    assert sorted(got[:3]) == [0, 1, 2] and (labels[got] == [0, 0, 0, 1, 1, 1]).all()
    got = filter_generated(features, labels, probs, per_class=5, threshold=0.1)
    assert sorted(got[:5]) == [0, 1, 2, 3, 4]  # 5 is above the threshold and taken for class 1
    with pytest.raises(UserError, match="class 0: of 6 texts 5 are confirmed"):
        filter_generated(features, labels, probs, per_class=6, threshold=0.1)
    with pytest.raises(UserError, match="class 0: of 6 texts 3 are confirmed and 3 of these"):
        filter_generated(features, labels, probs, per_class=4)
    with pytest.raises(UserError, match="class 2: of 0 texts"):
        filter_generated(features, labels, np.pad(probs, ((0, 0), (0, 1))), per_class=1)


def test_of_duplicates_the_surer_stays():
    features, labels, probs = generated()
    features[1] = 5 * features[2] + 0.1  # cosine .999 whatever the length
    features[3] = features[0] + features[4]  # cosine .71
    got = filter_generated(features, labels, probs, per_class=4, threshold=0.5)
    assert sorted(got[:4]) == [0, 1, 3, 4]


def test_the_pick_is_k_center_or_the_callers():
    angles = np.deg2rad([0, 10, 25, 60, 180, 90, *range(100, 160, 10)])
    features = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    _, labels, _ = generated()
    probs = np.eye(2, dtype=np.float32)[labels]
    # Class 0: the mean points to about 42 degrees; nearest is 25 or 60, farthest from it is 180,
    # and from both 90 or 0.
    mean = features[:6].mean(0)
    first = int(distances(features[:6], mean[None])[:, 0].argmin())
    picked = [first]
    for _ in range(3):
        away = distances(features[:6], features[picked]).min(1)
        picked.append(int(away.argmax()))
    got = filter_generated(features, labels, probs, per_class=4, duplicate=1.0)
    assert list(got[:4]) == picked
    got = filter_generated(
        features, labels, probs, per_class=2, duplicate=1.0, pick=lambda x, k: range(k)
    )
    assert list(got) == [0, 1, 6, 7]


def test_k_center_takes_equal_points_once_each():
    labels, probs = np.zeros(4, int), np.ones((4, 1), np.float32)
    got = filter_generated(np.ones((4, 2)), labels, probs, per_class=4, duplicate=1.1)
    assert sorted(got) == [0, 1, 2, 3]


def test_every_prompt_is_answered_in_batches_of_one_shape(monkeypatch):
    sizes, seeds = [], []

    def backwards(apply, params, config, prompts, *, how, stop, seed):
        sizes.append(len(prompts))
        seeds.append(seed)
        assert stop == (0,) and how.max_new_tokens == 6
        return [ids[::-1] for ids in prompts]

    monkeypatch.setattr("jaxdistill.dd.text.generate", backwards)
    c = tiny.config(vocab_size=260, eos_token_id=0)
    model = Model(config=c, params={}, tokenizer=tiny.byte_tokenizer(), source="tiny")
    how, prompts = Sampling(max_new_tokens=6), ["abc", "de", "fgh", "i", "jk"]
    plain = generate_texts(model, prompts, how, chat=False, batch_size=2, seed=3)
    assert plain == ["cba", "ed", "hgf", "i", "kj"]
    assert sizes == [2, 2, 2] and seeds == [3, 4, 5]
    # <|im_start|>user\n...<|im_end|>\n<|im_start|>assistant\n, without the special tokens
    assert generate_texts(model, ["abc"], how) == ["\ntnatsissa\ncba\nresu"]
