"""One pass of a signal analysis over a batch: the teacher, then the student beside it.

Everything that is compared place by place is compared inside the student's scan over layers, from
the teacher's outputs; only sums leave it. See ``kd.signal`` for what they mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxdistill.kd.objective import Batch, kd_objective
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import Activation, Output, Params, Transform, make_apply
from jaxdistill.paths import walk
from jaxdistill.quant.policy import dequantize_params

# The columns of every [L, 7] array, in the order in which a layer uses them.
PARTS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
PROJECTIONS = tuple(PARTS)


def _kernels(params: Params) -> dict[str, Array]:
    return {name: params["layers"][part][name]["kernel"] for name, part in PARTS.items()}


def _with_kernels(params: Params, kernels: dict[str, Array]) -> Params:
    layers = dict(params["layers"])
    for name, part in PARTS.items():
        node = layers[part][name] | {"kernel": kernels[name]}
        layers[part] = layers[part] | {name: node}
    return params | {"layers": layers}


def _floats(params: Params) -> Params:
    """Dequantize the stored form; leave masters and their ranges as they are."""
    stored = any(path.endswith("_q") for path, _ in walk(params))
    return dequantize_params(params) if stored else params


def _of_output(
    params: Params, tokens: Array, positions: Array | None = None, segment_ids: Array | None = None
) -> Output:
    """Pass for an ``ApplyFn`` whose params are the output that was computed before."""
    return params["output"]


def make_sums(
    config: ModelConfig,
    transform: Transform | None,
    teacher_transform: Transform | None,
    activation: Activation | None,
    losses: tuple[str, ...],
    teacher_gradients: bool,
    options: dict[str, Any],
    chunk: int,
) -> Callable[[Params, Params, Batch], dict[str, Array]]:
    """Build the pass over one batch; its results add up over batches."""
    alone = kd_objective(_of_output, None, chunk=chunk)
    beside = kd_objective(_of_output, _of_output, chunk=chunk)

    def outputs(seen, _):
        return {name: seen[f"layers/{part}/{name}"][1] for name, part in PARTS.items()}

    def squared_norms(pull, out: Output, objective, guide: Output | None, batch: Batch):
        """Return ``|dL/dW|^2`` [L, 7] and the metrics; ``pull`` is the backward pass."""

        def loss(hidden):
            params = {"output": Output(hidden, out.head)}
            teacher = None if guide is None else {"output": guide}
            total, count, metrics = objective(params, teacher, batch)
            return total / jnp.maximum(count, 1.0), metrics

        d_hidden, metrics = jax.grad(loss, has_aux=True)(out.hidden)
        (gradient,) = pull(d_hidden)
        squares = [jnp.sum(jnp.square(gradient[p]), axis=(1, 2)) for p in PROJECTIONS]
        return jnp.stack(squares, axis=1), metrics

    def sums(teacher_params: Params, student_params: Params, batch: Batch) -> dict[str, Array]:
        teacher_params, student_params = _floats(teacher_params), _floats(student_params)
        inputs = (batch["tokens"], batch.get("positions"), batch.get("segment_ids"))
        segments = inputs[2]
        tokens = inputs[0].reshape(-1)
        keep = jnp.ones(tokens.shape, bool) if segments is None else segments.reshape(-1) > 0

        teach = make_apply(config, transform=teacher_transform, tap=outputs, **options)
        learn = make_apply(
            config, transform=transform, activation=activation, tap=_compare(keep), **options
        )

        def forward(apply, params, extra=None):
            def run(kernels):
                out, seen = apply(_with_kernels(params, kernels), *inputs, tap_inputs=extra)
                return out.hidden, (out.head, seen)

            hidden, pull, (head, seen) = jax.vjp(run, _kernels(params), has_aux=True)
            return pull, Output(hidden, head), seen

        pull, guide, seen_t = forward(teach, teacher_params)
        found: dict[str, Array] = {}
        if teacher_gradients:
            found["gradient/teacher"], metrics = squared_norms(pull, guide, alone, None, batch)
            found["nll/teacher"] = metrics["nll"][0]
        pull, out, (seen, steps_s) = forward(learn, student_params, seen_t)
        found |= seen
        metrics = {}
        if "ce" in losses:
            squares, metrics = squared_norms(pull, out, alone, None, batch)
            found["gradient/student"] = squares
        if "kd" in losses:
            squares, metrics = squared_norms(pull, out, beside, guide, batch)
            found["gradient/student_kd"] = squares
            found["kl"] = metrics["kl"][0]
        found["nll/student"], found["tokens"] = metrics["nll"]

        start_t = _embed(teacher_params, teacher_transform, tokens)
        start_s = _embed(student_params, transform, tokens)
        steps_t = seen_t["o_proj"] + seen_t["down_proj"]
        found |= _drift(start_t, start_s, steps_t, steps_s, keep)
        flat = (guide.hidden.reshape(tokens.shape[0], -1), out.hidden.reshape(tokens.shape[0], -1))
        energy, noise = _energies(*flat, keep)
        return found | {"hidden/signal": energy, "hidden/noise": noise, "places": keep.sum()}

    return sums


def _masked(rows: Float[Array, "N D"], keep: Bool[Array, "N"]) -> Float[Array, "N D"]:
    """Return float32 rows, padding's set to 0."""
    rows = rows.astype(jnp.float32)
    return jnp.where(jnp.broadcast_to(keep[:, None], rows.shape), rows, jnp.zeros_like(rows))


