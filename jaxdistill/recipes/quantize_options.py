"""The options of a quantization run, checked, and the policy that they ask for."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxdistill.errors import UserError
from jaxdistill.models.hub import Model
from jaxdistill.quant.activations import ActivationSpec
from jaxdistill.quant.calibrate import Method
from jaxdistill.quant.lattice import QuantSpec, Ranges
from jaxdistill.quant.policy import Policy, default_policy


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
    ptq: Literal["rtn"] | Method = "rtn"
    """Where the student starts: rtn rounds each weight, gptq and awq look at training text too."""
    freeze: str = "ov"
    """Left untrained, and snapped onto its lattice: ov (v_proj and o_proj), none, auto (what
    the signal analysis of this model recommends), or a regex over parameter paths; weights trains
    learned ranges alone."""
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
    signal_every: int = 0
    """Steps between looks at gradients, SQNR, clipping and flips of each projection, written to
    signal.jsonl; 0 for at most eight in a run, under 5 % of its time; -1 for none."""
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
            "signal_every": -1,
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
