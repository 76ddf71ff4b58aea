"""What changes as a run goes on: knobs of the loss that follow the step, or the loss itself.

A ``Schedule`` is a triple of pure functions, as optax's optimizers are pairs. Its state lies in the
``TrainState``, so that a resumed run goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.errors import UserError
from jaxdistill.losses.loss import Loss, Ramp

Knobs = dict[str, Float[Array, ""]]


class Schedule(NamedTuple):
    """Say which knobs a step gets.

    Attributes:
        init: ``() -> state``.
        knobs: ``(state, step) -> {name: scalar}``.
        update: ``(state, step, mean loss) -> state``, called after each step.
    """

    init: Callable[[], Any]
    knobs: Callable[[Any, Array], Knobs]
    update: Callable[[Any, Array, Array], Any]


def ramp(value: Ramp, steps: int) -> Schedule:
    """Go linearly from the first step to the last; the knob's name is ``""``."""

    def knobs(state: Any, step: Array) -> Knobs:
        share = jnp.clip(step.astype(jnp.float32) / max(1, steps - 1), 0.0, 1.0)
        return {"": value.start * (1 - share) + value.stop * share}  # exact at both ends

    return Schedule(lambda: (), knobs, lambda state, step, loss: state)


def adaptive_taid(
    steps: int,
    *,
    start: float = 0.4,
    stop: float = 1.0,
    alpha: float = 5e-4,
    beta: float = 0.99,
) -> Schedule:
    """Adapt TAID's ``t`` to how fast the loss falls (arXiv 2501.16937, section 3.2).

    With the loss's relative change ``d = (J_before - J) / J_before`` and its moving mean
    ``m = beta m + (1 - beta) d``: ``t = min(stop, max(linear, t + alpha sigmoid(m) (1 - t)))``,
    where ``linear`` goes from ``start`` to ``stop`` over the run. The first step has no loss before
    it, so its change is 0. ``J`` is the whole loss of the step, other terms of the sum included.

    Args:
        steps: of the run.
        start: the first ``t``.
        stop: the last one.
        alpha: largest rise a step, beyond the linear one.
        beta: of the moving mean.
    """

    def init() -> Any:
        values = {"t": start, "momentum": 0.0, "loss": 0.0}  # an array each: states are donated
        return {name: jnp.array(value, jnp.float32) for name, value in values.items()}

    def update(state: Any, step: Array, loss: Array) -> Any:
        before = state["loss"]
        change = jnp.where(before > 0, (before - loss) / (before + 1e-15), 0.0)
        momentum = beta * state["momentum"] + (1 - beta) * change
        linear = start + (stop - start) * (step.astype(jnp.float32) + 1) / max(1, steps)
        rise = alpha * jax.nn.sigmoid(momentum) * (1 - state["t"])
        t = jnp.minimum(stop, jnp.maximum(linear, state["t"] + rise))
        return {"t": t, "momentum": momentum, "loss": loss.astype(jnp.float32)}

    return Schedule(init, lambda state, step: {"": state["t"]}, update)


def schedule_of(loss: Loss, steps: int) -> Schedule | None:
    """Return the schedule of all that moves in a loss; None where nothing does.

    Raises:
        UserError: an argument is a word that no schedule is known for.
    """
    parts: dict[str, Schedule] = {}
    for knob, value in loss.moving().items():
        if isinstance(value, Ramp):
            parts[knob] = ramp(value, steps)
        elif (knob, value) == ("taid.t", "adaptive"):
            parts[knob] = adaptive_taid(steps)
        else:
            raise UserError(
                f"{knob} is {value!r}; accepted: a number, a ramp such as 4..1"
                + (", or adaptive" if knob == "taid.t" else "")
            )
    if not parts:
        return None

    def init() -> Any:
        return {knob: part.init() for knob, part in parts.items()}

    def knobs(state: Any, step: Array) -> Knobs:
        return {knob: part.knobs(state[knob], step)[""] for knob, part in parts.items()}

    def update(state: Any, step: Array, loss: Array) -> Any:
        return {knob: part.update(state[knob], step, loss) for knob, part in parts.items()}

    return Schedule(init, knobs, update)
