"""Matching: by formulas in numpy, gradients by differences, and sets that lower an error."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.dd.condense import init_condense, make_condense_step
from jaxdistill.dd.inner import inner_sgd
from jaxdistill.dd.matching import (
    distribution_matching,
    expert_segment,
    expert_trajectory,
    gradient_distance,
    gradient_matching,
    trajectory_matching,
)
from jaxdistill.dd.synthetic import Synthetic
from jaxdistill.dd.unroll import Unroll
from jaxdistill.errors import UserError
from tests.dd.nets import CLASSES, data, init, loss
from tests.dd.slopes import slopes_agree

KEY = jax.random.key(5)
HARD = {"labels": jnp.arange(6, dtype=jnp.int32) // 2}  # two of each class, sorted


def features(params, inputs):
    return jnp.tanh(inputs @ params["w1"] + params["b1"][None])


def by_class(batch):
    """The same batch, grouped: ``inputs [C, n, ...]``."""
    rows = np.argsort(np.asarray(batch["labels"]), kind="stable")
    return {k: v[rows].reshape(CLASSES, -1, *v.shape[1:]) for k, v in batch.items()}


def set_of(inputs):
    return Synthetic({"inputs": jnp.asarray(inputs)}, HARD)


def start(key=None, seed=0):
    """One network, whatever the key: nothing to draw, and so quick to compile."""
    rng, dtype = np.random.default_rng(seed), jnp.result_type(float)
    shapes = {"w1": (4, 5), "b1": (5,), "w2": (5, CLASSES)}
    return {name: jnp.asarray(rng.normal(size=x, scale=0.7), dtype) for name, x in shapes.items()}


METHODS = {
    "gradients": lambda: (gradient_matching(loss, start, per_class=2), by_class(data(1, 9))),
    "distributions": lambda: (
        distribution_matching(features, start, num_classes=CLASSES),
        data(1, 9),
    ),
    "trajectories": lambda: (
        trajectory_matching(loss, unroll=Unroll(steps=3), rate=0.3),
        {"start": start(), "end": start(seed=1)},
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_is_that_of_finite_differences(name):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        meta_loss, real = METHODS[name]()
        learned = {"inputs": data(3, 6)["inputs"], "log_rates": jnp.log(0.3)}

        def value(learned):
            return meta_loss(Synthetic(learned, HARD), real, KEY)[0]

        gradient = slopes_agree(value, learned)
        assert np.abs(gradient["inputs"]).max() > 1e-3
        assert (np.abs(gradient["log_rates"]) > 1e-3) == (name == "trajectories")


def test_the_distance_of_gradients_is_a_sum_over_output_units_of_kernels():
    rng = np.random.default_rng(0)
    a, b = ({"k": rng.normal(size=(3, 2, 4)), "b": rng.normal(size=4)} for _ in "ab")
    a["k"][:, :, 3] = 0  # a dead unit, at distance 1; the bias does not count
    want = 1.0
    for unit in range(3):
        u, v = a["k"][:, :, unit].ravel(), b["k"][:, :, unit].ravel()
        want += 1 - u @ v / np.linalg.norm(u) / np.linalg.norm(v)
    ours, theirs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (a, b))
    assert gradient_distance(ours, theirs) == pytest.approx(want, rel=1e-5)
    squares = sum(((a[k] - b[k]) ** 2).sum() for k in a)
    assert gradient_distance(ours, theirs, "l2") == pytest.approx(squares, rel=1e-5)


def test_matching_by_class_is_the_sum_over_classes():
    real = by_class(data(1, 9))
    synthetic = set_of(data(3, 6)["inputs"])
    meta_loss = gradient_matching(loss, start, per_class=2, distance="l2")
    got = float(jax.jit(meta_loss)(synthetic, real, KEY)[0])
    want, params = 0.0, {name: np.asarray(x) for name, x in start().items()}

    def gradient(inputs, labels):
        """The gradients of cross-entropy, by hand."""
        h = np.tanh(inputs @ params["w1"] + params["b1"])
        p = np.exp(h @ params["w2"])
        error = (p / p.sum(-1, keepdims=True) - np.eye(CLASSES)[labels]) / len(labels)
        back = error @ params["w2"].T * (1 - h**2)
        return inputs.T @ back, back.sum(0), h.T @ error

    for c in range(CLASSES):
        ours = gradient(np.asarray(synthetic.learned["inputs"])[2 * c : 2 * c + 2], [c, c])
        theirs = gradient(np.asarray(real["inputs"][c]), [c] * 3)
        want += sum(np.sum((a - b) ** 2) for a, b in zip(ours, theirs, strict=True))
    assert got == pytest.approx(want, rel=1e-4)


def test_a_set_that_is_the_real_data_matches_it():
    real = data(3, 6)
    real = {k: v[np.argsort(real["labels"], kind="stable")] for k, v in real.items()}
    shuffled = {k: v[np.array([4, 1, 3, 0, 2, 5])] for k, v in real.items()}
    pairs = (
        (gradient_matching(loss, start, warm_steps=3, warm_rate=0.5), shuffled),
        (gradient_matching(loss, start, per_class=2), by_class(real)),
        (gradient_matching(loss, start), by_class(real)),
        (distribution_matching(features, start, num_classes=CLASSES), shuffled),
    )
    scores = jax.jit(lambda s: jnp.stack([m(s, b, KEY)[0] for m, b in pairs]))
    assert np.abs(scores(set_of(real["inputs"]))).max() < 5e-4
    assert scores(set_of(data(4, 6)["inputs"])).min() > 1e-2


def test_warm_steps_move_the_network_by_a_random_number_of_them():
    def half_way(w, batch):
        """Of gradient ``w`` on the set, so that a step takes half of it, and 0 on real data."""
        return 0.5 * jnp.sum(w**2) * batch["inputs"][0]

    meta_loss = gradient_matching(
        half_way, lambda key: jnp.ones(1), distance="l2", warm_steps=2, warm_rate=0.5
    )
    synthetic, real = Synthetic({"inputs": jnp.ones(2)}, {}), {"inputs": jnp.zeros(2)}
    score = jax.jit(jax.vmap(jax.value_and_grad(lambda s, k: meta_loss(s, real, k)[0]), (None, 0)))
    values, gradients = score(synthetic, jax.random.split(KEY, 12))
    assert set(values.tolist()) == {1.0, 0.25, 0.0625}  # w^2 after none, one and two steps
    # The set's own scale c counts where it is compared, (c w)^2, and not in the steps before.
    np.testing.assert_allclose(gradients.learned["inputs"][:, 0], 2 * values)


def test_distribution_matching_is_its_formula_and_leaves_absent_classes_out():
    meta_loss = jax.jit(distribution_matching(features, start, num_classes=CLASSES))
    real, synthetic = data(1, 8), set_of(data(3, 6)["inputs"])
    real = {k: v[real["labels"] != 1] for k, v in real.items()}
    params = jax.tree.map(np.asarray, start())
    phi = [
        np.tanh(np.asarray(x) @ params["w1"] + params["b1"])
        for x in (synthetic.learned["inputs"], real["inputs"])
    ]
    want = 0.0
    for c in (0, 2):
        ours, theirs = phi[0][np.asarray(HARD["labels"]) == c], phi[1][real["labels"] == c]
        want += np.sum((ours.mean(0) - theirs.mean(0)) ** 2)
    assert float(meta_loss(synthetic, real, KEY)[0]) == pytest.approx(want, rel=1e-4)
    # Soft labels that are as good as hard ones.
    soft = Synthetic({"label_logits": 50 * jnp.eye(3)[HARD["labels"]]}, {})
    soft.learned["inputs"] = synthetic.learned["inputs"]
    assert float(meta_loss(soft, real, KEY)[0]) == pytest.approx(want, rel=1e-4)


def test_an_experts_trajectory_is_its_training():
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    y = x @ np.array([1.0, -2.0, 0.5], np.float32)

    def squared(w, batch):
        return jnp.mean((batch["x"] @ w - batch["y"]) ** 2)

    got = expert_trajectory(
        squared,
        lambda key: jnp.zeros(3),
        {"x": jnp.asarray(x), "y": jnp.asarray(y)},
        KEY,
        tx=optax.sgd(0.05),
        steps=6,
        every=2,
    )
    w, want = np.zeros(3), [np.zeros(3)]
    for k in range(1, 7):
        w = w - 0.05 * 2 / 20 * x.T @ (x @ w - y)
        want += [w] * (k % 2 == 0)
    np.testing.assert_allclose(got, np.stack(want), rtol=1e-4, atol=1e-6)
    pairs = [expert_segment({"w": got}, jax.random.key(s), span=2) for s in range(8)]
    starts = {int(np.argmin(np.abs(want - np.asarray(p["start"]["w"])).sum(1))) for p in pairs}
    assert starts == {0, 1}
    for p in pairs:
        start = np.argmin(np.abs(want - np.asarray(p["start"]["w"])).sum(1))
        np.testing.assert_allclose(p["end"]["w"], want[start + 2], rtol=1e-4)
    only = expert_segment({"w": got}, KEY, span=1, latest=0)
    np.testing.assert_allclose(only["end"]["w"], want[1], rtol=1e-4)


def test_training_on_the_experts_own_data_repeats_its_trajectory():
    real = data(1, 9)
    expert = expert_trajectory(loss, start, real, KEY, tx=optax.sgd(0.3), steps=4, every=4)
    pair = expert_segment(expert, KEY, span=1)
    meta_loss = trajectory_matching(loss, unroll=Unroll(steps=4), tx=inner_sgd(), rate=0.3)
    score = jax.jit(
        lambda learned: meta_loss(Synthetic(learned, {"labels": real["labels"]}), pair, KEY)
    )
    missed, metrics = score({"inputs": real["inputs"]})
    assert missed < 1e-9 and metrics == {}
    still, metrics = score({"inputs": real["inputs"], "log_rates": jnp.float32(-100)})
    assert still == pytest.approx(1, rel=1e-5) and metrics["rate"] < 1e-30


def least_squares_error(synthetic):
    """The error on other data of a linear classifier that numpy fits to the set."""
    inputs, labels = np.asarray(synthetic.learned["inputs"], np.float64), np.asarray(HARD["labels"])
    left = inputs.T @ inputs + 0.01 * np.eye(inputs.shape[1])
    weights = np.linalg.solve(left, inputs.T @ np.eye(CLASSES)[labels])
    other = data(2, 90)
    return np.mean(np.argmax(np.asarray(other["inputs"]) @ weights, 1) != other["labels"])


@pytest.mark.parametrize("name", METHODS)
def test_condensing_lowers_the_held_out_error(name):
    real = data(1, 90)
    if name == "gradients":
        meta_loss, real = gradient_matching(loss, init, per_class=2), by_class(real)
    elif name == "distributions":
        meta_loss = distribution_matching(features, init, num_classes=CLASSES)
    else:
        meta_loss = trajectory_matching(loss, unroll=Unroll(steps=5), rate=0.3)
        expert = expert_trajectory(loss, start, real, KEY, tx=optax.sgd(0.3), steps=20, every=10)
        real = expert_segment(expert, KEY, span=2)
    first = set_of(np.random.default_rng(0).normal(size=(6, 4), scale=0.3).astype(np.float32))
    tx = optax.adam(0.1)
    step, state = make_condense_step(meta_loss, tx), init_condense(first, tx)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes types
        for _ in range(50):
            state, _ = step(state, real)
    assert least_squares_error(state.synthetic) < 0.28 < 0.4 < least_squares_error(first)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: gradient_matching(loss, init, warm_steps=-1), "-1 warm steps"),
        (
            lambda: gradient_matching(loss, start, per_class=2)(
                set_of(np.ones((6, 4))), data(1, 9), KEY
            ),
            r"real labels \[9\] cannot be compared by class",
        ),
        (
            lambda: gradient_distance({"b": jnp.ones(3)}, {"b": jnp.ones(3)}),
            "no parameter of two axes",
        ),
        (
            lambda: expert_trajectory(loss, start, {}, KEY, tx=optax.sgd(1.0), steps=5, every=2),
            "5 steps kept every 2",
        ),
        (
            lambda: expert_segment({"w": jnp.zeros((3, 2))}, KEY, span=3),
            "a span of 3 does not fit a trajectory of 3 points",
        ),
    ],
)
def test_what_cannot_be_matched_is_refused(call, says):
    with pytest.raises(UserError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
