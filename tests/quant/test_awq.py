"""AWQ: the function is preserved, the scales are those of least output error, and they help."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.models.decoder import make_apply
from jaxdistill.paths import walk
from jaxdistill.quant.awq import channel_scales, fold_scales
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.recipes.calibrate import decoder_folds
from tests import tiny

SPEC = QuantSpec(group_size=16, ranges="absmax")


@pytest.fixture(scope="module")
def problem():
    """Two kernels over 32 inputs, of which a few are much larger than the rest."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(400, 32)).astype(np.float32)
    x[:, [1, 20]] *= 30
    kernels = [rng.normal(size=(32, n)).astype(np.float32) for n in (24, 8)]
    return [jnp.asarray(w) for w in kernels], x


def nearest(w, group):
    """Round over the whole range in NumPy, with the float16 scale."""
    groups = np.asarray(w, np.float32).reshape(-1, group, w.shape[1])
    s = (np.abs(groups).max(axis=1, keepdims=True) / 7).astype(np.float16).astype(np.float32)
    return (np.clip(np.rint(groups / s), -8, 7) * s).reshape(w.shape)


def output_error(kernels, x, s, group=16):
    """Sum |X (w_hat / s - w)|^2 from the rows themselves, in float64."""
    s = np.asarray(s, np.float32)[:, None]
    offs = (nearest(np.asarray(w) * s, group) / s - np.asarray(w) for w in kernels)
    return sum(np.sum((x.astype(np.float64) @ off) ** 2) for off in offs)


def test_scales_are_the_best_of_the_grid(problem):
    kernels, x = problem
    magnitude = np.abs(x).sum(axis=0)
    got = channel_scales(kernels, [SPEC] * 2, jnp.asarray(x.T @ x), jnp.asarray(magnitude))
    tried = [magnitude.astype(np.float64) ** (i / 20) for i in range(20)]
    tried = [s / np.exp(np.log(s).mean()) for s in tried]
    errors = [output_error(kernels, x, s) for s in tried]
    np.testing.assert_allclose(got, tried[int(np.argmin(errors))], rtol=1e-5)
    assert min(errors) < 0.5 * errors[0]  # errors[0] is of no scales at all


def test_even_inputs_and_unused_ones_are_no_trouble(problem):
    kernels, x = problem
    even = channel_scales(kernels, [SPEC] * 2, jnp.eye(32), jnp.ones(32))
    np.testing.assert_allclose(even, np.ones(32), rtol=1e-6)
    unused = channel_scales(kernels, [SPEC] * 2, jnp.zeros((32, 32)), jnp.zeros(32))
    np.testing.assert_allclose(unused, np.ones(32), rtol=1e-6)
    x = x.copy()
    x[:, 5] = 0
    magnitude = jnp.asarray(np.abs(x).sum(axis=0))
    s = channel_scales(kernels, [SPEC] * 2, jnp.asarray(x.T @ x), magnitude)
    assert np.isfinite(s).all() and (np.asarray(s) > 0).all()


def test_inputs_that_are_not_finite_are_named(problem):
    kernels, _ = problem
    with pytest.raises(UserError, match=r"^the calibration inputs of layers/mlp/up_proj are NaN"):
        gram = jnp.full((32, 32), jnp.nan)
        channel_scales(kernels, [SPEC] * 2, gram, jnp.ones(32), name="layers/mlp/up_proj")


@pytest.mark.parametrize("kind", ["llama", "biases", "qk_norm"])
def test_function_is_preserved(kind):
    """Scales drawn at random, over two orders of magnitude, on every fold of both layers."""
    c = tiny.config(
        **{
            "llama": {},
            "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
            "qk_norm": {"model_type": "qwen3", "qk_norm": True, "num_kv_heads": 4},
        }[kind]
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(  # biases and norms too shall be told apart
        lambda x: x + jnp.asarray(rng.normal(size=x.shape) * 0.1, jnp.float32), tiny.params(c)
    )
    layers = []
    for i in range(c.num_layers):
        tree = {"layers": jax.tree.map(lambda x, i=i: x[i], params["layers"])}
        for fold in decoder_folds(c):
            *_, width = dict(walk(tree))[
                f"{fold.producer}/{'kernel' if 'proj' in fold.producer else 'weight'}"
            ].shape
            s = jnp.asarray(10 ** rng.uniform(-1, 1, width), jnp.float32)
            tree = fold_scales(tree, fold, s)
        layers.append(tree["layers"])
    scaled = params | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}
    apply, tokens = jax.jit(make_apply(c)), tiny.batch(c)["tokens"]
    want, got = apply(params, tokens).logits(), apply(scaled, tokens).logits()
    np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()))
    before, after = dict(walk(params)), dict(walk(scaled))
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    left = {"norm/weight", "embed_tokens/embedding"} | {
        path
        for path in before
        if "_norm/" in path or path.endswith(("o_proj/bias", "down_proj/bias"))
    }
    left |= {
        path for path in before if path.endswith(("q_proj/bias", "k_proj/bias", "gate_proj/bias"))
    }
    assert moved == before.keys() - left


def test_query_heads_that_share_a_value_head_share_its_scales():
    c = tiny.config()
    fold = next(f for f in decoder_folds(c) if f.producer.endswith("v_proj"))
    assert fold.heads == (2, 16)
    tree = {"layers": jax.tree.map(lambda x: x[0], tiny.params(c)["layers"])}
    s = np.arange(1, 33, dtype=np.float32)
    before = dict(walk(tree))
    after = dict(walk(fold_scales(tree, fold, jnp.asarray(s))))
    v, o = (f"layers/self_attn/{x}_proj/kernel" for x in "vo")
    np.testing.assert_allclose(after[v], np.asarray(before[v]) / s[None], rtol=1e-6)
    heads = s.reshape(2, 16)  # query heads 0 and 1 read value head 0, 2 and 3 head 1
    rows = np.concatenate([heads[0], heads[0], heads[1], heads[1]])[:, None]
    np.testing.assert_allclose(after[o], np.asarray(before[o]) * rows, rtol=1e-6)
