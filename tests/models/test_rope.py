"""Rotary frequencies in closed form, and the rotation as complex multiplication."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models.config import ModelConfig, RopeScaling
from jaxdistill.models.decoder import init_params, make_apply
from jaxdistill.models.rope import apply_rope, rope_frequencies, rope_tables

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=8,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=64,
    rope_theta=100.0,
)
PLAIN = 100.0 ** -np.array([0, 0.25, 0.5, 0.75])


def frequencies(scaling: RopeScaling | None) -> np.ndarray:
    """Gives the frequencies of CONFIG with this scaling."""
    return np.asarray(rope_frequencies(dataclasses.replace(CONFIG, rope_scaling=scaling)))


def test_frequencies_are_powers_of_theta():
    np.testing.assert_allclose(frequencies(None), PLAIN, rtol=1e-6)


def test_linear_scaling_divides_all():
    scaling = RopeScaling(rope_type="linear", factor=4.0)
    np.testing.assert_allclose(frequencies(scaling), PLAIN / 4, rtol=1e-6)


def test_llama3_scaling_keeps_blends_and_stretches():
    scaling = RopeScaling(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    )
    got = frequencies(scaling)
    np.testing.assert_allclose(got[0], PLAIN[0], rtol=1e-6)
    np.testing.assert_allclose(got[2:], PLAIN[2:] / 8, rtol=1e-6)
    turns = 32 * PLAIN[1] / (2 * math.pi)
    keep = (turns - 1.0) / (4.0 - 1.0)
    np.testing.assert_allclose(got[1], keep * PLAIN[1] + (1 - keep) * PLAIN[1] / 8, rtol=1e-6)


def test_tables_are_cosine_and_sine_to_the_last_bit():
    positions = jnp.array([[0, 1, 2, 3], [7, 5, 4096, 1_000_003]])
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(CONFIG)[None, None]
    cos, sin = rope_tables(CONFIG, positions)
    np.testing.assert_array_equal(cos[:, :, 0], jnp.cos(angles))
    np.testing.assert_array_equal(sin[:, :, 0], jnp.sin(angles))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about XLA for CPUs")
def test_layers_in_a_row_compute_the_tables_once():
    config = dataclasses.replace(CONFIG, num_layers=2)
    apply = make_apply(config, unroll=0)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    step = jax.jit(jax.grad(lambda p, t: jnp.sum(apply(p, t).hidden ** 2)))
    text = step.lower(params, tokens).compile().as_text()
    assert text.count(" cosine(") == text.count(" sine(") == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation_multiplies_complex_pairs(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8)).astype(dtype)
    angles = (
        jnp.arange(5.0)[None, :, None, None] * jnp.asarray(PLAIN, jnp.float32)[None, None, None]
    )
    got = apply_rope(x, jnp.cos(angles), jnp.sin(angles))
    x = np.asarray(x.astype(jnp.float32))
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * np.asarray(angles))
    assert got.dtype == dtype
    atol = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(
        got.astype(jnp.float32), np.concatenate([turned.real, turned.imag], -1), atol=atol
    )
