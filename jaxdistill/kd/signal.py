"""How the signal travels through a quantized student beside its float teacher.

Quantization error enters at every projection, grows with depth, and comes back as gradients. Per
layer and projection this measures the squared Frobenius norm of the weight's gradient, the mean and
root mean square of the output, and its signal-to-quantization-noise ratio; per depth, how far the
residual stream has drifted ("Oh! We Freeze", arXiv 2403.18159, section 3). ``kd.recommend`` reads a
freeze set out of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxdistill.errors import UserError
from jaxdistill.kd.signal_sums import PARTS, PROJECTIONS, make_sums
from jaxdistill.losses.chunked import CHUNK
from jaxdistill.mesh import fetch, place_batch
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import Activation, Params, Remat, Transform

Signal = dict[str, np.ndarray]


def make_signal(
    config: ModelConfig,
    *,
    transform: Transform | None = None,
    teacher_transform: Transform | None = None,
    activation: Activation | None = None,
    losses: tuple[Literal["ce", "kd"], ...] = ("ce", "kd"),
    teacher_gradients: bool = True,
    dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
    chunk: int = CHUNK,
) -> Callable[[Params, Params, Iterable[Mapping[str, Any]]], Signal]:
    """Build ``measure(teacher_params, student_params, batches) -> Signal``, compiled once.

    Every model reads the same tokens by itself, so an error made early is in all that follows it.
    Gradients are of the mean over target tokens of a batch: ``ce`` is the next token's
    cross-entropy, which student and teacher can be compared by (the teacher's KL to itself has no
    gradient); ``kd`` is the forward KL from the teacher, what distillation trains on. They are
    taken of each ``kernel`` leaf, through the transform: of float masters straight through their
    fake quantization, 0 where a weight is clipped. Stored integers (``kernel_q``) are dequantized
    first and count as float kernels. Squared norms are averaged over batches, the rest is over all
    places that are not padding.

    Args:
        config: the decoder's shape, the same for both.
        transform: the student's, such as ``fake_quant_params(policy)``.
        teacher_transform: the teacher's; usually none.
        activation: changes what the student's linear layers see, see ``make_apply``.
        losses: of which of the two losses the student's gradients are wanted.
        teacher_gradients: False leaves the teacher's backward pass out.
        dtype: type of activations and products' operands.
        remat: see ``make_apply``.
        chunk: tokens whose vocabulary logits exist at once.

    Returns:
        a function whose result holds float64 arrays, [L, 7] over layers and ``PROJECTIONS`` unless
        said otherwise:

        ``gradient/teacher``, ``gradient/student``, ``gradient/student_kd``: ``|dL/dW|_F^2``;
        ``mean/teacher``, ``mean/student``, ``rms/teacher``, ``rms/student``: of the output;
        ``sqnr``: ``10 log10(|y_t|^2 / |y_t - y_s|^2)`` of the output, in dB;
        ``drift/relative_error``, ``drift/cosine`` [L+1]: of the residual stream after the
        embedding and after each layer, means over places of ``|x_t - x_s| / |x_t|`` and of the
        cosine between the two;
        ``nll/teacher``, ``nll/student``, ``kl`` []: nats a token; ``sqnr/hidden`` []: of the final
        hidden states; ``tokens`` []: targets; ``weights`` [7]: one layer's weights.

        Its ``UserError`` says that the batches hold no target.
    """
    sums = jax.jit(
        make_sums(
            config,
            transform,
            teacher_transform,
            activation,
            losses,
            teacher_gradients,
            {"dtype": dtype, "remat": remat},
            chunk,
        )
    )

    def measure(
        teacher_params: Params, student_params: Params, batches: Iterable[Mapping[str, Any]]
    ) -> Signal:
        total: dict[str, np.ndarray] = {}
        number = 0
        for batch in batches:
            found = sums(teacher_params, student_params, place_batch(batch))
            number += 1
            for name, value in found.items():
                total[name] = total.get(name, np.zeros(())) + fetch(value).astype(np.float64)
        if not number or not total["tokens"]:
            raise UserError("the data hold no target token; give longer texts")
        signal = _finish(total, number)
        signal["weights"] = np.asarray([_width(student_params, p) for p in PROJECTIONS], np.float64)
        return signal

    return measure


def by_projection(shares: Mapping[str, Any], layers: int) -> np.ndarray:
    """Lay ``{kernel path: [L] values}`` out as [L, 7]; a kernel that is not there counts 0."""
    columns = [
        np.broadcast_to(fetch(shares.get(path_of(p), 0.0)).astype(np.float64), (layers,))
        for p in PROJECTIONS
    ]
    return np.stack(columns, axis=1)


def path_of(projection: str) -> str:
    """Return the path of a projection's kernel, ``layers/self_attn/v_proj/kernel``."""
    return f"layers/{PARTS[projection]}/{projection}/kernel"


def _width(params: Params, projection: str) -> int:
    """Count one layer's weights of a projection."""
    node = params["layers"][PARTS[projection]][projection]
    kernel = node["kernel"] if "kernel" in node else node["kernel_q"]
    return kernel.shape[-2] * kernel.shape[-1]


def _decibels(signal: np.ndarray | np.floating, noise: np.ndarray | np.floating) -> Any:
    """Return ``10 log10(signal / noise)``: infinite without noise, NaN without either."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 10 * np.log10(signal / noise)


def _finish(total: dict[str, np.ndarray], batches: int) -> Signal:
    """Turn sums over batches into the means and ratios that ``make_signal`` promises."""
    places, tokens = total["places"], total["tokens"]
    signal: dict[str, Any] = {"tokens": tokens}
    for name, value in total.items():
        kind, _, model = name.partition("/")
        if kind == "gradient":
            signal[name] = value / batches
        elif kind == "drift":
            signal[name] = value / places
        elif kind in ("nll", "kl"):
            signal[name] = value / tokens
        elif kind == "sum":
            signal[f"mean/{model}"] = value / places
        elif kind == "square":
            signal[f"rms/{model}"] = np.sqrt(value / places)
    signal["sqnr"] = _decibels(total["signal"], total["noise"])
    signal["sqnr/hidden"] = _decibels(total["hidden/signal"], total["hidden/noise"])
    return {name: np.asarray(value) for name, value in signal.items()}
