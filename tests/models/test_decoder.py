"""The decoder against transformers' logits on file, and against itself."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import init_cache, init_params, make_apply
from jaxdistill.models.hf import load_hf
from tests import tiny

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NAMES = sorted(p.parent.name for p in GOLDEN.glob("*/expected.npz"))
every_golden = pytest.mark.parametrize("name", NAMES)


@functools.cache
def golden(name: str) -> tuple[ModelConfig, dict, jax.Array, np.ndarray]:
    """Reads (config, params, tokens, logits) of one tiny model."""
    config, params = load_hf(GOLDEN / name)
    expected = np.load(GOLDEN / name / "expected.npz")
    params = jax.tree.map(jnp.asarray, params)
    return config, params, jnp.asarray(expected["tokens"]), expected["logits"]


@functools.cache
def forward(config: ModelConfig, **kwargs):
    """Builds a jitted function that gives logits, once, so that tests share what it compiles."""
    apply = make_apply(config, **kwargs)
    return jax.jit(lambda *args: apply(*args).logits())


def assert_close(actual, desired, atol=2e-5):
    """Compares logits, whose own size here is about 5."""
    np.testing.assert_allclose(actual, desired, atol=atol, rtol=0)


def test_there_is_a_golden_model_of_every_family():
    assert {golden(name)[0].model_type for name in NAMES} == {"llama", "mistral", "qwen2", "qwen3"}


@every_golden
def test_logits_are_those_of_transformers(name):
    config, params, tokens, logits = golden(name)
    assert_close(forward(config)(params, tokens), logits, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama3_scaled", {"rope_scaling": None}),
        ("llama_bias", {"qkv_bias": False}),
        ("llama_bias", {"o_bias": False}),
        ("llama_bias", {"mlp_bias": False}),
        ("mistral_window", {"sliding_window": None}),
        ("mistral_window", {"sliding_window": 8}),
        ("qwen2_tied", {"qkv_bias": False}),
        ("qwen2_tied", {"rope_theta": 10000.0}),
        ("qwen3_head_dim", {"qk_norm": False}),
    ],
)
def test_every_feature_shows_in_the_golden_logits(name, change):
    config, params, tokens, logits = golden(name)
    changed = forward(dataclasses.replace(config, **change))(params, tokens)
    assert float(np.abs(changed - logits).max()) > 1e-2


@every_golden
def test_a_position_depends_on_all_it_may_see_and_nothing_else(name):
    config, params, _, _ = golden(name)
    apply, length = make_apply(config), 32
    tokens = jax.random.permutation(jax.random.key(0), config.vocab_size)[None, :length]
    probe = jax.random.normal(jax.random.key(1), (config.hidden_size,))

    def outputs(table):
        hidden = apply(params | {"embed_tokens": {"embedding": table}}, tokens).hidden
        return hidden[0] @ probe

    jacobian = jax.jit(jax.jacrev(outputs))(params["embed_tokens"]["embedding"])
    # No token occurs twice: the table's row of a token is the input at its place.
    influence = jnp.abs(jacobian[:, tokens[0]]).max(axis=-1)
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    reach = length
    if config.sliding_window is not None:
        reach = config.num_layers * (config.sliding_window - 1)
    seen = (distance >= 0) & (distance <= reach)
    assert (np.asarray(influence)[~seen] == 0).all()
    assert (np.asarray(influence)[seen] > 0).all()


@every_golden
def test_packed_texts_do_not_see_each_other(name):
    config, params, tokens, _ = golden(name)
    run, row = forward(config), tokens[:1]
    a, b, pad = 19, 24, 5
    segments = jnp.repeat(jnp.array([1, 2, 0]), jnp.array([a, b, pad]))[None]
    positions = jnp.concatenate([jnp.arange(a), jnp.arange(b), jnp.zeros(pad, int)])[None]
    packed = run(params, row, positions, segments)
    assert_close(packed[:, :a], run(params, row[:, :a]))
    assert_close(packed[:, a : a + b], run(params, row[:, a : a + b]))
    assert np.isfinite(packed).all()


@every_golden
def test_only_distances_between_positions_count(name):
    config, params, tokens, logits = golden(name)
    positions = jnp.arange(tokens.shape[1])[None] + 100
    assert_close(forward(config)(params, tokens, positions), logits, atol=2e-4)


def cached(config: ModelConfig):
    """Builds a jitted ``(params, tokens, segment_ids, cache) -> (logits, cache)``."""
    apply = make_apply(config)

    @jax.jit
    def step(params, tokens, segment_ids, cache):
        output, cache = apply(params, tokens, None, segment_ids, cache)
        return output.logits(), cache

    return step


@every_golden
def test_decoding_with_a_cache_equals_the_whole_text(name):
    config, params, tokens, logits = golden(name)
    tokens, logits = tokens[:, :24], logits[:, :24]
    step, cache = cached(config), init_cache(config, 2, 32)
    got = []
    for begin, end in [(0, 10), (10, 18), *((i, i + 1) for i in range(18, 24))]:
        part, cache = step(params, tokens[:, begin:end], None, cache)
        got.append(part)
    assert int(cache.length) == 24
    assert_close(jnp.concatenate(got, axis=1), logits, atol=1e-4)


@every_golden
def test_a_left_padded_batch_decodes_each_row_as_if_alone(name):
    config, params, tokens, logits = golden(name)
    step, cache = cached(config), init_cache(config, 2, 24)
    pads = 5
    prompt = jnp.stack([tokens[0, :12], jnp.pad(tokens[1, : 12 - pads], (pads, 0))])
    segments = jnp.ones((2, 12), jnp.int32).at[1, :pads].set(0)
    part, cache = step(params, prompt, segments, cache)
    assert_close(part[0], logits[0, :12], atol=1e-4)
    assert_close(part[1, pads:], logits[1, : 12 - pads], atol=1e-4)
    for i in range(12, 20):
        column = jnp.stack([tokens[0, i], tokens[1, i - pads]])[:, None]
        part, cache = step(params, column, None, cache)
        assert_close(part[0, 0], logits[0, i], atol=1e-4)
        assert_close(part[1, 0], logits[1, i - pads], atol=1e-4)


def test_a_bfloat16_cache_is_close():
    config, params, tokens, logits = golden("llama_bias")
    cache = init_cache(config, 2, 48, jnp.bfloat16)
    got, cache = cached(config)(params, tokens, None, cache)
    assert cache.k.dtype == jnp.bfloat16
    assert float(np.abs(got - logits).mean()) < 0.02 * logits.std()


def loss(apply):
    """Builds a scalar function of the params."""

    def f(params, tokens):
        logits = apply(params, tokens[:, :-1]).logits()
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return -picked.mean()

    return f


@functools.cache
def gradients(name: str):
    """Computes the plain gradients of one tiny model, once."""
    config, params, tokens, _ = golden(name)
    return jax.jit(jax.grad(loss(make_apply(config))))(params, tokens)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("llama_bias", {"remat": "full"}),
        ("llama_bias", {"remat": "minimal"}),
        ("llama_bias", {"unroll": 2}),
        ("qwen3_head_dim", {"remat": "full", "unroll": 2}),
    ],
)
def test_remat_and_unrolling_change_no_gradient(name, kwargs):
    config, params, tokens, _ = golden(name)
    other = jax.jit(jax.grad(loss(make_apply(config, **kwargs))))(params, tokens)
    close = functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-4)
    jax.tree.map(close, other, gradients(name))


def test_remat_saves_memory_and_minimal_makes_no_linear_product_again():
    config = tiny.config(num_layers=6)
    params, tokens = tiny.params(config), jnp.zeros((2, 64), jnp.int32)
    memory, products = {}, {}
    for remat in ("none", "minimal", "full"):
        lowered = jax.jit(jax.grad(loss(make_apply(config, remat=remat)))).lower(params, tokens)
        memory[remat] = lowered.compile().memory_analysis().temp_size_in_bytes
        shapes = re.findall(r"dot_general .*: \(tensor<(\S+)xf32>, ", lowered.as_text())
        products[remat] = sum(shape.count("x") == 1 for shape in shapes)
    assert memory["none"] > 1.5 * memory["minimal"] and memory["minimal"] > memory["full"]
    assert products["none"] == products["minimal"] == products["full"] - 6


def round_kernels(params):
    """Rounds kernels to 4 bits per output channel, some modules only: a stand-in for quant's."""

    def one(path, w):
        keys = [k.key for k in path]
        if keys[-1] != "kernel" or "k_proj" in keys:
            return w * 0.9
        scale = jnp.abs(w).max(axis=-2, keepdims=True) / 7
        steps = w / jnp.broadcast_to(scale, w.shape)
        rounded = steps + jax.lax.stop_gradient(jnp.round(steps) - steps)
        return rounded * jnp.broadcast_to(scale, w.shape)

    return jax.tree_util.tree_map_with_path(one, params)


