"""Training as a function: its meta-gradient against finite differences, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from jaxdistill.dd.inner import inner_adam, inner_optimizer, inner_sgd
from jaxdistill.dd.unroll import Unroll, make_unroll
from jaxdistill.errors import UserError
from jaxdistill.kd.freeze import freeze
from tests.dd.nets import central_differences, data, init, loss

OPTIMIZERS = {"sgd": inner_sgd(), "momentum": inner_sgd(0.9), "adam": inner_adam()}
RATES = {"sgd": 0.3, "momentum": 0.05, "adam": 0.02}


@pytest.fixture(autouse=True)
def float64():
    # optax's Adam mixes Python floats and int32, which strict promotion refuses in 64 bits.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def start():
    return init(jax.random.key(0))


def scored(name, how, tx=None, **options):
    """The loss on real data after training, as a function of inputs, label logits and rates."""
    train = make_unroll(loss, tx or OPTIMIZERS[name], how, **options)
    real, params = data(1, 9), start()

    def value(learned, key=None):
        batch = {"labels": jnp.arange(3, dtype=jnp.int32)} | learned
        rates = jnp.exp(jnp.broadcast_to(batch.pop("log_rates"), (how.steps,)))
        return loss(train(params, batch, rates, jax.random.key(7) if key is None else key), real)

    return value


def learned(name, steps):
    rng = np.random.default_rng(2)
    return {
        "inputs": data(3, 3)["inputs"],
        "label_logits": jnp.asarray(rng.normal(size=(3, 3))),
        "log_rates": jnp.asarray(np.log(RATES[name]) + 0.1 * rng.normal(size=steps)),
    }


@pytest.mark.parametrize("steps", [1, 5, 50])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_meta_gradient_is_that_of_finite_differences(name, steps):
    at = learned(name, steps)
    value = scored(name, Unroll(steps=steps))
    found = jax.jit(jax.grad(scored(name, Unroll(steps=steps))))(at)
    expected = central_differences(value, at)
    for leaf in at:
        np.testing.assert_allclose(found[leaf], expected[leaf], rtol=2e-5, atol=2e-8)
    assert np.abs(found["inputs"]).max() > 1e-4


def test_every_mode_and_level_gives_plain_reverse_modes_gradient():
    at = learned("adam", 7)  # seven steps do not divide into segments
    ways = [(False, 0), (False, 2), *((True, levels) for levels in (0, 1, 2, 3))]
    losses = [
        scored("adam", Unroll(steps=7, mixed_mode=mixed_mode, levels=levels))
        for mixed_mode, levels in ways
    ]
    plain, *others = jax.jit(lambda at: [jax.grad(f)(at) for f in losses])(at)
    for found in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, plain
        )


def test_what_is_frozen_stays_and_the_rest_trains_as_if_it_were_a_constant():
    batch, params, rates = data(3, 6), start(), jnp.full((4,), 0.05)
    name = next(iter(params))
    still, moving = {name: params[name]}, {k: x for k, x in params.items() if k != name}
    frozen = make_unroll(loss, freeze(inner_adam(), [rf"^{name}"]), Unroll(steps=4))
    alone = make_unroll(
        lambda p, data: loss(p | data["still"], data), inner_adam(), Unroll(steps=4)
    )

    def score(inputs):
        return loss(frozen(params, batch | {"inputs": inputs}, rates, jax.random.key(0)), batch)

    def expected(inputs):
        trained = alone(
            moving, batch | {"inputs": inputs, "still": still}, rates, jax.random.key(0)
        )
        return loss(trained | still, batch)

    trained = frozen(params, batch, rates, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, trained[name], params[name])
    found, wanted = (jax.value_and_grad(f)(batch["inputs"]) for f in (score, expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), found, wanted)


def test_the_forward_pass_is_a_loop_of_optax_steps():
    batch, params, rates = data(3, 6), start(), np.linspace(0.01, 0.05, 7)
    train = make_unroll(loss, inner_adam(eps=1e-6), Unroll(steps=7))
    found = jax.jit(train)(params, batch, jnp.asarray(rates), jax.random.key(0))
    tx = optax.inject_hyperparams(optax.adam)(0.0, eps=0.0, eps_root=1e-6)
    state = tx.init(params)
    for rate in rates:
        state.hyperparams["learning_rate"] = jnp.asarray(rate)
        updates, state = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p, batch), s))(params, state)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, params)


def truncated(name, steps, window, tx=None):
    """Finite differences of what the last ``window`` of ``steps`` steps make of the inputs."""
    at = learned(name, 1) | {"log_rates": jnp.full((), np.log(RATES[name]))}
    tx, real = tx or OPTIMIZERS[name], data(1, 9)
    labels = {"labels": jnp.arange(3, dtype=jnp.int32), "label_logits": at["label_logits"]}

    def run(params, state, inputs, count):
        for _ in range(count):
            gradient = jax.grad(loss)(params, labels | {"inputs": inputs})
            updates, state = tx.update(gradient, state, params)
            params = jax.tree.map(lambda p, u: p + RATES[name] * u, params, updates)
        return params, state

    params = start()
    before = jax.jit(run, static_argnums=3)(params, tx.init(params), at["inputs"], steps - window)
    value = lambda x: loss(run(*before, x, window)[0], real)  # noqa: E731
    return at, central_differences(value, at["inputs"])


def test_a_window_at_the_end_differentiates_the_last_steps_alone():
    at, expected = truncated("momentum", 6, 2)
    found = jax.jit(jax.grad(scored("momentum", Unroll(steps=6, window=2))))(at)
    np.testing.assert_allclose(found["inputs"], expected, rtol=1e-6, atol=1e-9)
    full = jax.jit(jax.grad(scored("momentum", Unroll(steps=6))))(at)
    assert np.abs(full["inputs"] - expected).max() > 1e-4


def test_a_random_window_is_one_of_the_truncated_ones_each_as_often():
    steps, window = 5, 2
    possible = [truncated("adam", n, window)[1] for n in range(window, steps + 1)]
    at = truncated("adam", steps, window)[0]
    how = Unroll(steps=steps, window=window, placement="random")
    value = scored("adam", how)
    keys = jax.random.split(jax.random.key(0), 400)
    drawn = np.asarray(jax.jit(jax.vmap(lambda k: jax.grad(value)(at, k)["inputs"]))(keys))
    near = np.stack([np.isclose(drawn, p, rtol=1e-4, atol=1e-8).all((1, 2)) for p in possible])
    assert (near.sum(0) == 1).all()
    shares = near.mean(1)
    sigma = np.sqrt(0.25 * 0.75 / 400)
    assert np.abs(shares - 0.25).max() < 4 * sigma
    # So its mean is that of the truncated gradients: no bias from the drawing.
    np.testing.assert_allclose(drawn.mean(0), np.tensordot(shares, possible, 1), rtol=1e-5)


def test_a_window_is_exact_where_each_step_forgets_the_ones_before():
    # L = |p - s|^2 / 2 with rate 1: p becomes s in one step, whatever it was.
    def forgetful(params, batch):
        return 0.5 * jnp.sum((params["p"] - batch["s"]) ** 2)

    rates, key, s = jnp.ones((4,)), jax.random.key(0), jnp.asarray([[0.3, -1.0]])

    def value(s, window, placement):
        how = Unroll(steps=4, window=window, placement=placement)
        train = make_unroll(forgetful, inner_sgd(), how)
        return jnp.sum(jnp.sin(train({"p": jnp.zeros((1, 2))}, {"s": s}, rates, key)["p"]))

    for window, placement in [(4, "end"), (1, "end"), (1, "random")]:
        found = jax.jit(jax.grad(value), static_argnums=(1, 2))(s, window, placement)
        np.testing.assert_allclose(found, np.cos(s), rtol=1e-12)


def test_minibatches_of_an_epoch_are_the_whole_set():
    batch = data(4, 8)

    def linear(params, batch):  # the sum of the steps' gradients is the sum over the rows
        return jnp.sum(params["p"] * jnp.mean(batch["inputs"], axis=0))

    train = make_unroll(linear, inner_sgd(), Unroll(steps=4), inner_batch=2)
    ones = jnp.ones((4,))
    first = train({"p": jnp.zeros((4,))}, batch, ones, jax.random.key(1))["p"]
    np.testing.assert_allclose(first, -np.sum(batch["inputs"], 0) / 2, rtol=1e-12)
    single = make_unroll(linear, inner_sgd(), Unroll(steps=1), inner_batch=2)
    by_key = [single({"p": jnp.zeros((4,))}, batch, ones[:1], jax.random.key(i)) for i in (1, 2)]
    assert np.abs(by_key[0]["p"] - by_key[1]["p"]).max() > 0.01


def test_adam_with_epsilon_outside_the_root_would_be_nan():
    def half_used(params, batch):  # "unused" has a gradient of 0, that depends on the inputs
        rest = {k: x for k, x in params.items() if k != "unused"}
        return loss(rest, batch) + 0.0 * jnp.mean(batch["inputs"]) * jnp.sum(params["unused"])

    params = start() | {"unused": jnp.ones((2,))}

    def value(inputs, tx):
        train = make_unroll(half_used, tx, Unroll(steps=2))
        batch = {"inputs": inputs, "labels": jnp.arange(3, dtype=jnp.int32)}
        trained = train(params, batch, jnp.full((2,), 0.1), jax.random.key(0))
        return loss(trained, data(1, 9)) + jnp.sum(trained["unused"])

    inputs = data(3, 3)["inputs"]
    assert np.isfinite(jax.jit(lambda x: jax.grad(value)(x, inner_adam()))(inputs)).all()
    assert np.isnan(jax.jit(lambda x: jax.grad(value)(x, optax.adam(1.0)))(inputs)).any()


def test_memory_grows_as_the_root_of_the_steps():
    def bytes_of(steps, levels, **options):
        train = make_unroll(loss, inner_adam(), Unroll(steps=steps, levels=levels, **options))
        batch, params = data(3, 3, inputs=64), init(jax.random.key(0), width=64, inputs=64)

        def value(inputs):
            rates = jnp.full((steps,), 0.01)
            batch_ = batch | {"inputs": inputs}
            return loss(train(params, batch_, rates, jax.random.key(0)), data(1, 9, inputs=64))

        compiled = jax.jit(jax.grad(value)).lower(batch["inputs"]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    plain, nested = bytes_of(400, 0, mixed_mode=False), bytes_of(400, 2)
    assert nested < plain / 12
    assert nested < 2.3 * bytes_of(100, 2)  # four times the steps


def test_a_memory_budget_chooses_the_levels(monkeypatch):
    from jaxdistill.dd import unroll

    seen = []
    plain = lax.scan

    def spy(body, state, xs, *, levels):
        seen.append(levels)
        return plain(lambda c, x: (body(c, x), None), state, xs)[0]

    monkeypatch.setattr(unroll, "checkpointed_scan", spy)
    params = start()
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    for states, levels in [(100, 1), (99, 2), (20, 2), (19, 3)]:
        how = Unroll(steps=100, memory_budget=states * size)
        train = make_unroll(loss, inner_sgd(), how)
        jax.eval_shape(train, params, data(3, 3), jnp.ones((100,)), jax.random.key(0))
        assert seen.pop() == levels
    with pytest.raises(UserError, match="accepted: .* or more"):
        train = make_unroll(loss, inner_sgd(), Unroll(steps=100, memory_budget=size))
        jax.eval_shape(train, params, data(3, 3), jnp.ones((100,)), jax.random.key(0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 3, "window": 4},
        {"steps": 3, "levels": -1},
        {"steps": 3, "window": 0},
    ],
)
def test_impossible_unrolls_are_refused(wrong):
    with pytest.raises(UserError, match="accepted"):
        Unroll(**wrong)


def test_an_unknown_inner_optimizer_is_refused():
    with pytest.raises(UserError, match="accepted: sgd, momentum, adam"):
        inner_optimizer("lion")
