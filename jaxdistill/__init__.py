"""jaxdistill: make language models smaller, in JAX.

Everything is a pure function of pytrees:

    ApplyFn    (params, tokens[B, T], positions, segment_ids) -> Output(hidden[B, T, D], head[V, D])
    Transform  params -> params                            fake quantization, LoRA merge
    Objective  (params, teacher_params, batch) -> (loss_sum, count, metrics)
    Rollout    (params, batch, step) -> batch              the student's own text
    Optimizer  an optax.GradientTransformation             ov-freeze is a mask around one
    step       (state, teacher_params, batch) -> (state, metrics)
    MetaLoss   (synthetic, real batch, key) -> (loss, metrics)    a method of condensing data

Axis letters, in shape suffixes and annotations:

    B rows of a batch      T tokens of a row      S key/value places     N tokens, B*T; query heads
    D model width          V vocabulary           L layers               K key/value heads
    H width of a head      F rotary pairs, H/2    G groups that share a scale
    M synthetic examples   C classes              inner steps are K by themselves
"""

from jaxdistill import _quiet as _quiet
from jaxdistill._memory import keep_pages
from jaxdistill.dd.condense import init_condense, make_condense_step
from jaxdistill.dd.inner import inner_adam, inner_sgd
from jaxdistill.dd.language import objective_loss
from jaxdistill.dd.meta_gradient import meta_gradient
from jaxdistill.dd.synthetic import Synthetic
from jaxdistill.dd.unroll import Unroll, make_unroll
from jaxdistill.errors import UserError
from jaxdistill.evals.cascade_model import CascadeModel
from jaxdistill.evals.perplexity import make_evaluator
from jaxdistill.kd.cross_tokenizer import cross_tokenizer_objective
from jaxdistill.kd.freeze import freeze, ov_freeze
from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.rollout import make_rollout
from jaxdistill.kd.schedule import schedule_of
from jaxdistill.kd.step import TrainState, adamw, init_state, make_step
from jaxdistill.losses.loss import Loss, parse_loss
from jaxdistill.models.cut import cut_layers, cut_width
from jaxdistill.models.decoder import make_apply
from jaxdistill.models.generate import Sampling, generate
from jaxdistill.models.hub import Model, load_model
from jaxdistill.models.lora import LORA_FREEZE, add_lora, merge_lora
from jaxdistill.paths import OV_PATTERN
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import (
    Policy,
    add_scales,
    default_policy,
    dequantize_params,
    fake_quant_params,
    quantize_params,
    snap,
)

__all__ = [
    "CascadeModel",
    "LORA_FREEZE",
    "OV_PATTERN",
    "Loss",
    "Model",
    "Policy",
    "QuantSpec",
    "Sampling",
    "Synthetic",
    "TrainState",
    "Unroll",
    "UserError",
    "adamw",
    "add_lora",
    "add_scales",
    "cross_tokenizer_objective",
    "cut_layers",
    "cut_width",
    "default_policy",
    "dequantize_params",
    "fake_quant_params",
    "freeze",
    "generate",
    "init_condense",
    "init_state",
    "inner_adam",
    "inner_sgd",
    "kd_objective",
    "keep_pages",
    "load_model",
    "make_apply",
    "make_condense_step",
    "make_evaluator",
    "make_rollout",
    "make_step",
    "make_unroll",
    "merge_lora",
    "meta_gradient",
    "objective_loss",
    "ov_freeze",
    "parse_loss",
    "quantize_params",
    "schedule_of",
    "snap",
]
