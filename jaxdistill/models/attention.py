"""Attention: in blocks of queries as XLA compiles it, or by an accelerator's own kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.errors import UserError
from jaxdistill.mesh import ROWS, TENSOR, axis_size
from jaxdistill.models.product import contract

Attend = Callable[[Array, Array, Array], Array]  # q [B, T, N, H], k, v [B, S, K, H] -> [B, T, N, H]
Implementation = Literal["xla", "cudnn", "splash"]
QUERIES, _PARTS = 512, 4  # of one block; of a text, each with keys of its own, blocks in a loop
_LANES, _MOST = 128, 512  # of splash attention: tokens of a block are a multiple, and at most


def make_attend(
    implementation: Implementation,
    mask_BTS: Bool[Array, "#B T S"],
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
) -> Attend:
    """Return how the queries of a batch attend.

    The kernels read no mask but causality, segments and the window, so T = S, and the places of a
    segment rise with its positions, as they do where text is packed.

    Args:
        implementation: ``xla``, ``attend_in_blocks``, on every device and differentiable in any
            mode, any number of times; ``cudnn``, flash attention of NVIDIA's library, of 16-bit
            floats; ``splash``, flash attention for TPUs (Pallas), which skips blocks that the mask
            hides. The kernels are differentiated once, in reverse mode.
        mask_BTS: where a query may look.
        segment_ids: of a batch whose rows hold several texts.
        window: tokens that a query sees, itself among them.
    """
    if implementation == "xla":
        return functools.partial(attend_in_blocks, mask_BTS=mask_BTS, window=window)
    if implementation == "cudnn":
        mask = None if segment_ids is None else mask_BTS
        return functools.partial(attend_cudnn, mask_BTS=mask, window=window)
    return functools.partial(attend_splash, segment_ids=segment_ids, window=window)


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


def attend_cudnn(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    mask_BTS: Bool[Array, "#B T T"] | None = None,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Attend causally by cuDNN, on an NVIDIA GPU; a mask is one of bfloat16 numbers there.

    Raises:
        UserError: the operands are not of 16 bits, or cuDNN takes no such shape.
    """
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(
            f"attention by cudnn of {q_BTNH.dtype} numbers given; accepted: bfloat16 (--dtype "
            "bfloat16), or another attention"
        )
    if mask_BTS is not None and q_BTNH.shape[1] % 2:
        raise UserError(
            f"attention by cudnn of texts in rows of {q_BTNH.shape[1]} tokens given; accepted: an "
            "even number"
        )
    try:
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            mask=None if mask_BTS is None else mask_BTS[:, None],
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    except (NotImplementedError, RuntimeError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(
            f"attention by cudnn given, and it cannot be: {reason} Choose --attention xla"
        ) from None


def attend_splash(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attend causally by splash attention, on a TPU; on a mesh each device attends to its part.

    With ``interpret`` any device runs it, slowly.
    """
    # Here, since it takes a third of a second that nobody else should wait for.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    B, T, N, H = q_BTNH.shape
    K, padded = k_BTKH.shape[2], -(-T // _LANES) * _LANES
    block = next(b for b in (_MOST, _MOST // 2, _LANES) if padded % b == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: Any = {f"block_{name}": block for name in names}
    one: Any = (
        splash.CausalMask((padded, padded))
        if window is None
        else splash.LocalMask((padded, padded), (window - 1, 0), 0)
    )
    rows, heads = axis_size(ROWS), axis_size(TENSOR)
    by_rows = ROWS if B % rows == 0 else None
    by_heads = TENSOR if K % heads == 0 else None
    here = N // heads if by_heads else N

    def local(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([one] * here),
            block_sizes=splash.BlockSizes(**sizes),
            interpret=interpret,
        )
        # What is added lies after all that a real query may see.
        q, k, v = (jnp.pad(x, ((0, 0), (0, padded - T), (0, 0), (0, 0))) for x in (q, k, v))
        q, k, v = (x.swapaxes(1, 2) for x in (q * H**-0.5, k, v))
        if segments is not None:
            segments = jnp.pad(segments, ((0, 0), (0, padded - T)))
        ids = None if segments is None else splash.SegmentIds(segments, segments)
        out: Any = jax.vmap(kernel)(q, k, v, ids)
        return out.swapaxes(1, 2)[:, :T].astype(q.dtype)

    args = (q_BTNH, k_BTKH, v_BTKH, segment_ids)
    if rows * heads == 1:
        return local(*args)
    of_heads = PartitionSpec(by_rows, None, by_heads)
    specs = (of_heads, of_heads, of_heads, PartitionSpec(by_rows))
    # Pallas's kernels say nothing of what varies among devices.
    return jax.shard_map(local, in_specs=specs, out_specs=of_heads, check_vma=False)(*args)
