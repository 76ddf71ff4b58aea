"""Makes quantized models in their stored form with numpy alone, for the tests of the exports."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests import tiny
from tests.gguf_files import float_params


def quantized(
    w: np.ndarray, axis: int, bits: int = 4, group: int | None = 32, symmetric: bool = True
) -> dict[str, Any]:
    """The leaves of one weight, by suffix: nearest integers, float16 scales, and zero points."""
    w = np.moveaxis(np.asarray(w, np.float32), axis, -1)
    grouped = w.reshape(*w.shape[:-1], -1, group or w.shape[-1])
    if symmetric:
        low, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale = (np.abs(grouped).max(-1) / top).astype(np.float16)
        zero = np.zeros_like(scale)
    else:
        low, top = 0, 2**bits - 1
        least = np.minimum(grouped.min(-1), 0)
        scale = ((np.maximum(grouped.max(-1), 0) - least) / top).astype(np.float16)
        zero = np.clip(np.round(-least / scale), 0, top).astype(np.float16)
    q = np.round(grouped / scale[..., None].astype(np.float32)) + zero[..., None]
    q = np.clip(q, low, top).reshape(w.shape)
    kind = {(4, True): jnp.int4, (8, True): jnp.int8, (4, False): jnp.uint4, (8, False): jnp.uint8}
    leaves = {"q": np.moveaxis(q, -1, axis).astype(kind[max(bits, 4), symmetric])}
    leaves["scale"] = np.moveaxis(scale, -1, axis)
    return leaves if symmetric else leaves | {"zero": np.moveaxis(zero, -1, axis)}


def stored(params: dict[str, Any], **spec: Any) -> dict[str, Any]:
    """A float model's stored form: projections by `spec`, tied table or head in 8 bits by 32."""

    def visit(node: dict[str, Any], inside: bool) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, child in node.items():
            if isinstance(child, dict):
                out[name] = visit(child, inside or name == "layers")
            elif name == "kernel" and inside:
                out |= {f"kernel_{k}": v for k, v in quantized(child, -2, **spec).items()}
            elif name == "kernel" or (name == "embedding" and "lm_head" not in params):
                axis = -2 if name == "kernel" else -1
                out |= {f"{name}_{k}": v for k, v in quantized(child, axis, bits=8).items()}
            else:
                out[name] = child
        return out

    return visit(params, False)


def values(params: dict[str, Any]) -> dict[str, Any]:
    """The float32 values that a stored form stands for: `s * (q - z)`."""
    out: dict[str, Any] = {}
    for name, child in params.items():
        if isinstance(child, dict):
            out[name] = values(child)
        elif name.endswith("_q"):
            stem = name.removesuffix("_q")
            axis = -1 if stem == "embedding" else -2
            q = np.asarray(child).astype(np.float32)
            scale = np.asarray(params[f"{stem}_scale"], np.float32)
            zero = np.asarray(params.get(f"{stem}_zero", np.zeros_like(scale)), np.float32)
            size = q.shape[axis] // scale.shape[axis]
            out[stem] = np.repeat(scale, size, axis) * (q - np.repeat(zero, size, axis))
        elif not name.endswith(("_scale", "_zero")):
            out[name] = np.asarray(child)
    return out


MODELS = {
    "tied": tiny.config(),
    "untied": tiny.config(tie_embeddings=False),
    "wide heads": tiny.config(head_dim=32, tie_embeddings=False),
    "qwen3": tiny.config(model_type="qwen3", head_dim=32, qk_norm=True),
    "biases": tiny.config(qkv_bias=True, o_bias=True, mlp_bias=True, tie_embeddings=False),
    "bytes": tiny.config(vocab_size=260, tie_embeddings=False, eos_token_id=0),  # tiny's tokenizer
}
SPECS = {
    "channel": {"group": None},
    "group 32": {"group": 32},
    "asymmetric channel": {"group": None, "symmetric": False},
    "asymmetric group 32": {"group": 32, "symmetric": False},
    "8 bits": {"bits": 8, "group": 32},
    "asymmetric 8 bits": {"bits": 8, "group": None, "symmetric": False},
    "3 bits": {"bits": 3, "group": 32},
}


# Where a layer's linear projections are: in the params tree, and in an HF checkpoint.
PROJECTIONS = {
    **{f"self_attn/{p}_proj": f"self_attn.{p}_proj" for p in "qkvo"},
    **{f"mlp/{p}_proj": f"mlp.{p}_proj" for p in ("gate", "up", "down")},
}


@functools.cache
def _floats(name: str) -> dict[str, Any]:
    """Random params, small enough for logits of ordinary size."""
    return jax.tree.map(lambda x: x * np.float32(0.15), float_params(MODELS[name]))


def model(name: str, spec: str) -> tuple[Any, dict[str, Any]]:
    """A tiny config and random params in their stored form."""
    return MODELS[name], stored(_floats(name), **SPECS[spec])


def node_of(params: dict[str, Any], path: str) -> dict[str, Any]:
    """The node at a path such as `mlp/up_proj`."""
    return functools.reduce(lambda node, key: node[key], path.split("/"), params)


def changed(params: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a tree with the leaf at `path` replaced, or taken out where the value is None."""
    key, _, rest = path.partition("/")
    out = dict(params)
    if rest:
        out[key] = changed(params.get(key, {}), rest, value)
    elif value is None:
        del out[key]
    else:
        out[key] = value
    return out
