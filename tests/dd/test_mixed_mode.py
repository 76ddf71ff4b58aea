"""The gradient whose gradient is forward over reverse, against jax's reverse over reverse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.dd.mixed_mode import gradient
from tests.dd.nets import data, init, loss


@pytest.mark.parametrize("mapped", [False, True])
def test_value_and_second_derivatives_are_jaxs_own(mapped):
    params, batch = init(jax.random.key(0)), data(3, 6)
    batch = batch | {"inputs": batch["inputs"].astype(jnp.float32)}
    weights = jax.tree.map(
        lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params
    )

    def pulled(mixed_mode):
        def value(params, inputs):
            found = gradient(loss, mixed_mode=mixed_mode)(params, batch | {"inputs": inputs})
            return sum(
                jnp.sum(jnp.sin(g) * w)
                for g, w in zip(*map(jax.tree.leaves, (found, weights)), strict=True)
            )

        return jax.value_and_grad(value, argnums=(0, 1))

    one = pulled(True), pulled(False)
    if mapped:
        params = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), params)
        one = tuple(jax.vmap(f, in_axes=(0, None)) for f in one)
    found, expected = (jax.jit(f)(params, batch["inputs"]) for f in one)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), found, expected
    )
    assert np.abs(found[1][1]).max() > 1e-3


def test_the_second_pass_is_forward_mode():
    # Twice x**2 / 2 with a while loop in its derivative, which only forward mode can go through.
    @jax.custom_jvp
    def half_square(x):
        return 0.5 * x**2

    def doubled(x):
        return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] + x), (0, 0 * x))[1]

    half_square.defjvp(lambda p, t: (half_square(p[0]), doubled(p[0]) * t[0]))

    def second(mixed_mode):
        of = gradient(lambda p, _: half_square(p), mixed_mode=mixed_mode)
        return jax.grad(lambda x: of(x, ()))(jnp.asarray(3.0))

    assert second(True) == 2.0
    with pytest.raises(ValueError, match="Reverse-mode differentiation"):
        second(False)
