"""Post-training quantization of a decoder on calibration text: GPTQ and AWQ on our own layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import Params, places_of, run_layer
from jaxdistill.models.hub import Model
from jaxdistill.quant.awq import Fold
from jaxdistill.quant.calibrate import calibrate
from jaxdistill.quant.policy import Policy, fake_quant_activations


def decoder_folds(config: ModelConfig) -> tuple[Fold, ...]:
    """Return where a decoder layer can be scaled without a change of what it computes.

    Attention mixes values linearly, so the scales of ``v_proj`` to ``o_proj`` are exact too; query
    heads that share a value head share its scales.
    """
    attention, mlp = "layers/self_attn", "layers/mlp"
    heads = (config.num_heads // config.num_kv_heads, config.head_dim)
    return (
        Fold(
            producer="layers/input_layernorm",
            consumers=tuple(f"{attention}/{x}_proj" for x in "qkv"),
        ),
        Fold(producer=f"{attention}/v_proj", consumers=(f"{attention}/o_proj",), heads=heads),
        Fold(
            producer="layers/post_attention_layernorm",
            consumers=(f"{mlp}/gate_proj", f"{mlp}/up_proj"),
        ),
        Fold(producer=f"{mlp}/up_proj", consumers=(f"{mlp}/down_proj",)),
    )


def calibrated(
    model: Model,
    policy: Policy,
    batches: Iterable[Mapping[str, Any]],
    method: str = "gptq",
    *,
    sequential: bool = False,
    damping: float = 0.01,
    act_order: bool = False,
    dtype: DTypeLike = jnp.float32,
    progress: Callable[[int, int], None] | None = None,
) -> Params:
    """Return a model's params with ranges beside the weights, calibrated on text.

    Args:
        model: its params must be float; see ``quant.calibrate.calibrate`` for the result.
        policy: which weight gets which spec. Its activation rules hold in the pass as well.
        batches: ``tokens``, ``positions`` and ``segment_ids``, ``[B, T]`` each, as
            ``train.packing`` makes them; some ten thousand tokens are enough.
        method: ``gptq`` or ``awq``.
        sequential: see ``quant.calibrate.calibrate``.
        damping: see ``quant.gptq.gptq``.
        act_order: see ``quant.gptq.gptq``.
        dtype: type of activations and products' operands; statistics are float32.
        progress: called with (layers done, layers).
    """
    config = model.config
    activation = fake_quant_activations(policy.activations)

    def embed(params: Params, batch: Mapping[str, Any]) -> Array:
        table = params["embed_tokens"]["embedding"]
        return jnp.take(table, batch["tokens"].reshape(-1), axis=0).astype(dtype)

    def layer(params: Params, x_ND: Array, batch: Mapping[str, Any]) -> tuple[Array, dict]:
        places = places_of(config, batch["tokens"], batch["positions"], batch["segment_ids"])
        x_ND, _, seen = run_layer(config, params, x_ND, places, activation=activation)
        return x_ND, {path: x[0] for path, x in seen.items() if path.endswith("_proj")}

    names = ("tokens", "positions", "segment_ids")
    return calibrate(
        model.params,
        policy,
        [{name: jnp.asarray(batch[name]) for name in names} for batch in batches],
        embed=embed,
        layer=layer,
        method=method,
        folds=decoder_folds(config),
        sequential=sequential,
        damping=damping,
        act_order=act_order,
        progress=progress,
    )
