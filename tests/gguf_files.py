"""Makes tiny models, tokenizers and hand-written GGUF files for the tests."""

from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxdistill.models.config import ModelConfig

TEXTS = [
    "hello hello",
    " Hello there, 1234 and 5.6!  two  spaces\n\n\nlines\r\n\ttab ",
    "def f(x):\n    return x**2  # code's comment, don't",
    "naïve café über 中文 日本語 😀 emoji, ½ Ⅷ ٣",
    "<|bos|>hello<|eos|> <think>hm</think>",
    "",
]
SPECIALS = ["<|bos|>", "<|eos|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "t h", "Ġ t", "Ġt h", "1 2", "3 4", "12 34"]
MERGES += ["Ċ Ċ", "Ġ Ġ", "' t", "c o"]
TEMPLATE = "{% for m in messages %}<|bos|>{{ m['content'] }}<|eos|>{% endfor %}"
VOCAB = 320


def byte_tokens() -> tuple[list[str], list[int]]:
    """Tokens and GGUF types of a tiny byte-level vocabulary: 2 special, 2 user-defined."""
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [m.replace(" ", "") for m in MERGES] + ["<think>", "</think>"]
    kinds = {"<think>": 4, "</think>": 4} | dict.fromkeys(SPECIALS, 3)
    return tokens, [kinds.get(t, 1) for t in tokens]


def byte_tokenizer(
    pre_tokenizer: Any = None, bos: bool = False, **model: Any
) -> PreTrainedTokenizerFast:
    """The same vocabulary as an HF tokenizer (GPT-2's way of cutting text unless told)."""
    tokens, types = byte_tokens()
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = [tuple(m.split(" ")) for m in MERGES]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, **model))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind != 1:
            added = tokenizers.AddedToken(token, normalized=False, special=kind == 3)
            (backend.add_special_tokens if kind == 3 else backend.add_tokens)([added])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|eos|>",
        add_bos_token=bos,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def byte_fields(pre: str | None = "gpt-2", **fields: Any) -> dict[str, Any]:
    """GGUF metadata of the byte-level vocabulary, without the leading `tokenizer.ggml.`."""
    tokens, types = byte_tokens()
    base = {"model": "gpt2", "tokens": tokens, "token_type": types, "merges": MERGES}
    base |= {"bos_token_id": 0, "eos_token_id": 1} | ({"pre": pre} if pre else {})
    return base | fields


