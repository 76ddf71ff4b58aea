"""KD-QAT: quantize a model to 4 bits and repair it by distillation from itself, with ov-freeze.

Load the teacher; post-training-quantize a copy; snap and freeze what ov-freeze says; train the rest
to match the teacher; store integers and scales; evaluate teacher, PTQ and student on held-out text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
from jaxdistill.quant.measure import weight_bytes
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
from jaxdistill.recipes.prepare import eval_batches_of, pack_rows, split_rows
from jaxdistill.recipes.quantize_options import Quantize, policy_of
from jaxdistill.recipes.run_report import Results, check_student, report_run
from jaxdistill.recipes.signal_looks import recommended, signal_looks
from jaxdistill.train.checkpoint import last_checkpoint
from jaxdistill.train.data import load_rows
from jaxdistill.train.loop import Look, train
from jaxdistill.train.packing import batches, fingerprint
from jaxdistill.train.run_directory import RunDirectory

_CALIBRATION_TOKENS = 16384


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
    student = post_training_quantize(o, teacher, policy, data, console)
    patterns = freeze_patterns(o.freeze)
    if o.freeze == "auto":
        patterns = recommended(teacher, student, policy, data, console)
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
        looks = [
            Look(
                o.eval_every or quarter,
                lambda _, params: {
                    f"eval/{k}": v for k, v in judge(quantize_params(params, policy), probe).items()
                },
            ),
            *signal_looks(o, teacher, policy, None if resumed else stored, held, run.path),
        ]
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
                looks=looks,
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


def post_training_quantize(
    o: Quantize, teacher: Model, policy: Policy, data: Any, console: Console
) -> Params:
    """Return the teacher's params with ranges beside them, by the method that the options name."""
    if o.ptq == "rtn":
        return add_scales(teacher.params, policy)
    number = max(1, _CALIBRATION_TOKENS // (o.batch_size * o.seq_len))
    text = [data[i] for i in range(number)]
    with console.status(f"calibrating by {o.ptq}") as status:
        return calibrated(
            teacher,
            policy,
            text,
            o.ptq,
            dtype=jnp.dtype(o.dtype),
            progress=lambda i, n: status.update(f"calibrating by {o.ptq}: layer {i} of {n}"),
        )


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
