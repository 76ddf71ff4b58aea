"""A freeze by any words, on any tree, inside any optax wrapper: the same step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

from jaxdistill.kd.freeze import freeze, freeze_mask, migrate
from jaxdistill.kd.step import init_state, make_step
from jaxdistill.paths import OV_PATTERN, path_of, walk
from tests.errors import error_of

L, D = 4, 8
BATCH = {"tokens": jnp.arange(6 * D, dtype=jnp.float32).reshape(6, D) / 30 - 1}


def stacked(seed=0):
    """Two kernels a layer, of four stacked layers, a scale that is data, and a norm."""
    rng = np.random.default_rng(seed)
    layer = lambda: jnp.asarray(rng.normal(size=(L, D, D)), jnp.float32) / 4  # noqa: E731
    return {
        "layers": {
            "self_attn": {"v_proj": {"kernel": layer(), "kernel_scale": jnp.ones((L, 1, D))}},
            "mlp": {"up_proj": {"kernel": layer()}},
        },
        "norm": {"weight": jnp.ones(D)},
    }


def unstacked(params):
    layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(L)]
    return params | {"layers": layers}


def objective(params, teacher_params, batch):
    """Mean squared output of the layers in turn."""
    layers = params["layers"]
    layers = layers if isinstance(layers, list) else unstacked(params)["layers"]
    x = batch["tokens"]
    for layer in layers:
        x = x + jnp.tanh(x @ layer["self_attn"]["v_proj"]["kernel"])
        x = x + jnp.tanh(x @ layer["mlp"]["up_proj"]["kernel"])
    x = x * jnp.broadcast_to(params["norm"]["weight"], x.shape)
    loss = jnp.sum(x**2)
    return loss, jnp.asarray(float(x.size)), {"loss": (loss, jnp.asarray(float(x.size)))}


def trained(params, tx, steps=3):
    step, state = make_step(objective, tx), init_state(params, tx)
    for _ in range(steps):
        state, _ = step(state, None, BATCH)
    return state


def moved(before, after):
    """The leaves that differ, by path, with the layers that do where the leaf is stacked."""
    out = {}
    for (path, a), (_, b) in zip(walk(before), walk(after), strict=True):
        if not np.array_equal(a, b):
            out[path] = [i for i in range(a.shape[0]) if not np.array_equal(a[i], b[i])]
    return out


V, UP = "layers/self_attn/v_proj/kernel", "layers/mlp/up_proj/kernel"


@pytest.mark.parametrize(
    ("what", "still"),
    [
        ("mlp", {UP}),
        ("ov", {V}),
        (["ov", "norm"], {V, "norm/weight"}),
        ((OV_PATTERN, "mlp"), {V, UP}),
        (lambda path, leaf: leaf.ndim == 1, {"norm/weight"}),
        ({"layers": {"self_attn": True, "mlp": False}, "norm": {"weight": False}}, {V}),
        ("none", set()),
        ((), set()),
    ],
)
def test_a_freeze_is_a_word_patterns_a_function_or_a_mask(what, still):
    params = stacked()
    after = trained(params, freeze(optax.adam(1e-2), what)).params
    assert set(dict(walk(params))) - set(moved(params, after)) == still | {f"{V}_scale"}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("(", r"'\(' is not a regular expression"),
        (7, "type int given"),
        ({"a": 0.5}, "type float given"),
        (["mlp", 3], "type str given|type int given"),
        ("", "pattern '' given"),
        ("auto", "pattern 'auto' given"),
        (lambda path: True, "does not take 2 arguments"),
        ("layers[3-1]/mlp", r"layers\[3-1\]"),
        ("layers[]/mlp", r"layers\[\]"),
    ],
)
def test_a_wrong_freeze_is_refused_when_it_is_made(what, message):
    import re

    assert re.search(message, error_of(freeze, optax.sgd(1.0), what))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("vproj", "matches no parameter"),
        ("layers[2-9]/mlp", "names layer 9; accepted: 0 to 3"),
        ("layers[0]/norm", "matches no parameter"),
        (lambda path, leaf: "w_proj" in path, "selects no parameter"),
        (lambda path, leaf: float(leaf.sum()) > 0, "looks at the values"),
        (lambda path, leaf: "yes", "says 'yes' of layers/mlp"),
        ({"layers": True}, "not shaped like the params"),
        (".", "nothing is left to train"),
        (["layers", "norm"], "nothing is left to train"),
        (lambda path, leaf: True, "nothing is left to train"),
        (WEIGHTS := "weights", "nothing is left to train"),
    ],
)
def test_a_freeze_that_does_not_fit_the_parameters_is_refused(what, message):
    assert message in error_of(init_state, stacked(), freeze(optax.sgd(1.0), what))


def test_single_layers_freeze_alike_in_stacked_arrays_and_in_a_list():
    params, what = stacked(), ["layers[0-1,3]/self_attn", "layers[2]/mlp"]
    tx = optax.chain(
        optax.clip_by_global_norm(0.1), freeze(optax.adamw(1e-2, weight_decay=0.1), what)
    )
    one, other = trained(params, tx), trained(unstacked(params), tx)
    assert moved(params, one.params) == {V: [2], UP: [0, 1, 3], "norm/weight": list(range(D))}
    for (path, a), (_, b) in zip(walk(unstacked(one.params)), walk(other.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7, err_msg=path)
    for path, moment in walk(one.opt_state):
        if "v_proj" in path:
            assert np.all(moment[jnp.array([0, 1, 3])] == 0) and np.any(moment[2] != 0)


def wrappings(what):
    """One optimizer, Adam behind a clip, with the freeze at six places."""
    clip = optax.clip_by_global_norm(0.05)
    return {
        "inside": freeze(optax.chain(clip, optax.adam(1e-2)), what),
        "chain": optax.chain(clip, freeze(optax.adam(1e-2), what)),
        "multi_transform": optax.chain(
            clip,
            optax.multi_transform(
                {"a": freeze(optax.adam(1e-2), what), "b": optax.adam(1e-2)},
                {"layers": "a", "norm": "b"},
            ),
        ),
        "MultiSteps": optax.chain(
            clip, optax.MultiSteps(freeze(optax.adam(1e-2), what), 1).gradient_transformation()
        ),
        "inject_hyperparams": optax.chain(
            clip,
            optax.inject_hyperparams(lambda lr: freeze(optax.adam(lr), what))(lr=1e-2),
        ),
        "apply_if_finite": optax.apply_if_finite(
            optax.chain(clip, freeze(optax.adam(1e-2), what)), 3
        ),
        "freeze in a freeze": freeze(optax.chain(clip, freeze(optax.adam(1e-2), what)), "ov"),
    }


@pytest.mark.parametrize("what", ["ov", ["ov", "layers[1]/mlp"]])
def test_every_wrapping_gives_the_same_updates(what):
    found = {name: trained(stacked(), tx).params for name, tx in wrappings(what).items()}
    want = found.pop("inside")
    assert V not in moved(stacked(), want)
    for name, params in found.items():
        for (path, a), (_, b) in zip(walk(want), walk(params), strict=True):
            if name in ("inject_hyperparams", "multi_transform"):  # XLA fuses them otherwise
                np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=f"{name} {path}")
            else:
                np.testing.assert_array_equal(a, b, err_msg=f"{name} {path}")


def test_no_wrapping_computes_or_keeps_anything_for_frozen_kernels():
    """No step has a product for a frozen kernel's gradient, nor one for what only that needs."""
    params = stacked()

    def products(tx):
        step = make_step(objective, tx)
        text = step.lower(init_state(params, tx), None, BATCH).as_text()
        return text.count("dot_general")

    free = products(optax.adam(1e-2))
    for name, tx in wrappings("ov").items():
        assert products(tx) == free - L - 1, name  # nothing trains below the first up_proj
        state = init_state(params, tx).opt_state
        assert not [p for p, _ in walk(state) if "v_proj" in p], name


