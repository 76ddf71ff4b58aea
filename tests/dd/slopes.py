"""A gradient against central differences along random directions, in one compiled function."""

import jax
import numpy as np
from jax.flatten_util import ravel_pytree


def slopes_agree(value, at, directions: int = 6, step: float = 1e-6):
    """Compares the gradient of a scalar function of a tree in float64, and returns it."""
    x, tree_of = ravel_pytree(at)
    moves = np.random.default_rng(0).normal(size=(directions, x.size))
    x = np.asarray(x)[None]
    places = np.concatenate([x, x + step * moves, x - step * moves])
    both = jax.jit(jax.vmap(jax.value_and_grad(lambda x: value(tree_of(x)))))
    values, gradients = map(np.asarray, both(places))
    up, down = np.split(values[1:], 2)
    np.testing.assert_allclose(moves @ gradients[0], (up - down) / (2 * step), rtol=2e-5, atol=1e-8)
    return tree_of(gradients[0])
