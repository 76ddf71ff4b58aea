"""The same step by transformers and PyTorch: eager or compiled, with autocast for bfloat16."""

from __future__ import annotations

import contextlib
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.nn.utils import parametrize

from benchmarks.torch_llama import device, llama
from benchmarks.training.shapes import CACHED, SHAPES

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
    where, vocabulary = device(), SHAPES[shape]["vocab_size"]
    student = llama(shape, cache=work == "on_policy")
    teacher = None
    if work not in ("ce", "cache"):
        teacher = llama(shape).eval()
        teacher.load_state_dict(student.state_dict())
        teacher.requires_grad_(False)
    if work == "kd_qat":
        for layer in student.model.layers.modules():
            if isinstance(layer, torch.nn.Linear):
                fake = FakeQuant(layer.weight, group)
                parametrize.register_parametrization(layer, "weight", fake, unsafe=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(0, vocabulary, (rows, seq_len), device=where)
    cached = None
    if work == "cache":
        some = torch.randn(rows * (seq_len - 1), CACHED, device=where)
        ids = torch.randint(0, vocabulary, some.shape, device=where)
        cached = (ids, log_softmax(torch.cat([some, some[:, :1]], 1), -1))
    cast = torch.autocast(where, torch.bfloat16)
    cast = cast if dtype == "bfloat16" else contextlib.nullcontext()

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        with cast:
            logits = student(tokens).logits[:, :-1].flatten(0, 1)
            if cached is not None:
                log_q = log_softmax(logits.float(), -1).gather(1, cached[0])
                tail = torch.log1p(-log_q.exp().sum(1, keepdim=True).clamp(max=1 - 1e-6))
                log_q = torch.cat([log_q, tail], 1)
                return kl_div(log_q, cached[1], log_target=True, reduction="batchmean")
            if teacher is None:
                return cross_entropy(logits.float(), tokens[:, 1:].flatten())
            with torch.no_grad():
                guide = teacher(tokens).logits[:, :-1].flatten(0, 1)
        log_p, log_q = log_softmax(guide.float(), -1), log_softmax(logits.float(), -1)
        return kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    made = torch.compile(loss) if compiled else loss

    def go() -> None:
        optimizer.zero_grad(set_to_none=True)
        text = tokens
        if work == "on_policy":
            asked = tokens[:, : seq_len // 2]
            with torch.no_grad(), cast:
                text = student.generate(
                    asked,
                    attention_mask=torch.ones_like(asked),
                    do_sample=True,
                    top_k=0,
                    max_new_tokens=seq_len - asked.shape[1],
                )
        made(text).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        if where == "cuda":
            torch.cuda.synchronize()

    return go, {}
