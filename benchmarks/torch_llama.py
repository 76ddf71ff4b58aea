"""A Llama of transformers at the shapes that are timed, with random weights."""

from __future__ import annotations

import os

import torch
import transformers

from benchmarks.training.shapes import SHAPES


def device() -> str:
    """Return where PyTorch runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def llama(shape: str, *, cache: bool = False) -> transformers.LlamaForCausalLM:
    """Build the model, and let PyTorch have as many threads as XLA takes."""
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    c = SHAPES[shape]
    config = transformers.LlamaConfig(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_hidden_layers=c["num_layers"],
        num_attention_heads=c["num_heads"],
        num_key_value_heads=c["num_kv_heads"],
        head_dim=c["head_dim"],
        tie_word_embeddings=True,
        use_cache=cache,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).to(device())
