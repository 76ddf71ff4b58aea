"""KD-QAT: quantize a model to 4 bits and repair it by distillation from itself, with ov-freeze.

Load the teacher; post-training-quantize a copy; snap and freeze what ov-freeze says; train the rest
to match the teacher; store integers and scales; evaluate teacher, PTQ and student on held-out text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

from jaxdistill.errors import UserError
from jaxdistill.evals.perplexity import make_evaluator
from jaxdistill.kd.freeze import (
    FreezeTransformation,
    freeze,
    freeze_mask,
    freeze_patterns,
    freeze_phases,
    migrate,
)
from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.step import TrainState, adamw, init_state, make_step
from jaxdistill.models.decoder import Params, make_apply
from jaxdistill.models.hub import Model, load_model
from jaxdistill.models.quantized import save_quantized
from jaxdistill.quant.activations import ActivationSpec
from jaxdistill.quant.lattice import QuantSpec, Ranges
from jaxdistill.quant.measure import weight_bytes
from jaxdistill.quant.policy import (
    Policy,
    add_scales,
    default_policy,
    dequantize_params,
    fake_quant_activations,
    fake_quant_params,
    quantize_params,
    snap,
)
from jaxdistill.recipes.prepare import eval_batches_of, pack_rows, split_rows
from jaxdistill.recipes.run_report import Results, check_student, report_run
from jaxdistill.train.checkpoint import last_checkpoint
from jaxdistill.train.data import load_rows
from jaxdistill.train.loop import train
from jaxdistill.train.packing import batches, fingerprint
from jaxdistill.train.run_directory import RunDirectory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize:
    """Quantize a model to 4 bits and repair it by distillation (KD-QAT with ov-freeze)."""

    model: str
    """Model to quantize, the teacher: an HF directory, a .gguf file, or a hub name."""
    data: str
    """Training text: .jsonl[.gz], .txt, .parquet, a directory of such files, or a hub data set."""
    out: Path
    """Run directory: config, metrics, plots, checkpoints and the student."""
    bits: Literal[2, 3, 4, 8] = 4
    """Bits of a weight of the decoder's linear layers."""
    group_size: Literal["channel"] | int = "channel"
    """Weights that share a scale: all of an output channel, or this many (32, 64, 128)."""
    ranges: Ranges = "mse"
    """How a range is chosen: all weights, most of them (--percentile), or the least error."""
    range_norm: float = 2.4
    """Exponent of the error that mse makes least: 2 is the mean square, 2.4 GPTQ's."""
    percentile: float = 99.9
    """Percent of the weights that percentile leaves unclipped."""
    asymmetric: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Give every range a zero point of its own."""
    learn_ranges: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train the ranges too: LSQ, or with --asymmetric minimum and maximum."""
    activation_bits: Literal["none", "8", "16"] = "none"
    """Bits of the linear layers' inputs, none for float."""
    activation_scale: Literal["token", "tensor"] = "token"
    """What shares the scale of quantized activations."""
    freeze: str = "ov"
    """Left untrained, and snapped onto its lattice: ov (v_proj and o_proj), none, or a regex over
    parameter paths; weights trains learned ranges alone."""
    freeze_start: int = 0
    """Step at which the freeze begins."""
    freeze_stop: int = 0
    """Step at which what was frozen is released; 0 for never."""
    steps: int = 200
    """Optimizer updates; 0 for post-training quantization alone."""
    batch_size: int = 8
    """Rows a step."""
    seq_len: int = 512
    """Tokens a row; texts are packed, and do not see each other."""
    lr: float = 1e-4
    """Peak learning rate of AdamW: linear warm-up, cosine decay."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices."""
    ce_weight: float = 0.0
    """Share of cross-entropy in the loss; the rest is the KL to the teacher."""
    temperature: float = 1.0
    """Softens both distributions of the KL."""
    loss_on: Literal["all", "completion"] = "all"
    """Tokens that carry loss: all, or the answers of chat rows alone."""
    accumulate: int = 1
    """Micro-batches a step; they divide the batch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and products; masters are float32 always."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, more time."""
    chunk: int = 256
    """Tokens whose vocabulary logits exist at once."""
    seed: int = 0
    """Order of the data."""
    eval_data: str | None = None
    """Held-out text; without it every 20th row of the data is held out."""
    eval_tokens: int = 65536
    """Tokens of held-out text that are evaluated; 0 for all."""
    eval_every: int = 0
    """Steps between looks at a small held-out probe; 0 for four in a run."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 for four in a run, -1 for none."""
    keep: int = 2
    """Checkpoints kept."""
    resume: bool = False
    """Go on with the run in --out from its last checkpoint."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object as the last line."""

    def __post_init__(self) -> None:
        least_of = {"steps": 0, "batch_size": 1, "seq_len": 2, "accumulate": 1, "chunk": 1}
        least_of |= {
            "keep": 1,
            "eval_tokens": 0,
            "eval_every": 0,
            "checkpoint_every": -1,
            "seed": 0,
            "freeze_start": 0,
            "freeze_stop": 0,
        }
        for name, least in least_of.items():
            given = getattr(self, name)
            if given < least:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {given} given; accepted: {least} or more")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"--accumulate {self.accumulate} does not divide --batch-size {self.batch_size}; "
                "choose a divisor"
            )
        finite = 0 < self.lr < math.inf and 0 < self.temperature < math.inf
        if not 0 <= self.ce_weight <= 1 or not finite:
            raise UserError(
                f"--ce-weight {self.ce_weight}, --temperature {self.temperature}, --lr {self.lr} "
                "given; accepted: 0 <= ce-weight <= 1, temperature > 0, lr > 0"
            )


