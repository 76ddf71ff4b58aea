"""Students cut from a teacher: fewer layers, fewer MLP channels, heads or residual channels.

Structure after Minitron (arXiv 2407.14679), which ranks by activations; here weights alone decide,
so that no data is needed, and distillation repairs the cut.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxdistill.errors import UserError
from jaxdistill.mesh import fetch
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import Params
from jaxdistill.models.sharding import make_sharded, place
from jaxdistill.paths import path_of, walk

_LEAVES = ("kernel", "bias", "weight", "embedding")


def cut_layers(
    config: ModelConfig, params: Params, layers: int | Sequence[int]
) -> tuple[ModelConfig, Params]:
    """Keep some of the decoder layers, weights unchanged.

    Args:
        config: the teacher's shape.
        params: the teacher's params.
        layers: how many, spread evenly with the first and the last among them (Shleifer and Rush
            2020, arXiv 2010.13002; DistilBERT, arXiv 1910.01108, takes every second); or which,
            counted from 0, in the order given. ShortGPT (arXiv 2403.03853) finds that the layers
            before the last matter least; give its choice as indices.

    Raises:
        UserError: more layers than there are, none, one twice, or one that does not exist.
    """
    have = config.num_layers
    if isinstance(layers, int):
        if not 1 <= layers <= have:
            raise UserError(f"a cut to {layers} layers given; accepted: 1 to {have}, as it has")
        kept = [math.floor(x + 0.5) for x in np.linspace(0, have - 1, layers)]
    else:
        kept = list(layers)
        if not kept or len(set(kept)) < len(kept) or not all(0 <= i < have for i in kept):
            raise UserError(
                f"a cut to the layers {kept} given; accepted: different ones from 0 to {have - 1}"
            )
    index = np.asarray(kept)
    cut: Params = make_sharded(
        lambda stack: jax.tree.map(lambda x: jnp.take(x, index, axis=0), stack),
        {"layers": jax.tree.map(jnp.asarray, params["layers"])},
    )
    return dataclasses.replace(config, num_layers=len(kept)), params | cut


def cut_width(
    config: ModelConfig,
    params: Params,
    *,
    intermediate: int | None = None,
    heads: int | None = None,
    hidden: int | None = None,
) -> tuple[ModelConfig, Params]:
    """Keep the most important MLP channels and heads of each layer, and residual channels of all.

    What is kept stays in order. Kernels are scored as they act, their norm's weight and biases
    within; ``|.|`` is the Frobenius norm.

    - MLP channel j: ``|gate_j| |up_j| |down_j|``.
    - Head h, which reads key head k: ``|V_k O_h|``, what it writes for what it attends to. Queries
      and keys only decide where it looks: a head of zero queries still writes.
    - Residual channel d: the root of the summed squares of all kernels' weights that write it
      (embedding, o_proj, down_proj), times the same of those that read it; each kernel is first
      brought to norm 1, so that the large ones do not decide alone.

    With grouped queries a cut takes whole groups where it can: the ratio of query to key heads
    stays, the kept heads keep their key heads, and the cache shrinks. Where the ratio does not
    divide ``heads``, all key heads stay, and every group loses its weakest query heads.

    Norms divide by the root of the *mean* square, which a cut of D to D' channels changes. Norm
    weights are multiplied by ``sqrt(D / D')`` and their epsilon by ``D / D'``: exact where the
    lost channels are zero, and where they are like the others it keeps the variance of every
    projection. With ``qk_norm``, whose heads share the epsilon, it stays as it is.

    Args:
        config: the teacher's shape.
        params: float params.
        intermediate: MLP channels to keep; None for all.
        heads: query heads to keep; None for all.
        hidden: residual channels to keep; None for all.

    Raises:
        UserError: more than there are, heads that do not divide, or params that are quantized.
    """
    _check_float(params)
    params = jax.tree.map(fetch, params)  # one pass on the host, where nothing is compiled
    for name, wanted, have in (
        ("intermediate", intermediate, config.intermediate_size),
        ("heads", heads, config.num_heads),
        ("hidden", hidden, config.hidden_size),
    ):
        if wanted is not None and not 1 <= wanted <= have:
            raise UserError(f"a cut to {name}={wanted} given; accepted: 1 to {have}, as it has")
    if intermediate not in (None, config.intermediate_size):
        config, params = _cut_intermediate(config, params, intermediate)
    if heads not in (None, config.num_heads):
        config, params = _cut_heads(config, params, heads)
    if hidden not in (None, config.hidden_size):
        config, params = _cut_hidden(config, params, hidden)
    return config, place(params)


def _check_float(params: Params) -> None:
    for path, _ in walk(params):
        if path.rsplit("/", 1)[-1] not in _LEAVES or path.startswith("projections/"):
            raise UserError(
                f"a cut in width of params with {path} given; accepted: float weights alone; "
                "dequantize or merge them, and cut before anything is added"
            )


def _best(scores: Float[np.ndarray, "*L N"], number: int) -> Int[np.ndarray, "*L n"]:
    """Return the indices of the highest scores, in order."""
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :number], axis=-1)


def _effective(layers: Params, block: str, norm: str, name: str) -> Float[np.ndarray, "L I O"]:
    """Return a reading kernel as it acts: times its norm's weight, the bias as one more row."""
    node = layers[block][name]
    kernel = node["kernel"] * layers[norm]["weight"][:, :, None]
    return np.concatenate([kernel, node["bias"][:, None]], axis=1) if "bias" in node else kernel


def _take(node: Params, index: Int[np.ndarray, "L n"], axis: int) -> Params:
    """Select inputs (axis 1) or outputs (axis 2, the bias too) of a stacked linear layer."""
    at = index[:, :, None] if axis == 1 else index[:, None, :]
    out = {**node, "kernel": np.take_along_axis(node["kernel"], at, axis=axis)}
    if axis == 2 and "bias" in node:
        out["bias"] = np.take_along_axis(node["bias"], index, axis=1)
    return out


def _with(params: Params, block: str, changed: Params) -> Params:
    layers = params["layers"]
    return {**params, "layers": {**layers, block: {**layers[block], **changed}}}


def _cut_intermediate(config: ModelConfig, params: Params, number: int):
    layers = params["layers"]
    mlp = layers["mlp"]
    scores = np.linalg.norm(mlp["down_proj"]["kernel"], axis=2)
    for name in ("gate_proj", "up_proj"):
        kernel = _effective(layers, "mlp", "post_attention_layernorm", name)
        scores = scores * np.linalg.norm(kernel, axis=1)
    index = _best(scores, number)
    changed = {name: _take(mlp[name], index, 2) for name in ("gate_proj", "up_proj")}
    changed["down_proj"] = _take(mlp["down_proj"], index, 1)
    return dataclasses.replace(config, intermediate_size=number), _with(params, "mlp", changed)


def _cut_heads(config: ModelConfig, params: Params, number: int):
    c, layers = config, params["layers"]
    attention, groups = layers["self_attn"], config.num_heads // config.num_kv_heads
    v = _effective(layers, "self_attn", "input_layernorm", "v_proj")
    o = attention["o_proj"]["kernel"]
    v = v.reshape(*v.shape[:2], c.num_kv_heads, c.head_dim)
    o = o.reshape(o.shape[0], c.num_kv_heads, groups, c.head_dim, -1)
    # |V O|^2 = tr(V'V OO'), so that no [D, D] product is made.
    vv = np.einsum("ldki,ldkj->lkij", v, v, optimize=True)
    oo = o @ o.swapaxes(-2, -1)
    scores = np.sum(vv[:, :, None] * oo, axis=(-2, -1))
    if number % groups == 0:
        kv = _best(np.sum(scores, axis=2), number // groups)
        query = (kv[:, :, None] * groups + np.arange(groups)[None, None]).reshape(-1, number)
    elif number % c.num_kv_heads == 0:
        kv = np.broadcast_to(np.arange(c.num_kv_heads)[None], scores.shape[:2])
        query = _best(scores, number // c.num_kv_heads) + groups * kv[:, :, None]
        query = query.reshape(-1, number)
    else:
        raise UserError(
            f"a cut of {c.num_heads} query heads to heads={number} given; accepted: a multiple of "
            f"{groups}, the query heads of one key head, or of {c.num_kv_heads}, the key heads"
        )

    def channels(heads_LN: np.ndarray) -> np.ndarray:
        at = heads_LN[:, :, None] * c.head_dim + np.arange(c.head_dim)[None, None]
        return at.reshape(heads_LN.shape[0], -1)

    changed = {
        "q_proj": _take(attention["q_proj"], channels(query), 2),
        "k_proj": _take(attention["k_proj"], channels(kv), 2),
        "v_proj": _take(attention["v_proj"], channels(kv), 2),
        "o_proj": _take(attention["o_proj"], channels(query), 1),
    }
    config = dataclasses.replace(config, num_heads=number, num_kv_heads=kv.shape[1])
    return config, _with(params, "self_attn", changed)


_READS = {
    "self_attn": ("input_layernorm", ("q_proj", "k_proj", "v_proj")),
    "mlp": ("post_attention_layernorm", ("gate_proj", "up_proj")),
}
_WRITES = {"self_attn": "o_proj", "mlp": "down_proj"}


def _residual_scores(params: Params) -> Float[np.ndarray, "D"]:
    layers, table = params["layers"], params["embed_tokens"]["embedding"]
    head = params["lm_head"]["kernel"] if "lm_head" in params else table.T
    width = table.shape[1]

    def share(squares: np.ndarray) -> np.ndarray:
        return squares / np.maximum(np.sum(squares), 1e-30)

    wrote = share(np.sum(np.square(table), axis=0))
    read = share(np.sum(np.square(head * params["norm"]["weight"][:, None]), axis=1))
    for block, (norm, names) in _READS.items():
        node = layers[block][_WRITES[block]]
        squares = np.sum(np.square(node["kernel"]), axis=1)
        squares = squares + np.square(node["bias"]) if "bias" in node else squares
        wrote = wrote + np.sum(np.stack([share(x) for x in squares]), axis=0)
        for name in names:
            kernel = _effective(layers, block, norm, name)[:, :width]  # a bias reads no channel
            squares = np.sum(np.square(kernel), axis=2)
            read = read + np.sum(np.stack([share(x) for x in squares]), axis=0)
    return np.sqrt(wrote * read)


def _cut_hidden(config: ModelConfig, params: Params, number: int):
    index = _best(_residual_scores(params), number)
    ratio = config.hidden_size / number

    def cut(keys: tuple[Any, ...], leaf: np.ndarray) -> np.ndarray:
        names = path_of(keys).split("/")
        if names[-1] == "weight":
            inside = names[-2] in ("q_norm", "k_norm")
            return leaf if inside else np.take(leaf, index, axis=-1) * ratio**0.5
        if names[0] == "embed_tokens" or names[-2] in _WRITES.values():
            return np.take(leaf, index, axis=-1)
        return leaf if names[-1] == "bias" else np.take(leaf, index, axis=-2)

    eps = config.rms_norm_eps * (1.0 if config.qk_norm else ratio)
    config = dataclasses.replace(config, hidden_size=number, rms_norm_eps=eps)
    return config, jax.tree_util.tree_map_with_path(cut, params)
