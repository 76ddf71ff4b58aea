"""The Linen blocks of a Llama-family decoder layer, on token-major rows ``[B*T, D]``."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxdistill.models.attention import Attend
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.product import product
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


class Attention(nn.Module):
    """Project, rotate, attend and project back, with an optional key/value cache."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_ND, shape, rope, attend, cache):
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
        out = self.mix(q, k, v, attend).reshape(B * T, c.num_heads * c.head_dim)
        return Linear(c.hidden_size, c.o_bias, name="o_proj")(out), (k, v)

    def mix(self, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, attend: Attend) -> Array:
        """Attend; a method, so that what queries, keys and values are can be looked at."""
        return checkpoint_name(attend(q_BTNH, k_BSKH, v_BSKH), MIX)


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
    def __call__(self, x_ND, shape, rope, attend, cache):
        """Return the rows after attention and MLP, and the updated (k, v) slots."""
        eps = self.config.rms_norm_eps
        mixed, kv = Attention(self.config, name="self_attn")(
            RMSNorm(eps, name="input_layernorm")(x_ND), shape, rope, attend, cache
        )
        x_ND = x_ND + mixed
        normed = RMSNorm(eps, name="post_attention_layernorm")(x_ND)
        return x_ND + MLP(self.config, name="mlp")(normed), kv
