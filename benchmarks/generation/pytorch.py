"""The same by transformers and PyTorch."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.torch_llama import device, llama

MEMORY = Path(__file__).parents[2] / "jaxdistill" / "_memory.py"


def decode(
    *, shape: str, rows: int, prompt: int, new: int, weights: str
) -> tuple[Callable[[], None], dict[str, Any]]:
    """Continue prompts greedily by ``generate``; ``weights`` are ``float`` or ``bfloat16``."""
    runpy.run_path(str(MEMORY))["keep_pages"]()
    model = llama(shape, cache=True).eval()
    if weights == "bfloat16":
        model = model.to(torch.bfloat16)
    tokens = torch.randint(0, model.config.vocab_size, (rows, prompt), device=device())

    def go() -> None:
        with torch.inference_mode():
            model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=new,
            )
        if device() == "cuda":
            torch.cuda.synchronize()

    weigh = sum(p.nbytes for p in model.parameters()) / 2**20
    return go, {"weights_mib": weigh}


def score(*, shape: str, rows: int, seq_len: int) -> tuple[Callable[[], None], dict[str, Any]]:
    """Take the mean negative log-likelihood of a batch."""
    runpy.run_path(str(MEMORY))["keep_pages"]()
    model = llama(shape).eval()
    tokens = torch.randint(0, model.config.vocab_size, (rows, seq_len), device=device())

    def go() -> None:
        with torch.inference_mode():
            logits = model(tokens).logits[:, :-1].flatten(0, 1)
            float(cross_entropy(logits.float(), tokens[:, 1:].flatten()))

    return go, {}


def llama_cpp(
    *, shape: str, rows: int, prompt: int, new: int, weights: str
) -> tuple[Callable[[], None], dict[str, Any]]:
    """Continue one prompt greedily by llama.cpp, of a Q4_0 file with random blocks."""
    from benchmarks.generation.random_gguf import write

    try:
        from llama_cpp import Llama
    except ImportError:
        raise ImportError("llama-cpp-python is not there, which compiles for ten minutes") from None
    file = write(shape)
    threads = len(os.sched_getaffinity(0))
    model = Llama(
        str(file), n_ctx=prompt + new, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    ids = torch.randint(0, 1000, (prompt,)).tolist()

    def go() -> None:
        model.reset()
        made = model.generate(ids, temp=0.0, reset=True)
        for _ in range(new):
            next(made)

    return go, {"weights_mib": file.stat().st_size / 2**20}
