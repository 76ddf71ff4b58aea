"""Attention in blocks and by kernels: as in one piece; in blocks linear in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from jaxdistill.errors import UserError
from jaxdistill.mesh import MeshShape, make_mesh, on_mesh
from jaxdistill.models import attention as module
from jaxdistill.models.attention import (
    attend,
    attend_in_blocks,
    attend_splash,
    attention_mask,
    make_attend,
)
from jaxdistill.models.decoder import init_params, make_apply
from tests import tiny


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
    monkeypatch.setattr(module, "QUERIES", 8)
    monkeypatch.setattr(module, "_PARTS", parts)
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
    monkeypatch.setattr(module, "QUERIES", 8)
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


def packed_places(T, B=2):
    """Returns positions and segments of rows of two texts and padding."""
    ends = jnp.asarray([[T // 3, T - 7], [T // 2, T]])[:B]
    segments = jnp.sum(jnp.arange(T)[None, :, None] >= ends[:, None], axis=-1)
    segments = jnp.where(segments == 2, 0, segments + 1).astype(jnp.int32)
    starts = jnp.where(segments == 1, 0, jnp.where(segments == 2, ends[:, :1], ends[:, 1:]))
    return jnp.arange(T)[None] - starts, segments


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_splash_attention_is_as_in_one_piece(packed, window):
    """Interpreted; a length that is no multiple of a block."""
    T = 150
    *qkv, ct = inputs(T, T, H=16)
    positions, segments = packed_places(T) if packed else (jnp.arange(T)[None], None)
    mask = attention_mask(positions, positions, segments, segments, window)
    splash = functools.partial(make_attend("splash", mask, segments, window), interpret=True)

    def by(attend):
        return jax.value_and_grad(lambda *qkv: jnp.sum(ct * attend(*qkv)), argnums=(0, 1, 2))

    want = by(lambda q, k, v: attend(q, k, v, mask))(*qkv)
    got = jax.jit(by(splash))(*qkv)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), got, want)


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 4}])
def test_splash_attention_on_a_mesh(sizes):
    """Two key heads are divided by 2 devices; by 4 they are not, and stay whole."""
    T = 128
    *qkv, ct = inputs(T, T, B=4, H=16)
    positions, segments = packed_places(T)
    positions, segments = jnp.tile(positions, (2, 1)), jnp.tile(segments, (2, 1))
    mask = attention_mask(positions, positions, segments, segments, None)

    def loss(q, k, v, segments):
        return jnp.sum(ct * attend_splash(q, k, v, segments, interpret=True))

    want = jax.grad(lambda *qkv: jnp.sum(ct * attend(*qkv, mask)), argnums=(0, 1, 2))(*qkv)
    with on_mesh(make_mesh(MeshShape(**sizes))):
        got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*qkv, segments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), got, want)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_what_cudnn_is_asked_for(packed, window, monkeypatch):
    """The same question to JAX's own attention; there is no GPU here to put it to cuDNN."""
    T, asked = 24, {}

    def by_xla(*args, implementation, **kwargs):
        asked["implementation"] = implementation
        with jax.numpy_dtype_promotion("standard"):
            return own(*args, implementation="xla", **kwargs)

    own = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(T, T)[:3])
    positions, segments = packed_places(T) if packed else (jnp.arange(T)[None], None)
    mask = attention_mask(positions, positions, segments, segments, window)
    got = make_attend("cudnn", mask, segments, window)(q, k, v)
    assert asked == {"implementation": "cudnn"}
    want = attend(q, k, v, mask)
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=0.02)


CONFIG = tiny.config(head_dim=64)


def lowered(implementation, platform):
    """Returns the text of a gradient, lowered for a platform that need not be here."""
    apply = make_apply(CONFIG, dtype=jnp.bfloat16, attention=implementation)
    params = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def loss(params, tokens, segments):
        return jnp.sum(apply(params, tokens, None, segments).logits())

    traced = jax.jit(jax.grad(loss)).trace(params, tokens, tokens)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_a_step_with_cudnn_is_lowered_for_a_gpu(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    module = lowered("cudnn", "cuda")
    assert "__cudnn$fmhaScaleBiasSoftmax(" in module
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward(" in module


def test_a_step_with_splash_attention_is_lowered_for_a_tpu():
    """Each layer is read once and differentiated once: a kernel forward, two back."""
    module = lowered("splash", "tpu")
    for kernel in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{kernel}_segmented" in module


def test_what_cannot_attend_says_so():
    q, k, v, _ = inputs(8, 8)
    mask = jnp.ones((1, 8, 8), bool)
    with pytest.raises(UserError, match="by cudnn of float32 numbers given; accepted: bfloat16"):
        make_attend("cudnn", mask)(q, k, v)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    odd, segments = [x[:, :7] for x in half], jnp.ones((2, 7), jnp.int32)
    with pytest.raises(UserError, match="rows of 7 tokens given; accepted: an even number"):
        make_attend("cudnn", mask[:, :7, :7], segments)(*odd)
    with pytest.raises(UserError, match="it cannot be: cuDNN is not detected. Choose"):
        make_attend("cudnn", mask)(*half)
