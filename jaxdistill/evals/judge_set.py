"""How good a set is to train on: fresh classifiers, one trainer for every set, several seeds."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from jaxdistill.dd.train_on import train_points
from jaxdistill.errors import UserError
from jaxdistill.models.classifiers import Classifier

Batch = dict[str, Any]
_FRESH = 0x5E7
_CHUNK = 512  # rows that all networks read at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """Say how every set is trained on: Adam, its rate and number of steps chosen on held-out data.

    Attributes:
        rates: learning rates that are tried.
        steps: the most steps; 3, 10 and 30 % of them are tried too.
        batch_size: rows of a step; a smaller set is taken whole.
        seeds: networks trained at each rate; what is chosen is best in the mean.
    """

    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    steps: int = 1000
    batch_size: int = 64
    seeds: int = 3

    def __post_init__(self) -> None:
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            raise UserError(f"--rates {self.rates} given; accepted: one or more, above 0")
        for name in ("steps", "batch_size", "seeds"):
            if getattr(self, name) < 1:
                flag = {"steps": "train-steps"}.get(name, name.replace("_", "-"))
                raise UserError(f"--{flag} {getattr(self, name)} given; accepted: 1 or more")

    @property
    def points(self) -> list[int]:
        """Return the numbers of steps that are tried, rising."""
        return sorted({max(1, round(share * self.steps)) for share in (0.03, 0.1, 0.3, 1)})

    def keys(self, seed: int) -> jax.Array:
        """Return a key for each network; none that any condensing began a network with."""
        return jax.random.split(jax.random.fold_in(jax.random.key(seed), _FRESH), self.seeds)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """Hold what networks trained on a set say of the test data, and how they were trained."""

    predictions: Int[np.ndarray, "S N"]
    rate: float
    steps: int

    def report(
        self, labels: Int[np.ndarray, "N"], slices: Mapping[str, Bool[np.ndarray, "N"]]
    ) -> dict[str, Any]:
        """Return accuracies, their mean and deviation over seeds, and those on each slice."""
        right = self.predictions == labels[None]
        each = right.mean(axis=1)
        spread = float(each.std(ddof=1)) if len(each) > 1 else 0.0
        on_slices = {name: right[:, mask] for name, mask in slices.items() if mask.any()}
        return {
            "mean": float(each.mean()),
            "std": spread,
            "accuracies": each.tolist(),
            "rate": self.rate,
            "steps": self.steps,
            "slices": {name: float(part.mean()) for name, part in on_slices.items()},
        }


def make_judge(classifier: Classifier, trainer: Trainer) -> Callable[..., Judged]:
    """Build ``judge(sets, held, test_inputs, *, refit=None, seed=0) -> Judged``.

    One compiled trainer serves all sets of one shape.

    - ``sets``: a batch whose arrays are ``[S, M, ...]``, one set a seed; or ``[M, ...]``, the same
      set for all (``shared=True``).
    - ``held``: a batch of held-out training data, on which rate and steps are chosen.
    - ``test_inputs``: ``[N, ...]``.
    - ``refit``: a shared set to train on at last, with what was chosen: all the training data,
      where ``sets`` left the held-out part out.
    """

    @functools.partial(jax.jit, static_argnames="shared")
    def fit(sets: Batch, keys: jax.Array, rates: jax.Array, shared: bool) -> Any:
        def one(data: Batch, key: jax.Array, rate: jax.Array) -> Any:
            return train_points(
                classifier,
                data,
                points=trainer.points,
                rate=rate,
                key=key,
                batch_size=trainer.batch_size,
            )

        seeds = jax.vmap(one, in_axes=(None if shared else 0, 0, None))
        return jax.vmap(seeds, in_axes=(None, None, 0))(sets, keys, rates)

    predict = _predictor(classifier)

    def judge(
        sets: Batch,
        held: Batch,
        test_inputs: Any,
        *,
        shared: bool = False,
        refit: Batch | None = None,
        seed: int = 0,
    ) -> Judged:
        keys = trainer.keys(seed)
        rates = jnp.asarray(trainer.rates, jnp.float32)
        fitted = fit(sets, keys, rates, shared)  # leaves [rates, seeds, points, ...]
        grid = (len(trainer.rates), trainer.seeds, len(trainer.points))
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), fitted)
        right = predict(flat, held["inputs"]) == np.asarray(held["labels"])[None]
        score = right.mean(axis=1).reshape(grid).mean(axis=1)
        # Of equal scores the first: the lower rate, the fewer steps.
        r, p = np.unravel_index(int(np.argmax(score)), score.shape)
        best = jax.tree.map(lambda x: x[r, :, p], fitted)
        if refit is not None:
            again = fit(refit, keys, rates[r : r + 1], True)
            best = jax.tree.map(lambda x: x[0, :, p], again)
        return Judged(
            predictions=predict(best, test_inputs),
            rate=trainer.rates[r],
            steps=trainer.points[p],
        )

    return judge


def _predictor(classifier: Classifier) -> Callable[[Any, Any], np.ndarray]:
    """Return ``(params [S, ...], inputs [N, ...]) -> classes [S, N]``."""

    @jax.jit
    def likeliest(params: Any, inputs: jax.Array) -> jax.Array:
        logits = jax.vmap(classifier.apply, in_axes=(0, None))(params, inputs)
        return jnp.argmax(logits, axis=-1)

    def predict(params: Any, inputs: Any) -> np.ndarray:
        inputs = np.asarray(inputs)
        size = min(_CHUNK, len(inputs))
        found = []
        for start in range(0, len(inputs), size):
            part = inputs[start : start + size]
            rest = size - len(part)
            part = np.concatenate([part, np.repeat(part[:1], rest, axis=0)])
            found.append(np.asarray(likeliest(params, jnp.asarray(part)))[:, : size - rest])
        return np.concatenate(found, axis=1)

    return predict


def judge_own(
    classifier: Classifier,
    train: Callable[[Any, Any], Any],
    trainer: Trainer,
    test_inputs: Any,
    seed: int = 0,
) -> np.ndarray:
    """Return predictions ``[S, N]`` of networks trained by ``train(params, key) -> params``."""

    def one(key: jax.Array) -> Any:
        init_key, train_key = jax.random.split(key)
        return train(classifier.init(init_key), train_key)

    params = jax.jit(jax.vmap(one))(trainer.keys(seed))
    return _predictor(classifier)(params, test_inputs)