def policy_of(o: Quantize, model: Model) -> Policy:
    """Return the policy that the options ask for on this model."""
    spec = QuantSpec(
        bits=o.bits,
        group_size=None if o.group_size == "channel" else int(o.group_size),
        ranges=o.ranges,
        symmetric=not o.asymmetric,
        learned=o.learn_ranges,
        norm=o.range_norm,
        percentile=o.percentile,
    )
    head_group = 32 if model.config.hidden_size % 32 == 0 else None
    policy = default_policy(spec, tied=model.config.tie_embeddings, head_group_size=head_group)
    if o.activation_bits == "none":
        return policy
    seen = ActivationSpec(bits=int(o.activation_bits), scale_per=o.activation_scale)
    return dataclasses.replace(policy, activations=((r"^layers/", seen),))


def quantize(
    o: Quantize, console: Console | None = None, *, known: Mapping[str, Any] | None = None
) -> Results:
    """Run the job.

    Args:
        o: the options.
        console: where progress and tables are shown; standard error by default.
        known: the results of ``"teacher"`` or ``"ptq"`` where the same model and held-out text were
            evaluated before; they are not evaluated again.

    Returns:
        ``{"teacher", "ptq", "student"}``, each with its evaluation and ``bytes``.

    Raises:
        UserError: any input is wrong; nothing is written then.
    """
    console = console or Console(stderr=True)
    patterns = freeze_patterns(o.freeze)
    dtype = jnp.dtype(o.dtype)

    # The teacher and its data; everything that can be wrong with the input is found before writing.
    teacher = load_model(o.model)
    # A quantized model may be the teacher too: its float values are what is distilled.
    teacher = dataclasses.replace(teacher, params=jax.jit(dequantize_params)(teacher.params))
    policy = policy_of(o, teacher)
    rows = load_rows(o.data)
    if o.eval_data is None:
        rows, held_rows = split_rows(rows, o.data)
    else:
        held_rows = load_rows(o.eval_data)
    packed = pack_rows(rows, teacher, o.seq_len, o.loss_on)
    held_out = pack_rows(held_rows, teacher, o.seq_len, o.loss_on, add_eos=False)
    held = eval_batches_of(held_out, o.batch_size, o.eval_tokens)
    data = batches(packed, batch_size=o.batch_size, seed=o.seed)

    # PTQ: ranges beside the masters.
    student = add_scales(teacher.params, policy)
    phases = freeze_phases(patterns, o.steps, o.freeze_start, o.freeze_stop) if o.steps else []
    if all(jax.tree.leaves(freeze_mask(student, patterns))):
        raise UserError(
            f"--freeze {o.freeze} leaves nothing to train; give fewer patterns, or --learn-ranges"
        )
    run = RunDirectory(o.out, _identity(o), resume=o.resume)
    stored = quantize_params(student, policy)

    # Evaluation reads the stored integers, the very ones that are saved and exported.
    activation = fake_quant_activations(policy.activations)
    float_apply = make_apply(teacher.config, dtype=dtype)
    int_apply = make_apply(
        teacher.config, transform=dequantize_params, activation=activation, dtype=dtype
    )
    beside = make_evaluator(kd_objective(int_apply, float_apply, chunk=o.chunk))

    def judge(params: Params, on: list[Any]) -> dict[str, float | int]:
        return beside(params, teacher.params, on) | {"bytes": weight_bytes(params, policy)}

    results: Results = dict(known or {})
    with console.status("evaluating teacher and PTQ"):
        if "teacher" not in results:
            alone = make_evaluator(kd_objective(float_apply, None, chunk=o.chunk))
            results["teacher"] = alone(teacher.params, None, held)
            results["teacher"] |= {"kl": 0.0, "agreement": 1.0}
            results["teacher"] |= {"bytes": weight_bytes(teacher.params)}
        if "ptq" not in results:
            results["ptq"] = judge(stored, held)

    # Training: any objective, any transform, any freeze; here KL, fake quantization and ov-freeze.
    if o.steps:
        fake_apply = make_apply(
            teacher.config,
            transform=fake_quant_params(policy),
            activation=activation,
            dtype=dtype,
            remat=o.remat,
        )
        objective = kd_objective(
            fake_apply,
            float_apply,
            temperature=o.temperature,
            ce_weight=o.ce_weight,
            chunk=o.chunk,
        )
        optimizer = adamw(o.lr, o.steps, weight_decay=o.weight_decay)
        probe = held[: max(1, 2048 // (o.batch_size * o.seq_len))]
        quarter = max(1, o.steps // 4)
        resumed = last_checkpoint(run.checkpoints) if o.resume else None
        state = None
        for phase in phases:
            if phase.stop < (resumed or 0):
                continue
            tx = freeze(optimizer, phase.patterns)
            state = enter_phase(state, student, tx, phase.patterns, policy)
            state = train(
                make_step(objective, tx, accumulate=o.accumulate),
                state,
                teacher.params,
                data,
                steps=phase.stop,
                run=run,
                fingerprint=fingerprint(packed),
                resume=o.resume and (phase.start == 0 or (resumed or 0) > phase.start),
                checkpoint_every={0: quarter, -1: 0}.get(o.checkpoint_every, o.checkpoint_every),
                keep=o.keep,
                evaluate=lambda params: judge(quantize_params(params, policy), probe),
                evaluate_every=o.eval_every or quarter,
                console=console,
            )
        assert state is not None  # a run of one step or more has a phase
        stored = quantize_params(state.params, policy)
        with console.status("evaluating the student"):
            results["student"] = judge(stored, held)
        check_student(results["student"], o.lr)
    else:
        results["student"] = results["ptq"]
    save_quantized(run.student, teacher.config, stored, teacher.tokenizer, policy)
    report_run(run, results, console)
    return results


def enter_phase(
    state: TrainState | None,
    student: Params,
    tx: FreezeTransformation,
    patterns: Sequence[str],
    policy: Policy,
) -> TrainState:
    """Return the state that a phase starts from: what it freezes snapped, the optimizer carried on.

    Args:
        state: the last phase's state; None at the start of a run.
        student: the post-training-quantized params that a run starts from.
        tx: the phase's optimizer.
        patterns: what the phase freezes.
        policy: the params'.
    """
    params = student if state is None else state.params
    for pattern in patterns:
        params = snap(params, policy, pattern)
    if state is None:
        return init_state(params, tx)
    opt_state = migrate(state.opt_state, tx, params)
    return TrainState(step=state.step, params=params, opt_state=opt_state)


def _identity(o: Quantize) -> dict[str, Any]:
    """Return the options that make a run what it is; a resumed run must have the same."""
    said = dataclasses.asdict(o)
    return {k: v for k, v in said.items() if k not in ("out", "keep", "resume", "json")}
