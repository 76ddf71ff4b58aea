"""KD-QAT: quantize a model to 4 bits and repair it by distillation from itself, with ov-freeze.

Load the teacher; post-training-quantize a copy; snap and freeze what ov-freeze says; train the rest
to match the teacher; store integers and scales; evaluate teacher, PTQ and student on held-out text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

from jaxdistill.errors import UserError
from jaxdistill.evals.perplexity import make_evaluator, recovered
from jaxdistill.kd.freeze import freeze, freeze_mask, freeze_patterns
from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.step import adamw, init_state, make_step
from jaxdistill.models.decoder import Params, make_apply
from jaxdistill.models.hub import Model, load_model
from jaxdistill.models.quantized import is_quantized, save_quantized
from jaxdistill.quant.lattice import QuantSpec, Ranges
from jaxdistill.quant.policy import (
    Policy,
    add_scales,
    default_policy,
    dequantize_params,
    fake_quant_params,
    quantize_params,
    snap,
    walk,
    weight_bytes,
)
from jaxdistill.recipes.prepare import eval_batches_of, pack_rows, split_rows
from jaxdistill.report.plots import plot_training
from jaxdistill.report.table import markdown_table, result_table
from jaxdistill.train.data import load_rows
from jaxdistill.train.loop import train
from jaxdistill.train.packing import batches, fingerprint
from jaxdistill.train.run_directory import RunDirectory, read_metrics, write_json

Results = dict[str, dict[str, float | int]]


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
    """How a scale is chosen: the largest weight, or the least error (p = 2.4, as in GPTQ)."""
    freeze: str = "ov"
    """Snapped and left untrained: ov (v_proj and o_proj), none, or a regex over parameter paths."""
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
    group = None if o.group_size == "channel" else int(o.group_size)
    spec = QuantSpec(bits=o.bits, group_size=group, ranges=o.ranges)
    head_group = 32 if model.config.hidden_size % 32 == 0 else None
    return default_policy(spec, tied=model.config.tie_embeddings, head_group_size=head_group)


def specs_of(params: Params, policy: Policy) -> dict[str, Any]:
    """List the quantized weights for ``quantization.json``."""
    specs = {path: policy.spec(path) for path, _ in walk(params)}
    return {path: dataclasses.asdict(spec) for path, spec in specs.items() if spec is not None}


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

    # PTQ: scales beside the masters; what is to be frozen moves onto its lattice values.
    student = add_scales(teacher.params, policy)
    freeze_mask(student, patterns)
    run = RunDirectory(o.out, _identity(o), resume=o.resume)
    stored = quantize_params(student, policy)
    for pattern in patterns:
        student = snap(student, policy, pattern)

    # Evaluation reads the stored integers, the very ones that are saved and exported.
    float_apply = make_apply(teacher.config, dtype=dtype)
    int_apply = make_apply(teacher.config, transform=dequantize_params, dtype=dtype)
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
            teacher.config, transform=fake_quant_params(policy), dtype=dtype, remat=o.remat
        )
        objective = kd_objective(
            fake_apply,
            float_apply,
            temperature=o.temperature,
            ce_weight=o.ce_weight,
            chunk=o.chunk,
        )
        tx = freeze(adamw(o.lr, o.steps, weight_decay=o.weight_decay), patterns)
        probe = held[: max(1, 2048 // (o.batch_size * o.seq_len))]
        quarter = max(1, o.steps // 4)
        state = train(
            make_step(objective, tx, accumulate=o.accumulate),
            init_state(student, tx),
            teacher.params,
            data,
            steps=o.steps,
            run=run,
            fingerprint=fingerprint(packed),
            resume=o.resume,
            checkpoint_every={0: quarter, -1: 0}.get(o.checkpoint_every, o.checkpoint_every),
            keep=o.keep,
            evaluate=lambda params: judge(quantize_params(params, policy), probe),
            evaluate_every=o.eval_every or quarter,
            console=console,
        )
        stored = quantize_params(state.params, policy)
        with console.status("evaluating the student"):
            results["student"] = judge(stored, held)
        check_student(results["student"], o.lr)
    else:
        results["student"] = results["ptq"]
    specs = specs_of(student, policy)
    save_quantized(run.student, teacher.config, stored, teacher.tokenizer, specs)
    _report(run, results, console)
    return results


def _identity(o: Quantize) -> dict[str, Any]:
    """Return the options that make a run what it is; a resumed run must have the same."""
    said = dataclasses.asdict(o)
    return {k: v for k, v in said.items() if k not in ("out", "keep", "resume", "json")}


def check_student(result: Mapping[str, float | int], lr: float) -> None:
    """Raise ``UserError`` where the last update left a student that is not finite."""
    if not math.isfinite(result["nll"]):
        raise UserError(
            f"the student's held-out NLL is {result['nll']} at --lr {lr}; it was not stored; lower "
            "--lr, then start again in another --out"
        )


def warnings_of(results: Mapping[str, Mapping[str, float | int]]) -> list[str]:
    """Say what the user should hear of the results: no training needed, or training that hurt."""
    teacher, ptq, student = (results[k] for k in ("teacher", "ptq", "student"))
    said = []
    if ptq["perplexity"] <= 1.01 * teacher["perplexity"]:
        said.append("PTQ alone is within 1 % of the teacher's perplexity: no training needed")
    if student["kl"] > ptq["kl"]:
        said.append(
            f"held-out KL ended at {student['kl']:.4f}, above PTQ's {ptq['kl']:.4f}: lower --lr, "
            "give more or closer data"
        )
    return said


def _report(run: RunDirectory, results: Results, console: Console) -> None:
    """Write ``results.json``, the plots and the run's README; show the table."""
    write_json(run.path / "results.json", results)
    rows = read_metrics(run.path)
    if rows:
        plot_training(run.path / "plots", {"student": rows}, results)
    gap = recovered(results["ptq"]["kl"], results["student"]["kl"])
    warnings = warnings_of(results)
    lines = [
        "# A jaxdistill run: 4-bit KD-QAT\n",
        markdown_table(results),
        f"Share of PTQ's KL to the teacher recovered: {gap:.1%}.\n",
        *(f"Warning: {w}.\n" for w in warnings),
        "| file | what it is |\n| --- | --- |\n"
        "| config.json | every option, and the versions it ran on |\n"
        "| metrics.jsonl, tensorboard/ | every step's loss, KL, agreement, speed |\n"
        "| plots/ | loss, KL and recovered gap |\n"
        "| checkpoints/ | training states, for `--resume` |\n"
        "| student/ | the quantized model: integers, scales, tokenizer |\n"
        "| results.json | the table above |\n",
        "Use it: `jaxdistill generate --model DIR --prompt ...`, `jaxdistill evaluate --model DIR "
        "--data ...`, `jaxdistill export --run DIR --format gguf --out model.gguf`.\n",
    ]
    (run.path / "README.md").write_text("\n".join(lines))
    run.close()
    console.print(result_table(results))
    for warning in warnings:
        console.print(f"[yellow]warning: {warning}")


def finished_student(run: Path) -> Path:
    """Return a run's student directory; raise ``UserError`` where the run has none."""
    student = run / "student"
    if not is_quantized(student):
        raise UserError(
            f"{run} holds no finished student; give the --out of a finished `jaxdistill quantize`, "
            "or finish it with --resume"
        )
    return student
