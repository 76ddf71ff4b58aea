"""A cheap look at a student's signal while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxdistill.kd.signal import by_projection, make_signal
from jaxdistill.kd.signal_sums import PROJECTIONS
from jaxdistill.losses.chunked import CHUNK
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import Activation, Params, Remat, Transform
from jaxdistill.quant.measure import clipped_share
from jaxdistill.quant.policy import Policy


def make_probe(
    config: ModelConfig,
    policy: Policy,
    *,
    transform: Transform,
    activation: Activation | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
    chunk: int = CHUNK,
) -> Callable[[Params, Params, Mapping[str, Any]], tuple[dict[str, float], dict[str, Any]]]:
    """Build ``probe(teacher_params, student_params, batch)``, a cheap look during training.

    It costs a training step and the teacher's forward pass. Frozen kernels are looked at too.

    Args:
        config: the decoder's shape.
        policy: what the student's masters are quantized by.
        transform: the student's, such as ``fake_quant_params(policy)``.
        activation: changes what the student's linear layers see.
        dtype: type of activations and products' operands.
        remat: see ``make_apply``.
        chunk: tokens whose vocabulary logits exist at once.

    Returns:
        a function that returns a flat dict for a log, ``signal/<projection>/<quantity>``, means
        over layers, and the same in full, ``quantity -> [L][7]``, for a JSON line. Quantities:
        ``gradient`` (squared norm, of the KL to the teacher), ``rms``, ``sqnr`` (dB) and
        ``clipped`` (share of weights).
    """
    measure = make_signal(
        config,
        transform=transform,
        activation=activation,
        losses=("kd",),
        teacher_gradients=False,
        dtype=dtype,
        remat=remat,
        chunk=chunk,
    )

    def probe(
        teacher_params: Params, student_params: Params, batch: Mapping[str, Any]
    ) -> tuple[dict[str, float], dict[str, Any]]:
        signal = measure(teacher_params, student_params, [batch])
        arrays = {
            "gradient": signal["gradient/student_kd"],
            "rms": signal["rms/student"],
            "sqnr": signal["sqnr"],
            "clipped": by_projection(clipped_share(student_params, policy), len(signal["sqnr"])),
        }
        flat = {
            f"signal/{name}/{quantity}": float(values[:, column].mean())
            for quantity, values in arrays.items()
            for column, name in enumerate(PROJECTIONS)
        }
        return flat, {quantity: values.tolist() for quantity, values in arrays.items()}

    return probe
