"""The condensing step: ``(state, real batch) -> (state, metrics)``, for every method, jitted.

A method is a ``MetaLoss``: what an update of the synthetic set makes smaller. ``dd.unroll`` makes
one of training on the set, ``dd.matching`` and ``dd.kernel`` of comparing it with real data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxdistill.dd.synthetic import Synthetic

Batch = dict[str, Any]


@runtime_checkable
class MetaLoss(Protocol):
    """Score a synthetic set: ``(synthetic, real batch, key) -> (loss, metrics)``, pure."""

    def __call__(
        self, synthetic: Synthetic, real: Batch, key: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return a scalar, differentiable by ``synthetic.learned``, and scalar metrics.

        Args:
            synthetic: the set.
            real: a batch of real data.
            key: what is random: fresh networks, windows, minibatches.
        """
        ...


@flax.struct.dataclass
class CondenseState:
    """Hold everything that condensing changes."""

    step: Any
    synthetic: Synthetic
    opt_state: Any
    key: Any


def init_condense(
    synthetic: Synthetic, tx: optax.GradientTransformation, seed: int = 0
) -> CondenseState:
    """Return the state before the first update; it owns copies, for the step donates its state."""
    synthetic = jax.tree.map(jnp.array, synthetic)
    return CondenseState(
        step=jnp.zeros((), jnp.int32),
        synthetic=synthetic,
        opt_state=tx.init(synthetic.learned),
        key=jax.random.key_data(jax.random.key(seed)),
    )


def make_condense_step(
    meta_loss: MetaLoss, tx: optax.GradientTransformation, *, networks: int = 1
) -> Callable[[CondenseState, Batch], tuple[CondenseState, dict[str, Array]]]:
    """Build the jitted update of a synthetic set.

    Args:
        meta_loss: the method.
        tx: the outer optimizer, of ``synthetic.learned``.
        networks: networks (keys) that an update is the mean of, as one ``vmap``.

    Returns:
        ``step(state, real) -> (state, metrics)``, with ``loss`` and ``grad_norm`` among the
        metrics. The state is donated: use the returned one.
    """

    def step(state: CondenseState, real: Batch) -> tuple[CondenseState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def mean_loss(learned: dict[str, Any]) -> tuple[Array, dict[str, Array]]:
            synthetic = state.synthetic.replace(learned=learned)  # pyright: ignore
            if networks == 1:
                return meta_loss(synthetic, real, key)
            keys = jax.random.split(key, networks)
            many = jax.vmap(lambda k: meta_loss(synthetic, real, k))(keys)
            return jax.tree.map(lambda x: jnp.mean(x, axis=0), many)

        learned = state.synthetic.learned
        (loss, metrics), gradient = jax.value_and_grad(mean_loss, has_aux=True)(learned)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by counts
            updates, opt_state = tx.update(gradient, state.opt_state, learned)
        moved = optax.apply_updates(learned, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradient)} | metrics
        new = CondenseState(
            step=state.step + 1,
            synthetic=state.synthetic.replace(learned=moved),  # pyright: ignore
            opt_state=opt_state,
            key=state.key,
        )
        return new, metrics

    return jax.jit(step, donate_argnums=0)
