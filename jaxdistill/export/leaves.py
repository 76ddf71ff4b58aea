"""The parameters of a model as exporters need them: every leaf checked, and none left over."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float16, Float32, UInt8, UInt32

from jaxdistill.errors import UserError
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.hf_layout import HFTensor, hf_layout
from jaxdistill.paths import walk

Leaves = dict[str, np.ndarray]
FloatType = Literal["float32", "float16"]
_BITS = {"int4": 4, "int8": 8, "uint4": 4, "uint8": 8}


def flat_leaves(node: Any, at: str = "") -> Leaves:
    """Return every leaf by its path, as numpy arrays on the host."""
    return {f"{at}/{path}" if at else path: np.asarray(leaf) for path, leaf in walk(node)}


def take(leaves: Leaves, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Take a leaf out; raise ``UserError`` where it is missing or has another shape."""
    if path not in leaves:
        raise UserError(f"parameter {path!r} is missing; give all parameters of the model")
    leaf = leaves.pop(path)
    if leaf.shape != shape:
        raise UserError(f"parameter {path!r} has shape {leaf.shape}; accepted: {shape}")
    return leaf


def take_float(leaves: Leaves, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Take a leaf of float values out; a node in its training form is refused."""
    if any(f"{path}_{part}" in leaves for part in ("scale", "step", "min")):
        raise UserError(
            f"parameter {path!r} is in its training form (a float kernel beside its scale); freeze "
            "it to its lattice first"
        )
    leaf = take(leaves, path, shape)
    if leaf.dtype.name not in ("float32", "float16", "bfloat16"):
        raise UserError(
            f"parameter {path!r} has type {leaf.dtype.name}; accepted: float32, float16, bfloat16, "
            "or a quantized kernel of 4 or 8 bits"
        )
    return leaf


def take_half(leaves: Leaves, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Take the scales of a quantized node out, as float16; other values are refused."""
    scale = take(leaves, path, shape)
    half = scale.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), scale.astype(np.float32)):
        raise UserError(
            f"{path!r}: scales of type {scale.dtype.name} are not float16 values; store float16 "
            "scales, so that the file holds the trained lattice"
        )
    return half


def group_count(leaves: Leaves, path: str, rank: int, axis: int) -> int:
    """Return how many groups a scale leaf has; its own shape is checked when it is taken."""
    if path not in leaves:
        raise UserError(
            f"parameter {path!r} is missing beside its integers; quantize the model again"
        )
    scale = leaves[path]
    return scale.shape[axis] if scale.ndim == rank else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor of an HF checkpoint and what is stored of it, rows first when it is asked for.

    Attributes:
        tensor: its name and shape there, and its place in the params tree.
        leaf: float values, or stored integers, of all layers.
        scale: float16, ``[groups, out]`` a layer, beside integers (``[V, groups]`` of a table).
        zero: the integer that stands for zero, shaped like ``scale``, of an asymmetric weight.
        bits: width of the stored integers, 4 or 8; None of a float leaf.
    """

    tensor: HFTensor
    leaf: np.ndarray
    scale: np.ndarray | None = None
    zero: np.ndarray | None = None
    bits: int | None = None

    @property
    def module(self) -> str:
        """Return the module's name, such as ``model.layers.3.mlp.up_proj``."""
        return self.tensor.name.rsplit(".", 1)[0]

    @property
    def groups(self) -> int:
        """Return how many scales a row has."""
        assert self.scale is not None
        return self.scale.shape[-2 if self.tensor.transpose else -1]

    @property
    def group_size(self) -> int:
        """Return how many weights share a scale."""
        return self.tensor.shape[1] // self.groups

    def unsigned(self) -> UInt8[np.ndarray, "rows columns"]:
        """Return the integers from 0: ``q + 2^(bits-1)``, or ``q`` itself if asymmetric."""
        assert self.bits is not None
        q = self._rows(self.leaf)
        if self.zero is not None:
            return q.astype(np.uint8)
        return (q.astype(np.int16) + 2 ** (self.bits - 1)).astype(np.uint8)

    def scales(self) -> Float16[np.ndarray, "rows groups"]:
        """Return the scales."""
        assert self.scale is not None
        return self._rows(self.scale)

    def zeros(self) -> UInt8[np.ndarray, "rows groups"]:
        """Return which of the ``unsigned`` integers stands for zero: 8 of a symmetric 4-bit one."""
        assert self.bits is not None
        if self.zero is not None:
            return self._rows(self.zero).astype(np.uint8)
        return np.full(self.scales().shape, 2 ** (self.bits - 1), np.uint8)

    def values(self) -> Float32[np.ndarray, "..."]:
        """Return the values in float32: ``s * (u - z)`` exactly, where it is quantized."""
        if self.bits is None:
            return self._rows(self.leaf).astype(np.float32)
        steps = self.unsigned().astype(np.float32) - self._wide(self.zeros())
        return steps * self._wide(self.scales())

    def _rows(self, x: np.ndarray) -> np.ndarray:
        x = x if self.tensor.layer is None else x[self.tensor.layer]
        return np.ascontiguousarray(x.T if self.tensor.transpose else x)

    def _wide(self, x: np.ndarray) -> np.ndarray:
        return np.repeat(x.astype(np.float32), self.group_size, axis=1)


