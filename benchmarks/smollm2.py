"""SmolLM2-135M's shapes, without its weights, for benchmarks that only compile."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import init_params

SMOLLM2 = ModelConfig(
    model_type="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    tie_embeddings=True,
)


def abstract_params() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the shapes of teacher and student (per channel, tied table in groups of 32)."""
    teacher = jax.eval_shape(lambda: init_params(SMOLLM2, jax.random.key(0)))

    def scaled(node: dict[str, Any]) -> dict[str, Any]:
        out = {}
        for name, child in node.items():
            out[name] = scaled(child) if isinstance(child, dict) else child
            if name == "kernel":
                shape = (*child.shape[:-2], 1, child.shape[-1])
                out["kernel_scale"] = jax.ShapeDtypeStruct(shape, jnp.float16)
            if name == "embedding":
                shape = (child.shape[0], child.shape[1] // 32)
                out["embedding_scale"] = jax.ShapeDtypeStruct(shape, jnp.float16)
        return out

    return teacher, scaled(teacher)
