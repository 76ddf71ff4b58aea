"""What training costs: floating point operations, counted from the shapes, and the devices."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import re

from jaxdistill.errors import UserError
from jaxdistill.models.attention import QUERIES
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import Remat
from jaxdistill.models.hf_layout import hf_layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """Describe one accelerator: dense bfloat16 peak in FLOP/s, and memory in bytes."""

    name: str
    peak_flops: float
    memory: int


def devices() -> dict[str, Device]:
    """Return the known accelerators by their short names; ``devices.json`` names the sources."""
    file = importlib.resources.files("jaxdistill.evals") / "devices.json"
    return {
        key: Device(name=d["name"], peak_flops=d["tflops"] * 1e12, memory=int(d["gib"] * 2**30))
        for key, d in json.loads(file.read_text()).items()
        if key != "_"
    }


def device(name: str) -> Device:
    """Return an accelerator; raise ``UserError`` where it is not known."""
    known = devices()
    if name not in known:
        raise UserError(f"device {name!r} given; accepted: {', '.join(known)}")
    return known[name]


def matrix_params(config: ModelConfig, pattern: str = "") -> int:
    """Count the weights of the linear layers whose path a regex is found in; by default of all.

    The vocabulary head counts, tied or not; the table that is looked up in does not.
    """
    head = config.vocab_size * config.hidden_size
    total = head if re.search(pattern, "lm_head/kernel") else 0
    for t in hf_layout(config):
        path = "/".join(t.path)
        if t.layer is not None and t.path[-1] == "kernel" and re.search(pattern, path):
            total += t.shape[0] * t.shape[1]
    return total


def forward_flops(config: ModelConfig, seq_len: int) -> float:
    """Return the forward pass's FLOPs a token: ``2 N + 4 L T H / 2``.

    N are the weights of the linear layers, H the width of all query heads; a token attends to half
    of its T on average (PaLM, arXiv 2204.02311, appendix B, there without the half).
    """
    window = min(seq_len, config.sliding_window or seq_len)
    attended = window if window < seq_len else seq_len / 2
    width = config.num_heads * config.head_dim
    return 2.0 * matrix_params(config) + 4.0 * config.num_layers * width * attended


def training_flops(
    student: ModelConfig,
    seq_len: int,
    *,
    teacher: ModelConfig | None = None,
    frozen: str | None = None,
    remat: Remat = "none",
) -> dict[str, float]:
    """Return FLOPs a token of a distillation step.

    Args:
        student: its shape.
        seq_len: T.
        teacher: a live teacher's shape, which runs forward alone.
        frozen: regex over paths whose weight gradients are not computed (ov-freeze).
        remat: of the student, see ``make_apply``.

    Returns:
        ``model``: student forward and backward (twice the forward, less what is frozen) and teacher
        forward, what a model FLOPs utilisation counts; ``hardware``: and what remat adds.
    """
    own = forward_flops(student, seq_len)
    saved = 2.0 * matrix_params(student, frozen) if frozen else 0.0
    model = 3 * own - saved + (forward_flops(teacher, seq_len) if teacher else 0.0)
    linear = 2.0 * matrix_params(student)
    head = 2.0 * student.vocab_size * student.hidden_size
    scores = (own - linear) / 2  # half of attention's products; in blocks they are made again
    in_blocks = scores if seq_len > QUERIES else 0.0
    last = 2.0 * student.num_layers * student.intermediate_size * student.hidden_size
    # Of a layer made again from its input the last product is not needed.
    again = {"none": in_blocks, "minimal": scores, "full": own - head - last + in_blocks}[remat]
    return {"model": model, "hardware": model + again}
