"""Small classifiers, as pure functions: what data set distillation trains inside and judges by.

No dropout and no running statistics, every part differentiable twice, so that a gradient can pass
through a training run; and no convolution primitive: see ``_Conv3x3``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdistill.errors import UserError

NAMES = ("linear", "mlp", "deep_mlp", "convnet", "transformer")


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """Hold a network's pure functions.

    Attributes:
        name: the architecture.
        init: ``key -> params``, a dict with the last layer under ``head``.
        features: ``(params, inputs [B, ...]) -> [B, F]``, what the last linear layer sees.
        apply: ``(params, inputs [B, ...]) -> logits [B, C]``.
    """

    name: str
    init: Callable[..., Any]
    features: Callable[..., Any]
    apply: Callable[..., Any]


class _MLP(nn.Module):
    width: int
    hidden: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        for _ in range(self.hidden):
            x = nn.relu(nn.Dense(self.width)(x))
        return x


class _Norm(nn.Module):
    """Bring the values along ``axes`` to mean 0 and variance 1, then scale and shift channels.

    Over the last axis a layer norm, over the two before it an instance norm. Flax's own do not
    run in float64 under strict promotion, which tests of gradients need.
    """

    axes: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        x = x - jnp.mean(x, axis=self.axes, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=self.axes, keepdims=True) + 1e-6)
        channels = (1,) * (x.ndim - 1) + (-1,)
        return x * scale.reshape(channels) + bias.reshape(channels)


class _Conv3x3(nn.Module):
    """Convolve with 3x3 kernels as one product of patches.

    XLA's convolution on CPU, differentiated twice, took 8 to 10 times as long at 28x28 (more with
    a kernel for each of several networks), for a quarter less memory.
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W F"]:
        B, H, W, C = x.shape
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (9 * C, self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifts = [x[:, i : i + H, j : j + W] for i in range(3) for j in range(3)]
        patches = jnp.concatenate(shifts, axis=-1).reshape(B * H * W, 9 * C)
        return (patches @ kernel + bias[None]).reshape(B, H, W, self.features)


class _ConvNet(nn.Module):
    width: int
    depth: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x[..., None] if x.ndim == 3 else x
        for _ in range(self.depth):
            x = _Conv3x3(self.width)(x)
            x = _Norm((1, 2))(x)
            x = nn.relu(x)
            B, H, W, F = x.shape
            x = x[:, : H // 2 * 2, : W // 2 * 2].reshape(B, H // 2, 2, W // 2, 2, F)
            x = jnp.mean(x, axis=(2, 4))
        return x.reshape(x.shape[0], -1)


class _Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x_BTD: Array, real_BT: Array) -> Array:
        B, T, D = x_BTD.shape
        h = _Norm((-1,))(x_BTD)
        q, k, v = (nn.Dense(D, name=n)(h).reshape(B, T, self.heads, -1) for n in ("q", "k", "v"))
        scores = jnp.einsum("bqnh,bknh->bnqk", q, k) * (D // self.heads) ** -0.5
        keep = jnp.broadcast_to(real_BT[:, None, None], scores.shape)
        probs = jax.nn.softmax(jnp.where(keep, scores, jnp.finfo(scores.dtype).min), axis=-1)
        mixed = jnp.einsum("bnqk,bknh->bqnh", probs, v).reshape(B, T, D)
        x_BTD = x_BTD + nn.Dense(D, name="o")(mixed)
        h = _Norm((-1,))(x_BTD)
        return x_BTD + nn.Dense(D, name="down")(nn.gelu(nn.Dense(4 * D, name="up")(h)))


class _Transformer(nn.Module):
    width: int
    blocks: int
    max_len: int

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        real_BT = jnp.any(x_BTD != 0, axis=-1)
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (self.max_len, self.width), jnp.float32
        )
        x = nn.Dense(self.width, name="project")(x_BTD) + positions[None, : x_BTD.shape[1]]
        for _ in range(self.blocks):
            x = _Block(math.gcd(self.width, 4))(x, real_BT)
        x = _Norm((-1,))(x)
        share = real_BT.astype(x.dtype)
        share = share / jnp.maximum(jnp.sum(share, axis=1, keepdims=True), 1)
        return jnp.einsum("bt,btd->bd", share, x)


def _body(name: str, shape: tuple[int, ...], width: int) -> nn.Module:
    """Return what lies below the last layer; it refuses inputs that the network cannot read."""
    if name == "transformer":
        if len(shape) != 2:
            raise UserError(
                f"a transformer reads [tokens, width] inputs, not {list(shape)}: give embeddings, "
                "or choose an mlp"
            )
        return _Transformer(width, blocks=1, max_len=shape[0])
    if name == "convnet":
        if len(shape) not in (2, 3) or min(shape[:2]) < 2:
            raise UserError(
                f"a convnet reads images [H, W] or [H, W, C] of 2 pixels a side or more, not "
                f"{list(shape)}: give images, or choose an mlp"
            )
        depth, side = 1, min(shape[:2]) // 2
        while side // 2 >= 3:
            depth, side = depth + 1, side // 2
        return _ConvNet(width, depth)
    return _MLP(width, hidden={"linear": 0, "mlp": 1, "deep_mlp": 3}[name])


def make_classifier(
    name: str, *, input_shape: tuple[int, ...], num_classes: int, width: int = 256
) -> Classifier:
    """Make a small classifier.

    Args:
        name: ``linear``; ``mlp`` (one hidden layer, ReLU); ``deep_mlp`` (three); ``convnet``
            (blocks of 3x3 convolution, instance norm, ReLU and 2x2 average pooling, down to 3 to 5
            pixels a side: three blocks at 28 and 32 pixels; the ConvNet of Zhao et al., arXiv
            2006.05929); ``transformer`` (a pre-norm encoder block on embeddings, learned
            positions, attention both ways, the mean over tokens; a vector of zeros is padding).
        input_shape: of one example: anything for an MLP, which flattens it; ``[H, W]`` or
            ``[H, W, C]``; ``[T, D]``, of which shorter sequences are read too.
        num_classes: C.
        width: hidden units; channels of a convnet (the papers have 128).

    Raises:
        UserError: an unknown name, an input that the network cannot read, or a number below 1.
    """
    if name not in NAMES:
        raise UserError(f"there is no classifier '{name}': choose from {', '.join(NAMES)}")
    if not input_shape or min(*input_shape, num_classes, width) < 1:
        raise UserError(
            f"a classifier needs an input shape, classes and a width of 1 or more, not "
            f"{list(input_shape)}, {num_classes} and {width}"
        )
    body, head = _body(name, input_shape, width), nn.Dense(num_classes)

    def init(key: Array) -> dict[str, Any]:
        body_key, head_key = jax.random.split(key)
        example = jnp.zeros((1, *input_shape), jnp.float32)
        features, variables = body.init_with_output(body_key, example)
        params = {"head": head.init(head_key, features)["params"]}
        return params | ({"body": variables["params"]} if variables else {})

    def features(params: Any, inputs: Float[Array | np.ndarray, "B ..."]) -> Float[Array, "B F"]:
        inputs = jnp.asarray(inputs)
        given, longest = inputs.shape[1:], input_shape[:1]
        short = name == "transformer" and given[1:] == input_shape[1:] and given[:1] <= longest
        if given != input_shape and not short:
            raise UserError(
                f"this {name} was made for inputs {list(input_shape)}, not {list(given)}: make one "
                "with input_shape as the data has it"
            )
        return body.apply({"params": params.get("body", {})}, inputs)  # pyright: ignore

    def apply(params: Any, inputs: Float[Array | np.ndarray, "B ..."]) -> Float[Array, "B C"]:
        return head.apply({"params": params["head"]}, features(params, inputs))  # pyright: ignore

    return Classifier(name=name, init=init, features=features, apply=apply)
