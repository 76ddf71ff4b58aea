"""Inner optimizers: optax transformations of rate one that can be differentiated through.

Any optax transformation of rate one will do, as long as its update has a derivative everywhere.
Adam's has none where the second moment is zero unless epsilon stands inside the root, and the
meta-gradient is NaN then (a parameter that has had no gradient yet is enough).
"""

from __future__ import annotations

from typing import Literal

import optax

from jaxdistill.errors import UserError

InnerOptimizer = Literal["sgd", "momentum", "adam"]


def inner_sgd(momentum: float = 0.0) -> optax.GradientTransformation:
    """Build gradient descent, with heavy-ball momentum where above 0."""
    return optax.sgd(1.0, momentum=momentum or None)


def inner_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Build Adam with epsilon inside the root: ``m / sqrt(v + eps)``."""
    return optax.chain(optax.scale_by_adam(b1, b2, eps=0.0, eps_root=eps), optax.scale(-1.0))


def inner_optimizer(name: str) -> optax.GradientTransformation:
    """Return an inner optimizer by name: sgd, momentum (0.9), adam.

    Raises:
        UserError: there is none of that name.
    """
    if name == "sgd":
        return inner_sgd()
    if name == "momentum":
        return inner_sgd(0.9)
    if name == "adam":
        return inner_adam()
    raise UserError(f"inner optimizer {name!r} given; accepted: sgd, momentum, adam")