def piece_fields(**fields: Any) -> dict[str, Any]:
    """GGUF metadata of a tiny SentencePiece vocabulary; scores rank the merges."""
    pieces = ["▁t", "he", "▁the", "er", "in", "▁a", "▁th", "at", "the", "▁c", "▁cat", "▁he", "the▁"]
    letters = ["▁", *"etainhrcso."]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces, *letters]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(letters))
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) + len(letters))]
    base = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types}
    return base | {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | fields


def add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds one metadata value under the GGUF type that its Python type suggests."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def write_raw(
    path: Path,
    arch: str,
    fields: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    tokenizer: dict[str, Any] | None = None,
    kind: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """Writes a GGUF file with the `gguf` package alone; matrices in `kind` where it is given."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (fields or {}).items():
        add_field(writer, key if key.startswith("split") else f"{arch}.{key}", value)
    for key, value in (tokenizer or {}).items():
        add_field(writer, key if key.startswith("tokenizer.") else f"tokenizer.ggml.{key}", value)
    for name, x in (tensors or {}).items():
        if kind is None or x.ndim == 1:
            writer.add_tensor(name, x)
        else:
            writer.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_config(model_type: str = "llama", **changes: Any) -> ModelConfig:
    """A two-layer model whose query, key and hidden widths all differ."""
    base: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32 if model_type == "qwen3" else 16,
        "max_position_embeddings": 128,
        "rope_theta": 50000.0,
        "qkv_bias": model_type == "qwen2",
        "qk_norm": model_type == "qwen3",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return ModelConfig(**(base | changes))


def float_params(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Random float32 parameters in the contract's layout."""
    rng = np.random.default_rng(seed)
    c, L = config, config.num_layers

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    def linear(wide: int, out: int, bias: bool) -> dict[str, np.ndarray]:
        return {"kernel": normal(L, wide, out)} | ({"bias": normal(L, out)} if bias else {})

    D, F, q, kv = c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads
    q, kv = q * c.head_dim, kv * c.head_dim
    attention: dict[str, Any] = {
        "q_proj": linear(D, q, c.qkv_bias),
        "k_proj": linear(D, kv, c.qkv_bias),
        "v_proj": linear(D, kv, c.qkv_bias),
        "o_proj": linear(q, D, c.o_bias),
    }
    if c.qk_norm:
        attention |= {n: {"weight": normal(L, c.head_dim)} for n in ("q_norm", "k_norm")}
    params: dict[str, Any] = {
        "embed_tokens": {"embedding": normal(c.vocab_size, D)},
        "layers": {
            "self_attn": attention,
            "mlp": {
                "gate_proj": linear(D, F, c.mlp_bias),
                "up_proj": linear(D, F, c.mlp_bias),
                "down_proj": linear(F, D, c.mlp_bias),
            },
            "input_layernorm": {"weight": normal(L, D)},
            "post_attention_layernorm": {"weight": normal(L, D)},
        },
        "norm": {"weight": normal(D)},
    }
    if not c.tie_embeddings:
        params["lm_head"] = {"kernel": normal(D, c.vocab_size)}
    return params


def quantized_params(config: ModelConfig, group: int | None = 32, seed: int = 0) -> dict[str, Any]:
    """Random parameters in their stored form: 4-bit projections, 8-bit head and table."""
    rng = np.random.default_rng(seed)
    params = float_params(config, seed)

    def integers(shape: tuple[int, ...], bits: int) -> Any:
        top = 2 ** (bits - 1)
        q = rng.integers(-top, top, shape).astype(np.int8)
        return jnp.asarray(q, jnp.int4 if bits == 4 else jnp.int8)

    def scales(*shape: int) -> np.ndarray:
        return rng.uniform(0.001, 0.1, shape).astype(np.float16)

    def kernel(node: dict[str, Any], bits: int) -> None:
        *lead, wide, out = node.pop("kernel").shape
        node["kernel_q"] = integers((*lead, wide, out), bits)
        node["kernel_scale"] = scales(*lead, wide // (group or wide), out)

    for part in ("self_attn", "mlp"):
        for name, node in params["layers"][part].items():
            if name.endswith("_proj"):
                kernel(node, 4)
    if "lm_head" in params:
        kernel(params["lm_head"], 8)
    rows, wide = params["embed_tokens"].pop("embedding").shape
    params["embed_tokens"] = {
        "embedding_q": integers((rows, wide), 8),
        "embedding_scale": scales(rows, wide // (group or wide)),
    }
    return params


def dequantized(params: dict[str, Any]) -> dict[str, Any]:
    """scale * q of every quantized node, in float32; other leaves as they are."""
    if "kernel_q" in params:
        q, scale = np.asarray(params["kernel_q"]), np.asarray(params["kernel_scale"], np.float32)
        kernel = q.astype(np.float32) * np.repeat(scale, q.shape[-2] // scale.shape[-2], axis=-2)
        return {"kernel": kernel} | {k: v for k, v in params.items() if k == "bias"}
    if "embedding_q" in params:
        q = np.asarray(params["embedding_q"]).astype(np.float32)
        scale = np.asarray(params["embedding_scale"], np.float32)
        return {"embedding": q * np.repeat(scale, q.shape[1] // scale.shape[1], axis=1)}
    return {k: dequantized(v) if isinstance(v, dict) else v for k, v in params.items()}


def interleaved(x: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's order of query and key rows, written out row by row: pair i is rows 2i and 2i + 1."""
    size = x.shape[0] // heads
    order = []
    for head in range(heads):
        for i in range(size // 2):
            order += [head * size + i, head * size + i + size // 2]
    return x[order]


def raw_tensors(config: ModelConfig, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a GGUF file that holds these float parameters, made by plain loops."""
    out = {
        "token_embd.weight": params["embed_tokens"]["embedding"],
        "output_norm.weight": params["norm"]["weight"],
    }
    if "lm_head" in params:
        out["output.weight"] = np.ascontiguousarray(params["lm_head"]["kernel"].T)
    attention, mlp = params["layers"]["self_attn"], params["layers"]["mlp"]
    nodes = {f"attn_{n}": attention[f"{n}_proj"] for n in "qkv"}
    nodes |= {"attn_output": attention["o_proj"]}
    nodes |= {f"ffn_{n}": mlp[f"{n}_proj"] for n in ("gate", "up", "down")}
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    norms = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    for i in range(config.num_layers):
        for name, node in nodes.items():
            parts = {"weight": np.ascontiguousarray(node["kernel"][i].T)}
            parts |= {"bias": node["bias"][i]} if "bias" in node else {}
            for leaf, x in parts.items():
                if name in heads and config.model_type in ("llama", "mistral"):
                    x = interleaved(x, heads[name])
                out[f"blk.{i}.{name}.{leaf}"] = x
        for name, path in norms.items():
            out[f"blk.{i}.{name}.weight"] = params["layers"][path]["weight"][i]
        if config.qk_norm:
            for n in "qk":
                out[f"blk.{i}.attn_{n}_norm.weight"] = attention[f"{n}_norm"]["weight"][i]
    return out


def raw_fields(config: ModelConfig) -> dict[str, Any]:
    """The hyper-parameters of a GGUF file, without the leading architecture."""
    c = config
    return {
        "block_count": c.num_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": c.rope_theta,
    }
