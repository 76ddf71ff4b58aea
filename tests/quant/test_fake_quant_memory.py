"""XLA's own count of temporaries: fake quantization needs no second copy of the weights."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxdistill.kd.freeze import combine, frozen_parts, partition
from jaxdistill.kd.objective import kd_objective
from jaxdistill.models.decoder import init_params, make_apply
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import default_policy, fake_quant_params, scale_shapes
from tests import tiny

# Many layers, because one layer's weights are made at a time; and more weights than activations.
CONFIG = tiny.config(vocab_size=64, hidden_size=128, intermediate_size=512, num_layers=30)
SHAPES = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
WEIGHTS = sum(x.size for x in jax.tree.leaves(SHAPES))
BATCH = {
    "tokens": jax.ShapeDtypeStruct((1, 8), jnp.int32),
    "loss_mask": jax.ShapeDtypeStruct((1, 8), jnp.bool_),
}


def temporaries(spec, remat):
    """Bytes that XLA takes for a gradient, besides its arguments and results."""
    params, transform = SHAPES, None
    if spec is not None:
        policy = default_policy(spec, tied=CONFIG.tie_embeddings)
        params, transform = scale_shapes(SHAPES, policy), fake_quant_params(policy)
    objective = kd_objective(make_apply(CONFIG, transform=transform, remat=remat), None, "ce")
    trainable, frozen = partition(params, frozen_parts(optax.sgd(1.0), params))

    def gradient(trainable, frozen, batch):
        return jax.grad(lambda t: objective(combine(t, frozen), None, batch)[0])(trainable)

    compiled = jax.jit(gradient).lower(trainable, frozen, BATCH).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", ["none", "minimal", "full"])
def test_fake_quantization_takes_at_most_a_fifth_of_a_byte_a_weight(remat):
    more = temporaries(QuantSpec(bits=4, group_size=32), remat) - temporaries(None, remat)
    assert more / WEIGHTS <= 0.2
