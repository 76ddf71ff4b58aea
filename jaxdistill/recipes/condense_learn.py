"""The learning of a synthetic set: updates by any method, with progress and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

from jaxdistill.dd.condense import CondenseState, MetaLoss, init_condense, make_condense_step
from jaxdistill.dd.synthetic import Synthetic
from jaxdistill.mesh import fetch
from jaxdistill.models.sharding import make_sharded
from jaxdistill.recipes.condense_options import Condense
from jaxdistill.train.loop import train
from jaxdistill.train.run_directory import RunDirectory


class Learning(NamedTuple):
    """Hold what ``learn`` does; build one with ``learning``.

    Attributes:
        step: ``(state, models, batch) -> (state, metrics)``.
        state: the first one.
        models: params that join every real batch, by their name in it.
        batches: ``batches[i]`` is the real data of update i.
        fingerprint: of the real data.
    """

    step: Callable[..., Any]
    state: CondenseState
    models: dict[str, Any]
    batches: Any
    fingerprint: str


def learning(
    o: Condense,
    start: Synthetic,
    meta_loss: MetaLoss,
    batches: Any,
    fingerprint: str,
    **models: Any,
) -> Learning:
    """Make ready to learn a set, and trace an update: what cannot be computed is said here.

    Args:
        o: the options.
        start: the set before the first update.
        meta_loss: what each update makes less.
        batches: ``batches[i]`` is the real data of update i.
        fingerprint: of the real data, kept with each checkpoint.
        **models: params that join every batch under their name, as ``teacher`` and ``student``.
    """
    tx = optax.adam(optax.cosine_decay_schedule(o.lr, o.steps))
    update = make_condense_step(meta_loss, tx, networks=o.networks)

    def step(state: Any, models: Any, batch: Any) -> Any:
        return update(state, {**batch, **models})

    whole = jax.tree.map(fetch, start)
    state = make_sharded(lambda s: init_condense(s, tx, o.seed), whole)
    jax.eval_shape(step, state, models, batches[0])
    return Learning(step, state, models, batches, fingerprint)


def learn(o: Condense, what: Learning, run: RunDirectory, console: Console) -> Synthetic:
    """Return the learned set, whole on every host."""
    quarter = max(1, o.steps // 4)
    state = train(
        what.step,
        what.state,
        what.models,
        what.batches,
        steps=o.steps,
        run=run,
        fingerprint=what.fingerprint,
        resume=o.resume,
        checkpoint_every={0: quarter, -1: 0}.get(o.checkpoint_every, o.checkpoint_every),
        guard=o.guard,
        console=console,
        name="condense",
    )
    assert isinstance(state, CondenseState)
    return jax.tree.map(lambda x: jnp.asarray(fetch(x)), state.synthetic)
