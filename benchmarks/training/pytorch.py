"""The same step by transformers and PyTorch: eager or compiled, with autocast for bfloat16."""

from __future__ import annotations

import contextlib
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.nn.utils import parametrize

from benchmarks.training.shapes import SHAPES

MEMORY = Path(__file__).parents[2] / "jaxdistill" / "_memory.py"


class FakeQuant(torch.nn.Module):
    """Round a linear layer's weight ``[out, in]`` to 4 bits, straight through."""

    def __init__(self, weight: torch.Tensor, group: int | None) -> None:
        super().__init__()
        self.group = group or weight.shape[1]
        scale = weight.detach().reshape(weight.shape[0], -1, self.group).abs().amax(-1) / 7
        self.register_buffer("scale", scale[..., None])

    def forward(self, weight):
        v = weight.reshape(weight.shape[0], -1, self.group) / self.scale
        rounded = torch.clamp(torch.round(v), -8, 7)
        inside = (v >= -8) & (v <= 7)
        through = torch.where(inside, v, v.detach())
        value = (through + (rounded - through).detach()) * self.scale
        return value.reshape(weight.shape)


def step(
    *,
    shape: str,
    work: str,
    rows: int,
    seq_len: int,
    dtype: str = "float32",
    group: int | None = None,
    compiled: bool = False,
    keep: bool = False,
) -> tuple[Callable[[], None], dict[str, Any]]:
    """Build a step; see ``ours.step``. The table stays in float here, which is less work.

    With ``keep`` PyTorch has the allocator's settings that ours has.
    """
    if keep:
        runpy.run_path(str(MEMORY))["keep_pages"]()
    c = SHAPES[shape]
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as XLA takes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.LlamaConfig(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_hidden_layers=c["num_layers"],
        num_attention_heads=c["num_heads"],
        num_key_value_heads=c["num_kv_heads"],
        head_dim=c["head_dim"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    student = transformers.LlamaForCausalLM(config).to(device)
    teacher = None
    if work != "ce":
        teacher = transformers.LlamaForCausalLM(config).to(device).eval()
        teacher.load_state_dict(student.state_dict())
        teacher.requires_grad_(False)
    if work == "kd_qat":
        for layer in student.model.layers.modules():
            if isinstance(layer, torch.nn.Linear):
                fake = FakeQuant(layer.weight, group)
                parametrize.register_parametrization(layer, "weight", fake, unsafe=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(0, c["vocab_size"], (rows, seq_len), device=device)
    cast = (
        torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
    )

    def loss() -> torch.Tensor:
        with cast:
            logits = student(tokens).logits[:, :-1].flatten(0, 1)
            if teacher is None:
                return cross_entropy(logits.float(), tokens[:, 1:].flatten())
            with torch.no_grad():
                guide = teacher(tokens).logits[:, :-1].flatten(0, 1)
        log_p, log_q = log_softmax(guide.float(), -1), log_softmax(logits.float(), -1)
        return kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    made = torch.compile(loss) if compiled else loss

    def go() -> None:
        optimizer.zero_grad(set_to_none=True)
        made().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return go, {}