def hf_weights(config: ModelConfig, params: Mapping[str, Any], what: str) -> list[Weight]:
    """Return every tensor of the model's HF checkpoint, in file order.

    Args:
        config: the model's shape.
        params: the stored form: nested dict, layers stacked on axis 0, kernels ``[in, out]``.
        what: the format's name, for messages.

    Raises:
        UserError: a leaf is missing, unexpected, or of another shape or type.
    """
    leaves = flat_leaves(params)
    found: dict[str, Weight] = {}
    out = []
    for t in hf_layout(config):
        path = "/".join(t.path)
        if path not in found:
            lead = () if t.layer is None else (config.num_layers,)
            found[path] = _weight(leaves, path, t, lead)
        out.append(dataclasses.replace(found[path], tensor=t))
    if leaves:
        raise UserError(
            f"parameter {min(leaves)!r} has no place in a {what} directory; give the parameters of "
            "the exported model alone (merge or drop it first)"
        )
    return out


def _weight(leaves: Leaves, path: str, t: HFTensor, lead: tuple[int, ...]) -> Weight:
    """Take out all leaves of one weight, checked."""
    shape = (*lead, *t.stored_shape)
    if f"{path}_q" not in leaves:
        return Weight(tensor=t, leaf=take_float(leaves, path, shape))
    q = take(leaves, f"{path}_q", shape)
    kind = q.dtype.name
    if kind not in _BITS:
        raise UserError(
            f"parameter {path + '_q'!r} has type {kind}; accepted: {', '.join(_BITS)}; quantize it "
            "to 2, 3, 4 or 8 bits"
        )
    at = -2 if t.transpose else -1
    columns = shape[at]
    groups = group_count(leaves, f"{path}_scale", len(shape), at)
    if groups < 1 or columns % groups:
        raise UserError(
            f"{path + '_scale'!r}: {groups} scales do not divide {columns} inputs; quantize again"
        )
    small = (*lead, *((groups, shape[-1]) if t.transpose else (shape[-2], groups)))
    scale = take_half(leaves, f"{path}_scale", small)
    zero = None
    if kind.startswith("u"):
        zero = take(leaves, f"{path}_zero", small).astype(np.float32)
        if not np.array_equal(zero, np.clip(np.round(zero), 0, 2 ** _BITS[kind] - 1)):
            raise UserError(
                f"{path + '_zero'!r} holds values that are not integers in [0, "
                f"{2 ** _BITS[kind] - 1}]; quantize the model again"
            )
    return Weight(tensor=t, leaf=q, scale=scale, zero=zero, bits=_BITS[kind])


def pack_words(u: UInt8[np.ndarray, "rows columns"], bits: int) -> UInt32[np.ndarray, "rows words"]:
    """Pack integers of 4 or 8 bits into 32-bit words, element i of a word at bit ``bits * i``.

    A row that does not fill its last word is padded with zeros.
    """
    each = 32 // bits
    u = np.pad(u, ((0, 0), (0, -u.shape[1] % each)))
    if bits == 4:
        u = u[:, 0::2] | (u[:, 1::2] << np.uint8(4))
    return np.ascontiguousarray(u).view("<u4")