@pytest.mark.parametrize("name", ["llama_bias", "qwen2_tied"])
def test_a_transform_in_the_scan_is_the_transform_of_the_whole_tree(name):
    config, params, tokens, logits = golden(name)
    inside = make_apply(config, transform=round_kernels)
    plain = make_apply(config)

    def outside(params, tokens):
        return plain(round_kernels(params), tokens)

    a, grad_a = jax.jit(jax.value_and_grad(loss(inside)))(params, tokens)
    b, grad_b = jax.jit(jax.value_and_grad(loss(outside)))(params, tokens)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-3), grad_a, grad_b
    )
    changed = forward(config, transform=round_kernels)(params, tokens)
    assert float(np.abs(changed - logits).max()) > 0.1  # it does something


@every_golden
def test_bfloat16_is_close_to_float32(name):
    config, params, tokens, logits = golden(name)
    output = jax.jit(make_apply(config, dtype=jnp.bfloat16))(params, tokens)
    assert output.hidden.dtype == output.head.dtype == jnp.bfloat16
    got = output.logits()
    assert got.dtype == jnp.float32
    assert float(np.abs(got - logits).mean()) < 0.05 * logits.std()


@every_golden
def test_gradients_are_finite_and_reach_every_parameter(name):
    for path, g in jax.tree_util.tree_leaves_with_path(gradients(name)):
        assert np.isfinite(g).all(), path
        assert float(jnp.abs(g).max()) > 0, path


@every_golden
def test_fresh_params_have_the_tree_that_load_hf_gives(name):
    config, params, tokens, _ = golden(name)
    fresh = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    shape_and_type = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert shape_and_type(fresh) == shape_and_type(params)
    kernels = fresh["layers"]["mlp"]["up_proj"]["kernel"]
    assert 0.015 < float(kernels.std()) < 0.025
    assert not np.array_equal(kernels[0], kernels[1])  # each layer has its own
    entropy = float(jax.jit(loss(make_apply(config)))(fresh, tokens))
    assert abs(entropy - np.log(config.vocab_size)) < 0.1


def test_params_may_be_numpy_arrays():
    config, params = load_hf(GOLDEN / "qwen2_tied")
    _, _, tokens, logits = golden("qwen2_tied")
    logits_here = make_apply(config)(params, tokens).logits()
    assert_close(logits_here, logits, atol=1e-4)
