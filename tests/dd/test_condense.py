"""The condensing step: what it updates, and means over networks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill.dd.condense import init_condense, make_condense_step
from jaxdistill.dd.inner import inner_sgd
from jaxdistill.dd.meta_gradient import meta_gradient
from jaxdistill.dd.synthetic import Synthetic
from jaxdistill.dd.unroll import Unroll
from tests.dd.nets import data, init, loss


def start():
    few = data(3, 3)
    learned = {
        "inputs": few["inputs"].astype(jnp.float32) * 0.1,
        "label_logits": 3 * jnp.eye(3),
        "log_rates": jnp.log(jnp.full((4,), 0.5)),
    }
    return Synthetic(learned=learned, fixed={"labels": few["labels"]})


def method():
    return meta_gradient(loss, loss, init, tx=inner_sgd(), unroll=Unroll(steps=4))


def test_three_learned_examples_teach_fresh_networks_the_classes():
    tx = optax.adam(0.05)
    step, state = make_condense_step(method(), tx), init_condense(start(), tx)
    losses = []
    for i in range(60):
        real = jax.tree.map(lambda x: x.astype(jnp.float32) if x.ndim > 1 else x, data(i, 60))
        state, metrics = step(state, real)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    assert set(metrics) == {"loss", "grad_norm", "rate"}
    np.testing.assert_array_equal(state.synthetic.fixed["labels"], [0, 1, 2])


def test_several_networks_give_the_mean_of_their_gradients():
    tx, real = optax.sgd(1.0), jax.tree.map(lambda x: x[:9], data(0, 9))
    real["inputs"] = real["inputs"].astype(jnp.float32)
    before = start()
    state, _ = make_condense_step(method(), tx, networks=2)(init_condense(before, tx, 5), real)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(5), 0), 2)

    @jax.jit
    def of(key):
        return jax.grad(lambda x: method()(before.replace(learned=x), real, key)[0])(before.learned)

    first, second = (of(key) for key in keys)
    for name, x in before.learned.items():
        moved = x - state.synthetic.learned[name]
        np.testing.assert_allclose(moved, (first[name] + second[name]) / 2, rtol=1e-4, atol=1e-6)
    assert np.abs(first["inputs"] - second["inputs"]).max() > 1e-5
