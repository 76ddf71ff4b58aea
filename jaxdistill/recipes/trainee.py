"""The student of a run: made from a model, quantized where asked, trained, and stored."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from jaxdistill.errors import UserError
from jaxdistill.kd.states import init_projections
from jaxdistill.losses.loss import Loss
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import Params, Transform, make_apply
from jaxdistill.models.hf import save_hf
from jaxdistill.models.hub import Model
from jaxdistill.models.lora import merge_lora
from jaxdistill.models.quantized import save_quantized
from jaxdistill.models.sharding import place
from jaxdistill.quant.policy import (
    Policy,
    add_scales,
    dequantize_params,
    fake_quant_activations,
    fake_quant_params,
    quantize_params,
    snap,
)
from jaxdistill.recipes.calibrate import calibrated
from jaxdistill.recipes.options import Distill, policy_of
from jaxdistill.recipes.student_init import student_from

_CALIBRATION_TOKENS = 16384


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainee:
    """Hold a student as it is trained.

    Attributes:
        config: its shape.
        params: float32 masters, and beside them ranges, adapters and learned projections.
        policy: how it is quantized; None for a float student.
        merge: brings adapters into the kernels; None where there are none.
        frozen: patterns that its making alone asks for: all but the adapters.
    """

    config: ModelConfig
    params: Params
    policy: Policy | None
    merge: Transform | None
    frozen: tuple[str, ...]

    @property
    def transform(self) -> Transform | None:
        """Return what the forward pass sees of the masters: adapters merged, then lattice."""
        steps = [self.merge, fake_quant_params(self.policy) if self.policy else None]
        kept = [step for step in steps if step]

        def both(params: Params) -> Params:
            for step in kept:
                params = step(params)
            return params

        return both if kept else None

    def apply(self, *, trained: bool = True, **options: Any) -> Any:
        """Return the ``ApplyFn`` of the masters, or (``trained`` False) of the stored form."""
        return make_apply(
            self.config,
            transform=self.transform if trained else dequantize_params,
            activation=fake_quant_activations(self.policy.activations) if self.policy else None,
            **options,
        )

    def stored(self, params: Params) -> Params:
        """Return trained params as they are stored: adapters merged, integers for masters."""
        kept = {name: child for name, child in params.items() if name != "projections"}
        kept = jax.jit(self.merge)(kept) if self.merge else kept
        return quantize_params(kept, self.policy) if self.policy else kept

    def snapped(self, params: Params, patterns: list[str]) -> Params:
        """Return params with what the patterns freeze moved onto its lattice."""
        return snap(params, self.policy, patterns) if self.policy else params

    def save(self, directory: Path, stored: Params, tokenizer: Any) -> None:
        """Write the stored form: integers and scales, or a float HF directory."""
        if self.policy:
            save_quantized(directory, self.config, stored, tokenizer, self.policy)
        else:
            save_hf(directory, self.config, stored, tokenizer)


def make_trainee(
    o: Distill, base: Model, teacher: Model | None, loss: Loss, data: Any, console: Console
) -> Trainee:
    """Make the student that the options ask for.

    Args:
        o: the options.
        base: the float model that it is made from.
        teacher: gives the width of learned projections; None where no teacher is live.
        loss: says which projections are learned.
        data: batches; some of them calibrate GPTQ or AWQ.
        console: where progress is shown.

    Raises:
        UserError: the model cannot be cut or quantized so.
    """
    made = student_from(base, o.student_init, o.seed)
    if made.transform and o.learn_ranges:
        raise UserError(
            "--learn-ranges given with lora, which trains adapters alone; leave out one"
        )
    model = dataclasses.replace(base, config=made.config, params=made.params)
    policy = policy_of(o, model)
    params = model.params if policy is None else _quantized(o, model, policy, data, console)
    learned = init_projections(
        loss,
        made.config.hidden_size,
        (teacher or model).config.hidden_size,
        made.config.num_layers,
        jax.random.key(o.seed),
    )
    params = params | ({"projections": learned} if learned else {})
    params = place(params)
    return Trainee(
        config=made.config, params=params, policy=policy, merge=made.transform, frozen=made.freeze
    )


def _quantized(o: Distill, model: Model, policy: Policy, data: Any, console: Console) -> Params:
    """Return the params with ranges beside them, by the method that the options name."""
    if o.ptq == "rtn":
        return add_scales(model.params, policy)
    kernels = merge_lora(model.params)  # fresh adapters add nothing
    number = max(1, _CALIBRATION_TOKENS // (o.batch_size * o.seq_len))
    with console.status(f"calibrating by {o.ptq}") as status:
        found = calibrated(
            dataclasses.replace(model, params=kernels),
            policy,
            [data[i] for i in range(number)],
            o.ptq,
            dtype=jnp.dtype(o.dtype),
            progress=lambda i, n: status.update(f"calibrating by {o.ptq}: layer {i} of {n}"),
        )
    return _with_missing(found, model.params)


def _with_missing(params: Params, other: Params) -> Params:
    """Return params with the leaves that only the other tree has: its adapters."""
    out = dict(other)
    for name, child in params.items():
        nested = isinstance(child, dict)
        out[name] = _with_missing(child, other.get(name, {})) if nested else child
    return out
