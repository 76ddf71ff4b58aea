"""The Linen blocks of a Llama-family decoder layer, on token-major rows ``[B*T, D]``."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.models.config import ModelConfig
from jaxdistill.models.product import contract, product
from jaxdistill.models.rope import apply_rope

LINEAR, MIX = "linear", "mix"  # names of what a layer makes, for ``make_apply``'s ``remat``


class Linear(nn.Module):
    """Multiply rows by a kernel ``[in, out]``; accumulate in float32, return the rows' type."""

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "N I"]) -> Float[Array, "N O"]:
        """Return ``x @ kernel (+ bias)``."""
        shape = (x.shape[-1], self.features)
        if self.has_variable("params", "kernel"):  # float, or as ``quant.held`` holds it
            kernel = self.get_variable("params", "kernel")
        else:
            kernel = self.param("kernel", nn.initializers.normal(0.02), shape, jnp.float32)
        y = product(x, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
        return checkpoint_name(y.astype(x.dtype), LINEAR)


class RMSNorm(nn.Module):
    """Scale rows to unit root mean square, in float32 (Zhang and Sennrich 2019)."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Return ``weight * x / sqrt(mean(x^2) + eps)``."""
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        y = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        weight = jnp.expand_dims(weight.astype(jnp.float32), tuple(range(x.ndim - 1)))
        return (y * weight).astype(x.dtype)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "#B T S"],
) -> Float[Array, "B T N H"]:
    """Attend with grouped queries; the query heads of one key head are rows of one product."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    q = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    k, v = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    scores = contract("bkmh,bksh->bkms", q, k) * H**-0.5
    scores = scores.reshape(B, K, G, T, S)
    keep = jnp.broadcast_to(mask_BTS[:, None, None], scores.shape)
    probs = jax.nn.softmax(jnp.where(keep, scores, jnp.finfo(jnp.float32).min), axis=-1)
    probs = probs.reshape(B, K, G * T, S).astype(v.dtype)
    out = contract("bkms,bksh->bkmh", probs, v)
    out = out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    return out.astype(q_BTNH.dtype)


def attend_in_blocks(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "#B T S"],
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Attend as ``attend``, a block of queries at a time.

    Of a whole text (T = S) the blocks of a part read no keys of later parts, and none before the
    part's window. The scores of one block exist at a time, in the backward pass too, where
    they are made again, so that memory grows with T and not with its square.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    if T <= QUERIES:
        return attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS)
    blocks = -(-T // QUERIES)
    part = -(-blocks // min(blocks, _PARTS)) * QUERIES
    out = []
    for start in range(0, T, part):
        rows, keys = slice(start, min(start + part, T)), slice(0, S)
        if T == S:
            keys = slice(0 if window is None else max(0, start - window + 1), rows.stop)
        out.append(
            _in_turn(q_BTNH[:, rows], k_BSKH[:, keys], v_BSKH[:, keys], mask_BTS[:, rows, keys])
        )
    return jnp.concatenate(out, axis=1)


QUERIES, _PARTS = 512, 4  # of one block; of a text, each with keys of its own, blocks in a loop


def _in_turn(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array) -> Array:
    """Attend block after block, in a loop where there is more than one."""
    one, T = jax.checkpoint(attend), q_BTNH.shape[1]
    if T <= QUERIES:
        return one(q_BTNH, k_BSKH, v_BSKH, mask_BTS)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -T % QUERIES)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, QUERIES, *x.shape[2:]).swapaxes(0, 1)

    out = lax.map(lambda x: one(x[0], k_BSKH, v_BSKH, x[1]), (split(q_BTNH), split(mask_BTS)))
    return out.swapaxes(0, 1).reshape(q_BTNH.shape[0], -1, *q_BTNH.shape[2:])[:, :T]


class Attention(nn.Module):
    """Project, rotate, attend and project back, with an optional key/value cache."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_ND, shape, rope, mask_BTS, cache):
        """Return the mixed rows ``[B*T, D]`` and the updated (k, v) slots."""
        c, (B, T) = self.config, shape
        q = Linear(c.num_heads * c.head_dim, c.qkv_bias, name="q_proj")(x_ND)
        k = Linear(c.num_kv_heads * c.head_dim, c.qkv_bias, name="k_proj")(x_ND)
        v = Linear(c.num_kv_heads * c.head_dim, c.qkv_bias, name="v_proj")(x_ND)
        q = q.reshape(B, T, c.num_heads, c.head_dim)
        k, v = (y.reshape(B, T, c.num_kv_heads, c.head_dim) for y in (k, v))
        if c.qk_norm:
            q = RMSNorm(c.rms_norm_eps, name="q_norm")(q)
            k = RMSNorm(c.rms_norm_eps, name="k_norm")(k)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            past_k, past_v, length = cache
            k = lax.dynamic_update_slice_in_dim(past_k, k.astype(past_k.dtype), length, axis=1)
            v = lax.dynamic_update_slice_in_dim(past_v, v.astype(past_v.dtype), length, axis=1)
        out = self.mix(q, k, v, mask_BTS).reshape(B * T, c.num_heads * c.head_dim)
        return Linear(c.hidden_size, c.o_bias, name="o_proj")(out), (k, v)

    def mix(self, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array) -> Array:
        """Attend; a method, so that what queries, keys and values are can be looked at."""
        out = attend_in_blocks(q_BTNH, k_BSKH, v_BSKH, mask_BTS, self.config.sliding_window)
        return checkpoint_name(out, MIX)


class MLP(nn.Module):
    """Apply SwiGLU: ``down(silu(gate(x)) * up(x))`` (Shazeer 2020)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_ND: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """Return the transformed rows."""
        c = self.config
        gate = Linear(c.intermediate_size, c.mlp_bias, name="gate_proj")(x_ND)
        up = Linear(c.intermediate_size, c.mlp_bias, name="up_proj")(x_ND)
        return Linear(c.hidden_size, c.mlp_bias, name="down_proj")(nn.silu(gate) * up)


class Block(nn.Module):
    """Run one pre-norm decoder layer on token-major rows ``[B*T, D]``."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_ND, shape, rope, mask_BTS, cache):
        """Return the rows after attention and MLP, and the updated (k, v) slots."""
        eps = self.config.rms_norm_eps
        mixed, kv = Attention(self.config, name="self_attn")(
            RMSNorm(eps, name="input_layernorm")(x_ND), shape, rope, mask_BTS, cache
        )
        x_ND = x_ND + mixed
        normed = RMSNorm(eps, name="post_attention_layernorm")(x_ND)
        return x_ND + MLP(self.config, name="mlp")(normed), kv


def attention_mask(
    q_positions: Int[Array, "#B T"],
    k_positions: Int[Array, "#B S"],
    q_segments: Int[Array, "B T"] | None,
    k_segments: Int[Array, "B S"] | None,
    window: int | None,
) -> Bool[Array, "#B T S"]:
    """Return where a query may look: same segment, not ahead, and within the sliding window."""
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    if q_segments is not None and k_segments is not None:
        mask = mask & (q_segments[:, :, None] == k_segments[:, None, :])
    return mask
