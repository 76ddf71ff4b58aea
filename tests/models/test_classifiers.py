"""Small classifiers: against numpy and SciPy, twice differentiable, blind to padding."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate

from jaxdistill.errors import UserError
from jaxdistill.models.classifiers import NAMES, make_classifier

SHAPES = {"linear": (5,), "mlp": (2, 3), "deep_mlp": (5,), "convnet": (6, 7), "transformer": (4, 3)}


def make(name, shape=None, width=8):
    return make_classifier(name, input_shape=shape or SHAPES[name], num_classes=3, width=width)


def randomized(net, seed=0):
    """Parameters of which none is zero or one, so that each is seen to take part."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    return jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.4).astype(np.float32), shapes)


def inputs_of(name, rows=3):
    x = np.random.default_rng(7).normal(size=(rows, *SHAPES[name]))
    return jnp.asarray(x, jnp.float32)


def dense(x, layer):
    return x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)


@pytest.mark.parametrize(("name", "hidden"), [("linear", 0), ("mlp", 1), ("deep_mlp", 3)])
def test_an_mlp_is_its_formula(name, hidden):
    net, x = make(name), inputs_of(name)
    params = randomized(net)
    want = np.asarray(x, np.float64).reshape(3, -1)
    for i in range(hidden):
        want = np.maximum(dense(want, params["body"][f"Dense_{i}"]), 0)
    features, got = jax.jit(lambda p, x: (net.features(p, x), net.apply(p, x)))(params, x)
    np.testing.assert_allclose(features, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got, dense(want, params["head"]), rtol=1e-5, atol=1e-5)


def test_a_convnet_is_its_formula():
    net = make("convnet", (7, 6, 2))  # the odd row falls out of the pooling
    params = randomized(net)
    x = np.random.default_rng(0).normal(size=(2, 7, 6, 2)).astype(np.float32)
    conv = params["body"]["_Conv3x3_0"]
    norm = params["body"]["_Norm_0"]
    kernel = np.asarray(conv["kernel"]).reshape(3, 3, 2, 8)
    want = np.zeros((2, 3, 3, 8))
    for b in range(2):
        for f in range(8):
            planes = [correlate(x[b, :, :, c], kernel[:, :, c, f], "same") for c in range(2)]
            plane = sum(planes) + conv["bias"][f]
            plane = (plane - plane.mean()) / np.sqrt(plane.var() + 1e-6)
            plane = np.maximum(plane * norm["scale"][f] + norm["bias"][f], 0)
            want[b, :, :, f] = plane[:6].reshape(3, 2, 3, 2).mean((1, 3))
    got = jax.jit(net.features)(params, jnp.asarray(x))
    np.testing.assert_allclose(got, want.reshape(2, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("side", "blocks"), [(2, 1), (8, 1), (28, 3), (32, 3), (64, 4)])
def test_the_convnets_depth_fits_the_image(side, blocks):
    shapes = jax.eval_shape(make("convnet", (side, side), width=2).init, jax.random.key(0))
    assert sum(name.startswith("_Conv3x3") for name in shapes["body"]) == blocks


def test_a_transformer_knows_places_looks_both_ways_and_skips_padding():
    net = make("transformer", (6, 3))
    params, apply = randomized(net), jax.jit(net.apply)
    x = np.random.default_rng(1).normal(size=(2, 4, 3)).astype(np.float32)
    nothing = np.zeros((2, 1, 3), np.float32)
    padded = np.concatenate([x, nothing, nothing], axis=1)
    within = np.concatenate([nothing, x[:, :2], nothing, x[:, 2:]], axis=1)
    want = apply(params, x)
    np.testing.assert_allclose(apply(params, padded), want, rtol=1e-4, atol=1e-5)
    for other in (x[:, ::-1], within):
        assert np.abs(apply(params, other) - want).max() > 1e-3
    # Without positions a net that looks both ways reads a bag of tokens; a causal one does not.
    params["body"]["positions"] = np.zeros_like(params["body"]["positions"])
    want = apply(params, x)
    for other in (x[:, ::-1], within):
        np.testing.assert_allclose(apply(params, other), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_second_gradients_of_several_networks_at_once(name):
    """Symmetric, as differences of the first ones say, and never NaN at inputs of zeros."""
    with jax.enable_x64(True):
        net = make(name, width=4)
        start = jax.tree.map(np.float64, (randomized(net), inputs_of(name, 2)))
        at, unravel = jax.flatten_util.ravel_pytree(start)
        empty = jax.flatten_util.ravel_pytree((start[0], np.zeros_like(start[1])))[0]

        def loss(at):
            return -jnp.sum(jax.nn.log_softmax(net.apply(*unravel(at)))[:, 0])

        along = jax.jit(jax.vmap(lambda at, u: jax.jvp(jax.grad(loss), (at,), (u,))))
        u, v = np.random.default_rng(0).normal(size=(2, at.size))
        places = np.stack([at, at, at + 1e-6 * u, at - 1e-6 * u, empty])
        first, second = along(places, np.stack([u, v, u, u, u]))
        np.testing.assert_allclose(second[0] @ v, second[1] @ u, rtol=1e-8)
        np.testing.assert_allclose(second[0] @ v, (first[2] - first[3]) @ v / 2e-6, rtol=1e-5)
        assert np.isfinite(first[4]).all() and np.isfinite(second[4]).all()


def test_fresh_networks_differ_and_have_lecuns_spread():
    net = make("linear", (4000,))
    init = jax.jit(net.init)
    one, two = (init(jax.random.key(seed))["head"]["kernel"] for seed in (0, 1))
    assert np.abs(one - two).max() > 1e-2
    assert np.std(one) == pytest.approx(4000**-0.5, rel=0.03)


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("lenet", (5,), "there is no classifier 'lenet'"),
        ("convnet", (5,), r"a convnet reads images .* not \[5\]"),
        ("convnet", (1, 8), "2 pixels a side"),
        ("transformer", (2, 3, 4), r"reads \[tokens, width\] inputs"),
        ("mlp", (), "needs an input shape"),
    ],
)
def test_what_a_network_cannot_read_is_refused(name, shape, says):
    with pytest.raises(UserError, match=says):
        make_classifier(name, input_shape=shape, num_classes=3)


def test_inputs_of_another_shape_are_refused():
    net = make("mlp")
    with pytest.raises(UserError, match=r"made for inputs \[2, 3\], not \[3, 2\]"):
        net.apply(randomized(net), jnp.zeros((1, 3, 2)))