def test_multi_steps_is_an_optimizer_like_others():
    """Two steps on the same batch are one of the plain optimizer, and a frozen leaf has no sum."""
    params, tx = stacked(), optax.MultiSteps(freeze(optax.sgd(0.1), "ov"), 2)
    one = trained(params, freeze(optax.sgd(0.1), "ov"), 1).params
    two = trained(params, tx, 2)
    for (path, a), (_, b) in zip(walk(one), walk(two.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7, err_msg=path)
    assert [p for p, _ in walk(two.opt_state.acc_grads)] == [UP, "norm/weight"]


@pytest.mark.parametrize("what", ["none", "ov", "layers[1]/mlp"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.chain(optax.sgd(1e-2), contrib.reduce_on_plateau(patience=1)),
        lambda: optax.polyak_sgd(1e-2),
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)),
        lambda: optax.lbfgs(),
        lambda: contrib.momo(1e-2),
    ],
    ids=["reduce_on_plateau", "polyak_sgd", "backtracking", "lbfgs", "momo"],
)
def test_optimizers_that_ask_for_the_loss_get_it(make, what):
    params = stacked()
    tx = freeze(make(), what)
    step, state = make_step(objective, tx, accumulate=2), init_state(params, tx)
    losses = []
    for _ in range(4):
        state, metrics = step(state, None, BATCH)
        losses.append(float(metrics["loss"][0]))
    assert losses[-1] < losses[0]
    same = moved(params, state.params)
    assert (V in same) == (what != "ov")
    assert what != "layers[1]/mlp" or same[UP] == [0, 2, 3]


