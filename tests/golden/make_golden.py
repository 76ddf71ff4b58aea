"""Writes tiny random models of every supported family and the logits transformers gives for them.

    python tests/golden/make_golden.py

Needs torch and transformers. Each model becomes tests/golden/<name>/: an HF directory and
expected.npz with `tokens` [2, 48] and float32 `logits` [2, 48, V]. Every bias and norm weight is
random, so that each of them counts, and 48 tokens exceed the sliding window and the context that
the rotary scaling starts from.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

GOLDEN = Path(__file__).resolve().parent
TOKENS = (2, 48)

_SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large enough for attention to be far from uniform
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
# Head size 8 and theta 100: of the four wave lengths 6, 20, 63 and 199, llama3 scaling from a
# context of 32 keeps the first, blends the second and stretches the others.
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama3_scaled": lambda: transformers.LlamaConfig(
        **_SHAPE, rope_parameters=dict(_LLAMA3), tie_word_embeddings=True
    ),
    "llama_bias": lambda: transformers.LlamaConfig(
        **_SHAPE, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5
    ),
    "mistral_window": lambda: transformers.MistralConfig(**_SHAPE, sliding_window=7),
    "qwen2_tied": lambda: transformers.Qwen2Config(
        **_SHAPE,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    ),
    "qwen3_head_dim": lambda: transformers.Qwen3Config(**_SHAPE, head_dim=12),
}


def build(name: str, seed: int) -> transformers.PreTrainedModel:
    """Builds the named tiny model with random weights, float32, ready to evaluate."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def random_tokens(seed: int) -> np.ndarray:
    """Draws int32 token ids [2, 48]."""
    return np.random.default_rng(seed).integers(0, _SHAPE["vocab_size"], TOKENS, dtype=np.int32)


def logits_of(model: transformers.PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Runs a transformers model and returns float32 logits [B, T, V]."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()


def main() -> None:
    """Writes every model and its logits."""
    for seed, name in enumerate(CONFIGS):
        model, tokens = build(name, seed), random_tokens(seed)
        model.save_pretrained(GOLDEN / name)
        np.savez_compressed(
            GOLDEN / name / "expected.npz", tokens=tokens, logits=logits_of(model, tokens)
        )
        size = sum(p.stat().st_size for p in (GOLDEN / name).iterdir())
        print(f"{name}: {size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
