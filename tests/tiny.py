"""Tiny models, params and batches for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jaxdistill._checksums import MANIFEST
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import init_params
from jaxdistill.models.hf import save_hf

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def config(**changes: Any) -> ModelConfig:
    """A Llama of two layers, 64 wide, with grouped queries."""
    base: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_embeddings": True,
    }
    return ModelConfig(**(base | changes))


def params(c: ModelConfig, seed: int = 0, spread: float = 8.0) -> dict[str, Any]:
    """Random params with weights large enough for peaked logits."""
    return jax.tree.map(
        lambda x: x * spread if x.ndim > 1 and x.shape[-1] > 1 else x,
        init_params(c, jax.random.key(seed)),
    )


def batch(c: ModelConfig, rows: int = 4, seq_len: int = 16, seed: int = 0) -> dict[str, Any]:
    """Random tokens, two segments a row, the last two places padding."""
    rng = np.random.default_rng(seed)
    half = seq_len // 2
    segments = np.repeat([[1] * half + [2] * (half - 2) + [0] * 2], rows, axis=0)
    positions = np.repeat([[*range(half), *range(half - 2), 0, 0]], rows, axis=0)
    mask = (segments > 0) & (positions > 0)
    return {
        "tokens": jnp.asarray(rng.integers(0, c.vocab_size, (rows, seq_len)), jnp.int32),
        "loss_mask": jnp.asarray(mask),
        "segment_ids": jnp.asarray(segments, jnp.int32),
        "positions": jnp.asarray(positions, jnp.int32),
    }


def byte_tokenizer(template: str | None = CHATML, bos: bool = False, eos: bool = True):
    """Makes a byte-level tokenizer of one token a byte, plus a few special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"</s>": 0, "<s>": 1} | {letter: i for i, letter in enumerate(alphabet, 2)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>" if eos else None,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=template,
        model_max_length=8,  # longer texts must neither warn nor be cut
    )


def save_model(directory: Path, seed: int = 0, **changes: Any) -> str:
    """Write a tiny model with a byte-level tokenizer as an HF directory."""
    c = config(**({"vocab_size": 260, "eos_token_id": 0, "bos_token_id": 1} | changes))
    save_hf(directory, c, params(c, seed), byte_tokenizer())
    (directory / MANIFEST).unlink()  # as other programs write it: tests change its files
    return str(directory)


def save_text(path: Path, rows: int = 40) -> str:
    """Write rows of text, each different, as JSON lines."""
    texts = (f"row {i}: " + "the quick brown fox jumps over the dog. " * 3 for i in range(rows))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)