def test_a_plain_optax_loop_may_use_a_freeze_too():
    """Without make_step: gradients of all leaves go in, frozen ones come out as zeros."""
    params = stacked()
    tx = freeze(optax.adamw(1e-2, weight_decay=0.1), ["ov", "layers[1]/mlp"])
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(params, tx.init(params), params)
    assert moved(jax.tree.map(jnp.zeros_like, params), updates) == {
        UP: [0, 2, 3],
        "norm/weight": list(range(D)),
    }
    line = freeze(optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(60)), "ov")
    value = lambda p: objective(p, None, BATCH)[0]  # noqa: E731
    gradient = jax.grad(value)(params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = line.update(
            gradient, line.init(params), params, value=value(params), grad=gradient, value_fn=value
        )
    assert V not in moved(jax.tree.map(jnp.zeros_like, params), updates)
    assert value(optax.apply_updates(params, updates)) < value(params)


@pytest.mark.parametrize("wrapping", ["inside", "chain", "multi_transform", "MultiSteps"])
def test_moments_follow_a_window_of_single_layers(wrapping):
    params, before = stacked(), wrappings("none")[wrapping]
    state = trained(params, before)
    after = wrappings("layers[1]/mlp")[wrapping]
    state = state.replace(opt_state=migrate(state.opt_state, after, state.params))
    old = [np.asarray(x) for p, x in walk(trained(params, before).opt_state) if p.endswith(UP)]
    new = [np.asarray(x) for p, x in walk(state.opt_state) if p.endswith(UP)]
    assert len(new) == len(old) >= 2
    for a, b in zip(old, new, strict=True):
        np.testing.assert_array_equal(b[1], 0)
        np.testing.assert_array_equal(a[[0, 2, 3]], b[[0, 2, 3]])
    kernel = np.asarray(state.params["layers"]["mlp"]["up_proj"]["kernel"])
    state, _ = make_step(objective, after)(state, None, BATCH)
    assert moved({"x": kernel}, {"x": state.params["layers"]["mlp"]["up_proj"]["kernel"]}) == {
        "x": [0, 2, 3]
    }


def test_a_state_of_another_freeze_is_refused():
    tx, other = freeze(optax.adam(1e-2), "ov"), freeze(optax.adam(1e-2), "mlp")
    message = error_of(make_step(objective, tx), init_state(stacked(), other), None, BATCH)
    assert "another optimizer or freeze" in message


def test_half_precision_parameters_train_and_scales_are_known_by_name():
    params = jax.tree.map(lambda x: x.astype(jnp.float16), stacked())
    params["layers"]["self_attn"]["v_proj"]["kernel_scale"] = jnp.ones((L, 1, D), jnp.float32)
    params |= {"layer_scale": jnp.ones(3, jnp.float16)}
    mask = dict(walk(freeze_mask(params)))
    assert {path for path, frozen in mask.items() if frozen} == {f"{V}_scale"}


def test_paths_are_the_same_in_every_kind_of_tree():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])

    state = nnx.state(Net(nnx.Rngs(0)))
    parts = {"kernel": 1.0, "bias": 2.0}
    for tree in (state, {"layers": (parts, parts)}, {"layers": [parts, parts]}):
        paths = sorted(path_of(k) for k, _ in jax.tree_util.tree_leaves_with_path(tree))
        assert paths == [f"layers/{i}/{name}" for i in (0, 1) for name in ("bias", "kernel")]
    mask = freeze_mask(state, "layers[1]/kernel")
    assert [bool(x) for x in jax.tree.leaves(mask)] == [False, False, False, True]