def _energies(
    teacher: Float[Array, "N D"], student: Float[Array, "N D"], keep: Bool[Array, "N"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the signal's and the noise's sum of squares over places that are not padding."""
    y_t, y_s = _masked(teacher, keep), _masked(student, keep)
    return jnp.sum(jnp.square(y_t)), jnp.sum(jnp.square(y_t - y_s))


def _compare(keep: Bool[Array, "N"]) -> Callable[[Any, Any], Any]:
    """Return the student's tap: sums of its outputs and of the teacher's, and the block's step."""

    def tap(seen: Any, teacher: Any) -> Any:
        found: dict[str, list[Array]] = {}
        for name, part in PARTS.items():
            y_s = seen[f"layers/{part}/{name}"][1]
            y_t = teacher[name]
            signal, noise = _energies(y_t, y_s, keep)
            width = jnp.asarray(y_s.shape[-1], jnp.float32)
            for key, value in (
                ("signal", signal),
                ("noise", noise),
                ("sum/teacher", jnp.sum(_masked(y_t, keep)) / width),
                ("sum/student", jnp.sum(_masked(y_s, keep)) / width),
                ("square/teacher", signal / width),
                ("square/student", jnp.sum(jnp.square(_masked(y_s, keep))) / width),
            ):
                found.setdefault(key, []).append(value)
        step = seen["layers/self_attn/o_proj"][1] + seen["layers/mlp/down_proj"][1]
        return {key: jnp.stack(values) for key, values in found.items()}, step

    return tap


def _embed(params: Params, transform: Transform | None, tokens: Array) -> Array:
    part = {"embed_tokens": params["embed_tokens"]}
    part = transform(part) if transform else part
    return jnp.take(part["embed_tokens"]["embedding"], tokens, axis=0)


def _drift(
    start_t: Array, start_s: Array, steps_t: Array, steps_s: Array, keep: Array
) -> dict[str, Array]:
    """Sum the residual stream's relative error and cosine over places, [L+1] each.

    The stream after a layer is the embedding and every ``o_proj`` and ``down_proj`` output so far.
    The two are means of each place's own value, for in a trained model a few places (the first of a
    text) are hundreds of times larger than all others and would hide them in a common sum.
    """
    zeros = jnp.zeros_like(keep, jnp.float32)

    def at(x_t: Array, x_s: Array) -> tuple[Array, Array]:
        def norm(x):
            return jnp.sqrt(jnp.sum(jnp.square(x), axis=-1))

        tiny = jnp.finfo(jnp.float32).tiny
        error = norm(x_t - x_s) / jnp.maximum(norm(x_t), tiny)
        cosine = jnp.sum(x_t * x_s, axis=-1) / jnp.maximum(norm(x_t) * norm(x_s), tiny)
        return jnp.sum(jnp.where(keep, error, zeros)), jnp.sum(jnp.where(keep, cosine, zeros))

    def body(x, step):
        x = (x[0] + step[0].astype(jnp.float32), x[1] + step[1].astype(jnp.float32))
        return x, at(*x)

    start = (start_t.astype(jnp.float32), start_s.astype(jnp.float32))
    _, later = lax.scan(body, start, (steps_t, steps_s))
    first = at(*start)
    error, cosine = (jnp.concatenate([a[None], b]) for a, b in zip(first, later, strict=True))
    return {"drift/relative_error": error, "drift/cosine": cosine}
