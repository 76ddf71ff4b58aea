"""LoRA: low-rank adapters beside frozen kernels (Hu et al. 2021, arXiv 2106.09685).

A kernel ``W [in, out]`` acts as ``W + (alpha / r) A B``. Its leaves stand beside it:
``kernel_lora_a [in, r]``, ``kernel_lora_b [r, out]`` and ``kernel_lora_scale``, which holds
``alpha / r`` in float16, for leaves of float16 are never trained. The functions of ``quant.policy``
hand the three through untouched, so adapters compose with fake quantization either way: of the
frozen base, then merged (QLoRA, arXiv 2305.14314), or of the merged kernel.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdistill.errors import UserError
from jaxdistill.models.decoder import Params

# For kd.freeze: all but the adapters, and but the projections that a loss on hidden states learns.
LORA_FREEZE = r"^(?!projections/)(?!.*/kernel_lora_[ab]$)"
_LEAVES = ("kernel_lora_a", "kernel_lora_b", "kernel_lora_scale")


def add_lora(
    params: Params,
    rank: int,
    *,
    alpha: float | int | None = None,
    pattern: str = r"^layers/.*/kernel$",
    rng: Array,
) -> Params:
    """Put adapters beside the kernels that a regex over paths matches.

    A is uniform within ``+-1 / sqrt(in)``, as ``peft`` draws it; B is zero, so that the model is
    unchanged until it is trained.

    Args:
        params: float masters, with or without a quantization grid beside them.
        rank: r.
        alpha: the update is ``alpha / r`` times A B; r by default, so a factor of 1. It is held in
            float16: factors such as 1/3 are rounded.
        pattern: which kernels; others stay as they are.
        rng: of A.

    Raises:
        UserError: the rank or alpha is out of range, nothing matches, or adapters are there.
    """
    try:
        matcher = re.compile(pattern)
    except re.error as e:
        raise UserError(f"{pattern!r} is not a regular expression: {e}") from None
    factor = 1.0 if alpha is None else alpha / max(rank, 1)
    if rank < 1 or not 2**-14 <= factor <= 65504:
        raise UserError(
            f"LoRA of rank {rank} and alpha {alpha} given; accepted: a rank of 1 or more, and an "
            "alpha whose alpha / rank is from 2^-14 to 65504, which float16 holds"
        )
    found: list[str] = []

    def walk(node: Params, prefix: str) -> Params:
        out: Params = {}
        for name, child in node.items():
            path = f"{prefix}{name}"
            out[name] = walk(child, f"{path}/") if isinstance(child, dict) else child
            if isinstance(child, dict) or name != "kernel" or not matcher.search(path):
                continue
            if _LEAVES[0] in node:
                raise UserError(f"{path} has adapters already; merge them first")
            *stack, rows, columns = child.shape
            if rank > min(rows, columns):
                raise UserError(
                    f"LoRA of rank {rank} given; accepted: at most {min(rows, columns)} for {path}"
                )
            key, bound = jax.random.fold_in(rng, len(found)), rows**-0.5
            found.append(path)
            a = jax.random.uniform(key, (*stack, rows, rank), minval=-bound, maxval=bound)
            b = jnp.zeros((*stack, rank, columns))
            out |= dict(zip(_LEAVES, (a, b, jnp.full(stack, factor, jnp.float16)), strict=True))
        return out

    out = walk(params, "")
    if not found:
        raise UserError(
            f"LoRA pattern {pattern!r} matches no float kernel; paths look like "
            "layers/self_attn/q_proj/kernel; dequantize stored weights first"
        )
    return out


def merge_lora(params: Params) -> Params:
    """Return ``W + (alpha / r) A B`` in place of kernels and their adapters: a transform.

    It works leaf by leaf, on the whole tree or on one layer inside the scan. Before
    ``fake_quant_params`` it makes a quantized merged kernel, after it QLoRA's float adapters on a
    quantized base.

    Raises:
        UserError: a kernel with adapters is stored as integers.
    """
    out: dict[str, Any] = {
        name: merge_lora(child) if isinstance(child, dict) else child
        for name, child in params.items()
        if name not in _LEAVES
    }
    if _LEAVES[0] in params:
        if "kernel" not in params:
            raise UserError("adapters beside stored integers given; dequantize, then merge them")
        a, b, factor = (params[name] for name in _LEAVES)
        update = jnp.matmul(a, b, preferred_element_type=jnp.float32)
        factor = jnp.expand_dims(factor.astype(jnp.float32), (-2, -1))
        out["kernel"] = params["kernel"] + jnp.broadcast_to(factor, update.shape) * update
    return out
