"""The options that trained runs share, checked; and the policy that they ask for."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxdistill.errors import UserError
from jaxdistill.losses.chunked import CHUNK
from jaxdistill.losses.loss import Loss, parse_loss, parse_term
from jaxdistill.losses.registry import Kind
from jaxdistill.models.attention import Implementation
from jaxdistill.models.decoder import Remat
from jaxdistill.models.hub import Model
from jaxdistill.models.sharding import Layout
from jaxdistill.quant.activations import ActivationSpec
from jaxdistill.quant.calibrate import Method
from jaxdistill.quant.lattice import QuantSpec, Ranges
from jaxdistill.quant.policy import Policy, default_policy
from jaxdistill.recipes.parallel import Parallel
from jaxdistill.train.guard import Guard, OnSpike
from jaxdistill.train.packing import Packing

# A run may be gone on with elsewhere, and on other devices.
_NOT_THE_RUN = (
    *("out", "keep", "resume", "json", "on_spike", "spike_sigma"),
    *("mesh", "hosts", "teacher_layout", "attention", "samples"),
)
_LEAST = {
    "steps": 0,
    "batch_size": 1,
    "seq_len": 2,
    "accumulate": 1,
    "unroll": 0,
    "chunk": 1,
    "top_k": 0,
    "keep": 1,
    "eval_tokens": 0,
    "samples": 0,
    "eval_every": 0,
    "signal_every": -1,
    "checkpoint_every": -1,
    "seed": 0,
    "freeze_start": 0,
    "freeze_stop": 0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """Say how a student is quantized."""

    bits: Literal["none", 2, 3, 4, 8] = 4
    """Bits of a weight of the decoder's linear layers; none leaves the student in float."""
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
    ptq: Literal["rtn"] | Method = "rtn"
    """Where the student starts: rtn rounds each weight, gptq and awq look at training text too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Parallel):
    """Say what is trained, on what, and how."""

    data: str
    """Training text: .jsonl[.gz], .txt, .parquet, a directory of such files, a hub data set, or
    rows that `jaxdistill condense` learned of the teacher (--lr stands in place of their rate)."""
    out: Path
    """Run directory: config, metrics, plots, checkpoints and the student."""
    mix: tuple[str, ...] = ()
    """Curated rare examples mixed into the training text, FILE:RATE, the share of all texts that
    they shall be: rare.jsonl:0.1. They are repeated as often as that takes."""
    objective: str = "forward_kl"
    """What is minimised: NAME[:ARGUMENT=VALUE,...] or a weighted sum, as in
    0.9*forward_kl:temperature=2+0.1*ce; a value 4..1 goes from 4 to 1 over the run. `jaxdistill
    objectives` lists them."""
    token_weight: str | None = None
    """Weigh tokens by the teacher: certainty, uncertainty, consensus."""
    correction: str | None = None
    """Put the teacher right by the labels: probability_shift, label_mix."""
    top_k: int = 0
    """See the teacher through its k likeliest tokens and a tail; 0 for all of it."""
    freeze: str = "none"
    """Left untrained, and snapped onto its lattice: ov (v_proj and o_proj), none, auto (what
    the signal analysis of this model recommends), or a regex over parameter paths; weights trains
    learned ranges alone."""
    freeze_start: int = 0
    """Step at which the freeze begins."""
    freeze_stop: int = 0
    """Step at which what was frozen is released; 0 for never."""
    steps: int = 200
    """Optimizer updates; 0 for none."""
    batch_size: int = 8
    """Rows a step."""
    seq_len: int = 512
    """Tokens a row; texts that share a row do not see each other. Learned rows have their own
    length."""
    packing: Packing = "best-fit"
    """How texts share rows: best-fit keeps each whole where it fits, wrap cuts one stream at every
    row's end, none gives each a row. A text longer than a row
    is cut, a chat with the loss on its answers is truncated."""
    lr: float = 1e-4
    """Peak learning rate of AdamW: linear warm-up, cosine decay."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices."""
    loss_on: Literal["all", "completion"] = "all"
    """Tokens that carry loss: all, or the answers of chat rows alone."""
    accumulate: int = 1
    """Micro-batches a step; they divide the batch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and products; masters are float32 always."""
    remat: Remat = "none"
    """What the backward pass makes again instead of storing it: none; minimal, all but the outputs
    of linear layers and attention, which saves most of the memory and costs little; full, each
    layer from its input: the least memory, a quarter more work. On a CPU with --unroll 1."""
    unroll: int = 1
    """Layers that the compiled step has in a row instead of a loop; 0 for all. On a CPU all are a
    few percent faster, and take longer to compile."""
    attention: Implementation = "xla"
    """How a step attends: xla, on any device; cudnn, flash attention of NVIDIA GPUs, with --dtype
    bfloat16; splash, flash attention of TPUs."""
    chunk: int = CHUNK
    """Tokens whose vocabulary logits exist at once."""
    seed: int = 0
    """Order of the data, samples, and fresh weights."""
    eval_data: str | None = None
    """Held-out text; without it every 20th row of the data is held out."""
    eval_tokens: int = 65536
    """Tokens of held-out text that are evaluated; 0 for all."""
    slice: tuple[str, ...] = ()
    """Named slices of the held-out text, judged one by one at the end: a column, NAME=REGEX over
    the text, longest:SHARE, rare_words:SHARE or rare_labels:SHARE, as in longest:0.1. The one that
    lost most is named."""
    samples: int = 0
    """Held-out prompts that teacher and student answer at the end, side by side on the run's
    page."""
    eval_every: int = 0
    """Steps between looks at a small held-out probe; 0 for four in a run."""
    signal_every: int = 0
    """Steps between looks at gradients, SQNR, clipping and flips of each projection, written to
    signal.jsonl, where the student is its teacher quantized; 0 for at most eight in a run, under 5
    % of its time; -1 for none."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 for four in a run, -1 for none."""
    keep: int = 2
    """Checkpoints kept."""
    on_spike: OnSpike = "stop"
    """What a NaN or infinite loss or gradient does, or a spike: stop, or rollback to the last
    checkpoint and on without the batches since, at most three times."""
    spike_sigma: float = 0.0
    """A loss this many robust standard deviations above the median of the last 128 is a spike;
    0 for none."""
    resume: bool = False
    """Go on with the run in --out from its last checkpoint."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object as the last line."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            given = getattr(self, name)
            if given < least:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {given} given; accepted: {least} or more")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"--accumulate {self.accumulate} does not divide --batch-size {self.batch_size}; "
                "choose a divisor"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"--weight-decay {self.weight_decay} given; accepted: 0 or more")
        if not 0 < self.lr < math.inf:
            raise UserError(f"--lr {self.lr} given; accepted: above 0, and finite")
        parse_loss(self.objective)
        _ = self.guard

    @property
    def guard(self) -> Guard:
        """Return what is done about bad losses."""
        return Guard(on_spike=self.on_spike, spike_sigma=self.spike_sigma)


# Options are shown in the order of the bases, the last one first.
@dataclasses.dataclass(frozen=True, kw_only=True)
class _OneModel:
    model: str
    """Model to quantize, the teacher: an HF directory, a .gguf file, or a hub name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Models:
    teacher: str | None = None
    """Model to learn from, or several, separated by commas: HF directories, .gguf files, hub
    names. Not needed with --cache."""
    student: str | None = None
    """Model to train; by default a copy of the first teacher."""
    student_init: tuple[str, ...] = ()
    """What is made of the student before training: cut:layers=N, cut:intermediate=N,heads=N,
    lora:rank=R."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize(Quantization, Training, _OneModel):
    """Quantize a model to 4 bits and repair it by distillation (KD-QAT with ov-freeze)."""

    bits: Literal[2, 3, 4, 8] = 4  # pyright: ignore[reportIncompatibleVariableOverride]
    """Bits of a weight of the decoder's linear layers."""
    freeze: str = "ov"
    """Left untrained, and snapped onto its lattice: ov (v_proj and o_proj), none, auto (what
    the signal analysis of this model recommends), or a regex over parameter paths; weights trains
    learned ranges alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(Quantization, Training, _Models):
    """Distill one or several teachers into a smaller student: cut, quantized, LoRA, or its own."""

    bits: Literal["none", 2, 3, 4, 8] = "none"
    """Bits of a weight of the student's linear layers: quantization-aware; none for float."""
    mixture: str = "mean"
    """How several teachers become one: mean, confidence, agreement."""
    teacher_layout: Layout = "sharded"
    """How a live teacher lies on the mesh: sharded as the student is, tensor (by tensor alone: no
    gathering over fsdp), or replicated."""
    cache: Path | None = None
    """Learn from this directory of `jaxdistill cache-teacher`; a teacher given as well is used to
    evaluate alone."""
    text_from: Literal["data", "teacher"] = "data"
    """Whose text is trained on: the data's, or the teacher's answers to its prompts
    (sequence-level)."""
    on_policy: float = 0.0
    """Share of the steps that train on the student's own answers (GKD's lambda)."""
    prompt_length: int = 64
    """Tokens of a prompt at most, where answers are generated; a plain text's first ones."""
    sample_temperature: float = 1.0
    """Of generated answers; 0 is greedy."""
    rationale_weight: float | None = None
    """Train on rows' `rationale` too, at this weight (step-by-step)."""
    curriculum: Literal["none", "length", "teacher"] = "none"
    """Easy rows first, over the first half of the run: short ones, or those the teacher finds
    likely."""

    def __post_init__(self) -> None:
        super().__post_init__()
        loss, teachers = parse_loss(self.objective), self.teachers
        if not teachers and self.student is None:
            raise UserError("no model given; give --teacher, or --cache and --student")
        if not teachers and self.cache is None and loss.needs_teacher:
            raise UserError(
                f"--objective {self.objective} compares with a teacher; give --teacher or --cache, "
                "or train with --objective ce"
            )
        alone = self.student is None and not self.student_init and self.bits == "none"
        if alone and loss.needs_teacher and len(teachers) == 1 and self.correction is None:
            raise UserError(
                "the student is the teacher itself, which has nothing to learn; give --student, "
                "--student-init or --bits"
            )
        if not 0 <= self.on_policy <= 1 or self.sample_temperature < 0:
            raise UserError(
                f"--on-policy {self.on_policy}, --sample-temperature {self.sample_temperature} "
                "given; accepted: 0 to 1, and 0 or more"
            )
        self._check_together(loss)
        generates = self.on_policy > 0 or self.text_from == "teacher"
        if generates and not 1 <= self.prompt_length < self.seq_len:
            raise UserError(
                f"--prompt-length {self.prompt_length} given with --seq-len {self.seq_len}; "
                "accepted: at least 1, and less than a row"
            )
        if self.text_from == "teacher" and not teachers:
            raise UserError("--text-from teacher given without --teacher; give one")
        if self.cache is not None and generates:
            raise UserError(
                "--cache given with generated text, which no cache can hold; leave out --cache, "
                "--on-policy or --text-from"
            )

    @property
    def teachers(self) -> tuple[str, ...]:
        """Return the teachers' names."""
        given = self.teacher or ""
        if Path(given).exists():  # a path may hold commas
            return (given,) if given else ()
        return tuple(name for name in given.split(",") if name)

    def _check_together(self, loss: Loss) -> None:
        """Raise ``UserError`` on options that would have no effect beside the others."""
        own = {f.name: f.default for f in dataclasses.fields(Quantization) if f.name != "bits"}
        changed = [name for name, default in own.items() if getattr(self, name) != default]
        if self.bits == "none" and changed:
            flag = changed[0].replace("_", "-")
            raise UserError(f"--{flag} given for a float student; give --bits too, or leave it out")
        words: list[tuple[str | None, Kind]] = [
            (self.mixture, "mixture"),
            (self.token_weight, "token_weight"),
            (self.correction, "correction"),
        ]
        for text, kind in words:
            if text is not None:
                parse_term(text, kind)
        seen = {
            "--token-weight": self.token_weight is not None,
            "--correction": self.correction is not None,
            "--top-k": self.top_k > 0,
            "--mixture": self.mixture != "mean",
        }
        crossed = bool(loss.of_kind("cross_tokenizer"))
        for flag, given in seen.items():
            cached = self.cache is not None and flag in ("--top-k", "--mixture")
            if given and (crossed or cached):
                what = "a cross-tokenizer objective" if crossed else "--cache"
                raise UserError(
                    f"{flag} given with {what}, which it does not apply to; leave it out"
                )
        if self.curriculum == "teacher" and (crossed or not self.teachers):
            raise UserError(
                "--curriculum teacher asks a live teacher of the same vocabulary what is easy; "
                "give one, or --curriculum length"
            )
        sampled = self.on_policy == 1 and self.sample_temperature == 1
        if any(term.entry.name == "policy_gradient" for term in loss.terms) and not sampled:
            raise UserError(
                "policy_gradient needs text that the student sampled; give --on-policy 1 and "
                "--sample-temperature 1, or another objective"
            )


def identity(o: Training) -> dict[str, Any]:
    """Return the options that make a run what it is; a resumed run must have the same."""
    kept = {k: v for k, v in dataclasses.asdict(o).items() if k not in _NOT_THE_RUN}
    return {k: _plain(v) for k, v in kept.items()}


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def policy_of(o: Quantization, model: Model) -> Policy | None:
    """Return the policy that the options ask for on this model, None for a float student."""
    if o.bits == "none":
        return None
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
