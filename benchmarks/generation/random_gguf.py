"""A Llama of random 4-bit blocks as a GGUF file, for llama.cpp to be timed with."""

from __future__ import annotations

import tempfile
from pathlib import Path

import gguf
import numpy as np

from benchmarks.training.shapes import SHAPES


def write(shape: str) -> Path:
    """Write the file to a temporary folder: Q4_0 kernels, a tied Q8_0 table, no vocabulary."""
    c = SHAPES[shape]
    file = Path(tempfile.mkdtemp()) / f"{shape}.gguf"
    out, rng = gguf.GGUFWriter(file, "llama"), np.random.default_rng(0)
    out.add_block_count(c["num_layers"])
    out.add_context_length(8192)
    out.add_embedding_length(c["hidden_size"])
    out.add_feed_forward_length(c["intermediate_size"])
    out.add_head_count(c["num_heads"])
    out.add_head_count_kv(c["num_kv_heads"])
    out.add_rope_dimension_count(c["head_dim"])
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(c["vocab_size"])
    out.add_tokenizer_model("no_vocab")

    def quantized(name: str, rows: int, columns: int, kind: gguf.GGMLQuantizationType) -> None:
        w = rng.standard_normal((rows, columns), np.float32) * 0.02
        out.add_tensor(name, gguf.quantize(w, kind), raw_dtype=kind)

    d, kv = c["hidden_size"], c["num_kv_heads"] * c["head_dim"]
    q, ff = c["num_heads"] * c["head_dim"], c["intermediate_size"]
    kernels = {
        "attn_q": (q, d),
        "attn_k": (kv, d),
        "attn_v": (kv, d),
        "attn_output": (d, q),
        "ffn_gate": (ff, d),
        "ffn_up": (ff, d),
        "ffn_down": (d, ff),
    }
    quantized("token_embd.weight", c["vocab_size"], d, gguf.GGMLQuantizationType.Q8_0)
    for i in range(c["num_layers"]):
        for name, size in kernels.items():
            quantized(f"blk.{i}.{name}.weight", *size, gguf.GGMLQuantizationType.Q4_0)
        for name in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"blk.{i}.{name}.weight", np.ones(d, np.float32))
    out.add_tensor("output_norm.weight", np.ones(d, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file
