"""The meta-gradient against torch.func's, through the same training of the same network."""

import jax
import numpy as np
import pytest
import torch

from benchmarks.meta_gradient.peers import (
    classes_loss,
    decoder_from,
    mlp_from,
    tokens_loss,
    with_torch_func,
)
from benchmarks.meta_gradient.problems import DECODER, LENGTH, meta_gradient, mlp, transformer


def by_torch(net, loss, problem, steps):
    gradient = with_torch_func(net, loss, problem.adam, steps, problem.rate)
    arrays = [torch.tensor(x) for x in (problem.inputs, problem.targets, *problem.real)]
    given = [x if x.is_floating_point() else x.long() for x in arrays]
    return gradient(*given).numpy()


@pytest.mark.parametrize(
    ("adam", "way"), [(False, "plain reverse"), (False, "mixed mode"), (True, "both, 2 levels")]
)
def test_mlp_with_adam_and_sgd(adam, way):
    problem = mlp()._replace(adam=adam, rate=1e-3 if adam else 0.1)
    given = (problem.inputs, problem.params, problem.targets, problem.real)
    found = np.asarray(meta_gradient(problem, 5, way)(*jax.device_put(given)))
    expected = by_torch(mlp_from(problem.params), classes_loss, problem, 5)
    assert np.abs(expected).max() > 1e-6
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max(), rtol=1e-3)


def test_transformer_reading_embeddings():
    whole = transformer()
    problem = whole._replace(
        inputs=whole.inputs[:2], targets=whole.targets[:2], real=tuple(x[:2] for x in whole.real)
    )
    given = (problem.inputs, problem.params, problem.targets, problem.real)
    found = np.asarray(meta_gradient(problem, 2, "mixed mode")(*jax.device_put(given)))
    net = decoder_from(DECODER, problem.params, LENGTH)
    expected = by_torch(net, tokens_loss, problem, 2)
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max(), rtol=1e-3)
