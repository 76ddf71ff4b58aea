"""A quantized model on disk: stored integers and float16 scales, HF config, tokenizer.

DIR/config.json         the HF config
DIR/quantization.json   the spec of every quantized weight, for the reader; that of activations
DIR/params/             orbax: ``kernel_q`` int4 or int8 (uint8 too; uint4 as int4, less 8),
                        ``kernel_scale`` and ``kernel_zero`` float16, norms float32
DIR/tokenizer*          as transformers saves it
DIR/checksums.crc32      size and CRC-32 of each file
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxdistill._checksums import check_directory, seal
from jaxdistill._orbax import check_array_path, prepare_orbax, read_back
from jaxdistill.errors import UserError
from jaxdistill.mesh import on_primary, present_mesh
from jaxdistill.models.config import ModelConfig, config_from_hf, config_to_hf
from jaxdistill.models.decoder import Params
from jaxdistill.models.hf_directory import replace_directory
from jaxdistill.models.hf_layout import hf_layout
from jaxdistill.models.json_text import read_object
from jaxdistill.models.sharding import Layout, sharding_of
from jaxdistill.models.tokenizer import Tokenizer, load_tokenizer
from jaxdistill.paths import path_of, walk
from jaxdistill.quant.activations import ActivationSpec
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import ActivationRules, Policy

_MARK = "quantization.json"
_PART = re.compile(r"_(q|scale|zero)$")
_EXEMPT, _MOST_RATIO = 64 * 2**20, 16


def is_quantized(directory: Path) -> bool:
    """Return whether ``save_quantized`` wrote this directory."""
    return (directory / _MARK).is_file()


def save_quantized(
    directory: Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None,
    policy: Policy,
) -> None:
    """Write params in the stored form; the directory appears whole, and read back, or not at all.

    Args:
        directory: replaced where it exists.
        config: the decoder's shape.
        params: what ``quant.policy.quantize_params`` returns.
        tokenizer: saved beside, where there is one.
        policy: that of the params; its rules for activations are part of the model.

    Raises:
        UserError: the path cannot hold arrays, or what was written does not read back.
    """
    part = directory.with_name(f"{directory.name[:40]}.part")  # a name has at most 255 bytes

    def begin() -> None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)

    def finish() -> None:
        (part / "config.json").write_text(json.dumps(config_to_hf(config), indent=2) + "\n")
        (part / _MARK).write_text(json.dumps(_described(params, policy), indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        seal(part)
        replace_directory(directory, part)

    check_array_path(directory)
    prepare_orbax()
    on_primary(begin, f"make {part}")
    arrays, where = _signed(params), str((part / "params").resolve())
    ocp.save(where, arrays)  # each host its own parts
    if problem := read_back(lambda abstract: ocp.load(where, abstract), arrays):
        raise UserError(f"{part} was written and does not read back ({problem}); look at the disk")
    on_primary(finish, f"write {directory}")


def _described(params: Params, policy: Policy) -> dict[str, Any]:
    paths = [path.removesuffix("_q") for path, _ in walk(params) if path.endswith("_q")]
    specs = {path: policy.spec(path) for path in paths}
    rules = [(regex, spec and dataclasses.asdict(spec)) for regex, spec in policy.activations]
    weights = {path: dataclasses.asdict(spec) for path, spec in specs.items() if spec}
    return {"weights": weights, "activations": rules}


def load_activations(directory: Path) -> ActivationRules:
    """Read the rules for activations of what ``save_quantized`` wrote.

    Raises:
        UserError: the file is damaged.
    """
    try:
        rules = read_object(directory / _MARK)["activations"]
        found = tuple((regex, spec and ActivationSpec(**spec)) for regex, spec in rules)
        for regex, _ in found:
            re.compile(regex)
        return found
    except (OSError, ValueError, KeyError, TypeError, re.error) as e:
        raise UserError(
            f"{directory / _MARK} is damaged ({type(e).__name__}: {e}); export or train it again"
        ) from None


def load_policy(directory: Path) -> Policy:
    """Read how what ``save_quantized`` wrote is quantized.

    Raises:
        UserError: the file is damaged.
    """
    activations = load_activations(directory)
    try:
        weights = read_object(directory / _MARK)["weights"]
        rules = tuple((f"^{re.escape(p)}$", QuantSpec(**spec)) for p, spec in weights.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{directory / _MARK} is damaged ({type(e).__name__}: {e}); export or train it again"
        ) from None
    return Policy(rules=rules, activations=activations)


def load_quantized(
    directory: Path, layout: Layout = "sharded"
) -> tuple[ModelConfig, Params, Tokenizer | None]:
    """Read what ``save_quantized`` wrote, in the stored form, in its place on the present mesh.

    Raises:
        UserError: the directory is cut off, differs from its checksums or was not written by
            ``save_quantized``.
    """
    on_primary(lambda: check_directory(directory), f"check {directory}")
    try:
        config = config_from_hf(read_object(directory / "config.json"))
        params = _unsigned(_load_arrays((directory / "params").resolve(), config, layout))
    except UserError:
        raise
    except Exception as e:  # orbax and tensorstore raise many kinds for a damaged directory
        reason = str(e).strip().splitlines()[0][:120] if str(e).strip() else type(e).__name__
        raise UserError(
            f"{directory} is not a whole quantized model ({reason}); export or train it again"
        ) from None
    has_tokenizer = (directory / "tokenizer.json").is_file()
    return config, params, load_tokenizer(directory) if has_tokenizer else None


def _signed(params: Params) -> Params:
    """Shift uint4 integers to int4, ``q - 8``: orbax's storage has no unsigned type of 4 bits."""
    return _shifted(params, jnp.uint4, jnp.int4, -8)


