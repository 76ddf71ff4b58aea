"""A short hash of a model, equal in any process where shape and weights are equal."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import jax
import numpy as np

from jaxdistill.mesh import fetch
from jaxdistill.models.config import ModelConfig


def model_fingerprint(config: ModelConfig, params: Any) -> str:
    """Return 16 hex digits: sha256 of the config and of the arrays in the order of their paths.

    Dtypes and shapes take part, so a model and its rounded copy differ.
    """
    digest = hashlib.sha256(
        json.dumps(dataclasses.asdict(config), sort_keys=True, default=str).encode()
    )
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    named = {jax.tree_util.keystr(keys): leaf for keys, leaf in leaves}
    for path, leaf in sorted(named.items(), key=lambda item: item[0]):
        array = np.ascontiguousarray(fetch(leaf))
        digest.update(f"{path} {array.dtype.name} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]
