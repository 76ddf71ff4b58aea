"""stories260K, a real trained model of 260,032 parameters, read from its llama2.c files."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

import gguf
import numpy as np

from jaxdistill.models.config import ModelConfig
from jaxdistill.models.gguf_file import GGUFFile
from jaxdistill.models.gguf_tokenizer import tokenizer_from_gguf
from jaxdistill.models.hub import Model


def load_stories(folder: Path) -> Model:
    """Return the model of ``stories260K.bin`` and ``tok512.bin`` in a folder."""
    config, params = read_llama2c(folder / "stories260K.bin")
    with tempfile.TemporaryDirectory() as work:
        tokenizer = tokenizer_of(folder / "tok512.bin", Path(work))
    return Model(config=config, params=params, tokenizer=tokenizer, source="stories260K")


def read_llama2c(path):
    """Read a llama2.c version-0 file: 7 int32 of shape, then float32 arrays, ``[out, in]``."""
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, positions = struct.unpack("7i", data[:28])
    flat, at, hd = np.frombuffer(data[28:], "<f4"), 0, dim // heads

    def take(*shape):
        nonlocal at
        at += int(np.prod(shape))
        return flat[at - int(np.prod(shape)) : at].reshape(shape)

    def halves(w, n):
        """Reorder rotary rows from pairs (0, 1), (2, 3) to halves (0, hd/2), (1, hd/2 + 1)."""
        return w.reshape(layers, n, hd // 2, 2, dim).swapaxes(2, 3).reshape(layers, n * hd, dim)

    def kernel(w):
        return {"kernel": np.ascontiguousarray(w.swapaxes(1, 2))}

    kv = kv_heads * hd
    table, rms_att = take(vocab, dim), take(layers, dim)
    q, k = halves(take(layers, dim, dim), heads), halves(take(layers, kv, dim), kv_heads)
    v, o, rms_ffn = take(layers, kv, dim), take(layers, dim, dim), take(layers, dim)
    gate, down, up = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
    params = {
        "embed_tokens": {"embedding": table},
        "layers": {
            "input_layernorm": {"weight": rms_att},
            "post_attention_layernorm": {"weight": rms_ffn},
            "self_attn": {
                f"{n}_proj": kernel(w) for n, w in zip("qkvo", (q, k, v, o), strict=True)
            },
            "mlp": {"gate_proj": kernel(gate), "down_proj": kernel(down), "up_proj": kernel(up)},
        },
        "norm": {"weight": take(dim)},
    }
    config = ModelConfig(
        model_type="llama",
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hd,
        max_position_embeddings=positions,
        tie_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return config, params


def tokenizer_of(path, work):
    """Put the llama2.c tokenizer's pieces and scores into a GGUF header, and read them from it."""
    data, at, pieces, scores = path.read_bytes(), 4, [], []
    while at < len(data):
        score, length = struct.unpack("fi", data[at : at + 8])
        pieces.append(data[at + 8 : at + 8 + length].decode().strip("\n"))
        scores.append(score)
        at += 8 + length
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens = names + [piece.replace(" ", "▁") for piece in pieces[259:]]
    writer = gguf.GGUFWriter(work / "tokenizer.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokenizer_from_gguf(GGUFFile(work / "tokenizer.gguf"))