def _unsigned(params: Params) -> Params:
    """Undo ``_signed``: int4 integers beside a zero point were uint4."""
    return _shifted(params, jnp.int4, jnp.uint4, 8)


def _shifted(node: Params, before: Any, after: Any, by: int) -> Params:
    out: Params = {}
    for name, child in node.items():
        if isinstance(child, dict):
            out[name] = _shifted(child, before, after, by)
        elif name.endswith("_q") and f"{name[:-2]}_zero" in node and child.dtype == before:
            out[name] = (child.astype(jnp.int8) + jnp.int8(by)).astype(after)
        else:
            out[name] = child
    return out


def _load_arrays(path: Path, config: ModelConfig, layout: Layout) -> Params:
    """Restore an orbax checkpoint's arrays onto the mesh or the first device, shapes checked."""
    prepare_orbax()
    mesh = present_mesh()
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    found: Any = ocp.metadata(str(path)).metadata
    _check_shapes(path, found, config)

    def wanted(keys: Any, m: Any) -> jax.ShapeDtypeStruct:
        lies = here if mesh is None else sharding_of(path_of(keys), m.shape, mesh, layout)
        return jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=lies)

    abstract = jax.tree_util.tree_map_with_path(
        wanted, found, is_leaf=lambda m: hasattr(m, "shape")
    )
    return ocp.load(str(path), abstract)


def _check_shapes(path: Path, found: Any, config: ModelConfig) -> None:
    """Raise ``ValueError`` unless the arrays are those of the config, and the files may hold them.

    Compressed arrays say nothing of their size until they are read; trained integers and scales
    shrink to a third at the most.
    """
    wanted = {
        t.path: (*(() if t.layer is None else (config.num_layers,)), *t.stored_shape)
        for t in hf_layout(dataclasses.replace(config, num_layers=1))
    }
    leaves = jax.tree_util.tree_leaves_with_path(found, is_leaf=lambda m: hasattr(m, "shape"))
    whole, size = set(), 0
    for keys, leaf in leaves:
        *parents, name = path_of(keys).split("/")
        base = _PART.sub("", name)
        full, shape = wanted.get((*parents, base), ()), tuple(leaf.shape)
        beside = base != name and not name.endswith("_q")  # a scale or zero point: one a group
        fits = full and len(shape) == len(full) and min(shape) > 0
        equal = [s == f or (beside and s < f) for s, f in zip(shape, full, strict=False)]
        if not fits or not all(equal):
            raise ValueError(f"params/{'/'.join((*parents, name))} has the shape {shape}")
        whole |= set() if beside else {(*parents, base)}
        size += math.prod(shape) * np.dtype(leaf.dtype).itemsize
    if missing := sorted("/".join(keys) for keys in wanted.keys() - whole):
        raise ValueError(f"params/{missing[0]} is not there")
    stored = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if size > _EXEMPT + _MOST_RATIO * stored:
        raise ValueError(f"arrays of {size} bytes in files of {stored}")
