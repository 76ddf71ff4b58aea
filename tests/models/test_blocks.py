"""Attention a block of queries at a time: as in one piece, and linear in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models import blocks
from jaxdistill.models.blocks import attend, attend_in_blocks, attention_mask


def inputs(T, S, B=2, N=4, K=2, H=8):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (B, T, N, H))
    k, v = (jax.random.normal(key, (B, S, K, H)) for key in keys[1:3])
    return q, k, v, jax.random.normal(keys[3], q.shape)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("parts", [4, 2])
@pytest.mark.parametrize("T", [24, 29])
def test_a_whole_text_in_blocks_is_as_in_one_piece(T, parts, packed, window, monkeypatch):
    monkeypatch.setattr(blocks, "QUERIES", 8)
    monkeypatch.setattr(blocks, "_PARTS", parts)
    *qkv, ct = inputs(T, T)
    segments, positions = jnp.ones((2, T), jnp.int32), jnp.arange(T)[None]
    if packed:  # two texts and padding; positions begin again
        lengths = jnp.asarray([[7, 12], [10, T - 10]])
        ends = jnp.cumsum(lengths, axis=1)
        segments = jnp.sum(jnp.arange(T)[None, :, None] >= ends[:, None], axis=-1)
        starts = jnp.concatenate([jnp.zeros((2, 1), int), ends], axis=1)
        positions = jnp.arange(T)[None] - jnp.take_along_axis(starts, segments, axis=1)
    mask = attention_mask(positions, positions, segments, segments, window)

    def whole(*qkv):
        return jnp.sum(ct * attend(*qkv, mask))

    def in_blocks(*qkv):
        return jnp.sum(ct * attend_in_blocks(*qkv, mask, window))

    want = jax.value_and_grad(whole, argnums=(0, 1, 2))(*qkv)
    got = jax.jit(jax.value_and_grad(in_blocks, argnums=(0, 1, 2)))(*qkv)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_queries_beside_a_cache_see_all_of_it(monkeypatch):
    monkeypatch.setattr(blocks, "QUERIES", 8)
    q, k, v, _ = inputs(20, 32)
    mask = attention_mask(12 + jnp.arange(20)[None], jnp.arange(32)[None], None, None, None)
    got = attend_in_blocks(q, k, v, mask)
    np.testing.assert_allclose(got, attend(q, k, v, mask), rtol=1e-5, atol=1e-6)


def test_memory_of_the_gradient_is_linear_in_the_length():
    """In a loop over layers; in a row, XLA for CPUs keeps what it was told to make again."""
    held = {}
    for T in (2048, 8192):
        shape = jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)

        def loss(x):
            positions = jnp.arange(x.shape[1])[None]
            mask = attention_mask(positions, positions, None, None, None)

            def layer(x, _):
                return attend_in_blocks(x, x, x, mask), None

            return jnp.sum(jax.lax.scan(layer, x, length=3)[0] ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(shape).compile()
        held[T] = compiled.memory_analysis().temp_size_in_bytes - T * T  # less the mask
    assert held[8192] < 4.4 * held[2048]
