"""Tests the GGUF writer: stored integers and scales come back exactly, and nothing half written."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.export import gguf as exporter
from jaxdistill.export.gguf import q4_0_blocks, q8_0_blocks, write_gguf
from jaxdistill.models.config import RopeScaling
from jaxdistill.models.gguf import read_gguf
from jaxdistill.models.gguf_file import GGUFFile
from jaxdistill.models.gguf_layout import llama3_factors
from jaxdistill.models.gguf_tokenizer import tokenizer_from_gguf
from jaxdistill.models.tokenizer import fingerprint
from tests.gguf_files import (
    TEXTS,
    byte_tokenizer,
    dequantized,
    float_params,
    interleaved,
    piece_fields,
    quantized_params,
    tiny_config,
    write_raw,
)
from tests.stored import changed

CONFIGS = {
    "llama": tiny_config(),
    "tied": tiny_config(tie_embeddings=True),
    "biases": tiny_config(qkv_bias=True, o_bias=True, mlp_bias=True),
    "wide heads": tiny_config(head_dim=32),
    "mistral": tiny_config("mistral", sliding_window=48),
    "qwen2": tiny_config("qwen2", tie_embeddings=True),
    "qwen3": tiny_config("qwen3", rms_norm_eps=1e-6),
    "linear": tiny_config(rope_scaling=RopeScaling(rope_type="linear", factor=4.0)),
    "llama3": tiny_config(
        head_dim=128,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    "several ends": tiny_config(eos_token_id=(1, 7, 9)),
}


def assert_same(got, want):
    """Two trees of arrays are equal bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_written_reads_back_bit_for_bit(config, group, tmp_path):
    params, tokenizer = quantized_params(config, group), byte_tokenizer()
    write_gguf(tmp_path / "m.gguf", config, params, tokenizer)
    got, weights, again = read_gguf(tmp_path / "m.gguf")
    assert got == config
    assert_same(weights, dequantized(params))
    assert fingerprint(again) == fingerprint(tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("group", [32, 64, None])
def test_integers_and_scales_are_the_stored_ones(group, tmp_path):
    config = tiny_config(hidden_size=128, intermediate_size=192)
    params = quantized_params(config, group)
    write_gguf(tmp_path / "m.gguf", config, params, byte_tokenizer())
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}

    def check(name, node, layer, bits, heads=None):
        q, scale = node["kernel_q"], node["kernel_scale"]
        q, scale = (q[layer], scale[layer]) if layer is not None else (q, scale)
        want_q = np.asarray(q).astype(np.int8).T  # [out, in]
        want_d = np.repeat(scale.T, want_q.shape[1] // 32 // scale.shape[0], axis=1)
        if heads:
            want_q, want_d = interleaved(want_q, heads), interleaved(want_d, heads)
        tensor = tensors[name]
        assert tensor.tensor_type.name == ("Q4_0" if bits == 4 else "Q8_0")
        assert list(tensor.shape) == [want_q.shape[1], want_q.shape[0]]
        blocks = tensor.data.reshape(*want_d.shape, -1)
        assert np.array_equal(blocks[..., :2].copy().view(np.float16)[..., 0], want_d)
        if bits == 8:
            got = blocks[..., 2:].view(np.int8)
        else:
            low, high = blocks[..., 2:] & 15, blocks[..., 2:] >> 4
            got = np.concatenate([low, high], axis=-1).astype(np.int8) - 8
        assert np.array_equal(got.reshape(want_q.shape), want_q)

    attention, mlp = params["layers"]["self_attn"], params["layers"]["mlp"]
    for i in range(config.num_layers):
        check(f"blk.{i}.attn_q.weight", attention["q_proj"], i, 4, config.num_heads)
        check(f"blk.{i}.attn_k.weight", attention["k_proj"], i, 4, config.num_kv_heads)
        check(f"blk.{i}.attn_v.weight", attention["v_proj"], i, 4)
        check(f"blk.{i}.attn_output.weight", attention["o_proj"], i, 4)
        check(f"blk.{i}.ffn_gate.weight", mlp["gate_proj"], i, 4)
        check(f"blk.{i}.ffn_up.weight", mlp["up_proj"], i, 4)
        check(f"blk.{i}.ffn_down.weight", mlp["down_proj"], i, 4)
    check("output.weight", params["lm_head"], None, 8)
    names = {t.name for t in tensors.values() if t.tensor_type.name == "F32"}
    assert names == {n for n in tensors if "norm" in n}


@pytest.mark.parametrize(("pack", "bits"), [(q4_0_blocks, 4), (q8_0_blocks, 8)])
def test_blocks_dequantize_to_scale_times_integer(pack, bits):
    top = 2 ** (bits - 1)
    q = np.arange(-top, top, dtype=np.int8).repeat(max(1, 64 // (2 * top))).reshape(2, -1)
    d = np.float16([0.5, -0.25, 6e-5, 0, 1000, 1, 2, 3])[: q.size // 32].reshape(2, -1)
    kind = gguf.GGMLQuantizationType.Q4_0 if bits == 4 else gguf.GGMLQuantizationType.Q8_0
    got = gguf.quants.dequantize(pack(q, d), kind)
    assert np.array_equal(got, q * np.repeat(d.astype(np.float32), 32, axis=1))


def test_float_leaves_and_integers_may_be_mixed(tmp_path):
    config = tiny_config()
    params, whole = quantized_params(config), float_params(config)
    params["layers"]["self_attn"]["v_proj"] = whole["layers"]["self_attn"]["v_proj"]
    params["embed_tokens"] = whole["embed_tokens"]
    half = whole["layers"]["self_attn"]["k_proj"]["kernel"].astype(ml_dtypes.bfloat16)
    params["layers"]["self_attn"]["k_proj"] = {"kernel": jnp.asarray(half)}
    write_gguf(tmp_path / "m.gguf", config, params, byte_tokenizer())
    want = dequantized(params)
    want["layers"]["self_attn"]["k_proj"]["kernel"] = half.astype(np.float32)
    assert_same(read_gguf(tmp_path / "m.gguf")[1], want)


@pytest.mark.parametrize(
    ("make", "kind"), [(quantized_params, "MOSTLY_Q4_0"), (float_params, "ALL_F32")]
)
def test_the_metadata_is_what_llama_cpp_and_transformers_look_for(make, kind, tmp_path):
    config = tiny_config(intermediate_size=992, eos_token_id=(1, 7))  # mostly 4-bit
    tokenizer = byte_tokenizer(bos=True)
    write_gguf(tmp_path / "m.gguf", config, make(config), tokenizer, name="A tiny model")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    value = {k: f.contents() for k, f in reader.fields.items()}
    vocab = value.pop("tokenizer.ggml.tokens")
    types = value.pop("tokenizer.ggml.token_type")
    assert value.pop("tokenizer.ggml.merges")[0] == "h e"
    assert value.pop("tokenizer.chat_template") == tokenizer.chat_template
    assert value.pop("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert {k: v for k, v in value.items() if not k.startswith("GGUF.")} == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "A tiny model",
        "general.file_type": gguf.LlamaFileType[kind],
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 992,
        "llama.vocab_size": 320,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 50000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 7,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    size = len(tokenizer)
    assert len(vocab) == len(types) == config.vocab_size  # one entry per embedding row
    assert vocab[:2] == ["<|bos|>", "<|eos|>"] and types[:2] == [3, 3]
    assert vocab[size - 2 : size] == ["<think>", "</think>"] and types[size - 2 : size] == [4, 4]
    assert vocab[size:] == [f"[PAD{i}]" for i in range(size, 320)] and set(types[size:]) == {5}


def test_llama3_scaling_is_written_as_its_factors(tmp_path):
    config = CONFIGS["llama3"]
    write_gguf(tmp_path / "m.gguf", config, quantized_params(config), byte_tokenizer())
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    want = llama3_factors(128, 500000.0, config.rope_scaling)
    assert want.min() == 1 and want.max() == 8
    assert np.array_equal(tensors["rope_freqs.weight"].data, want)


def test_a_tokenizer_survives_with_its_bos_and_templates(tmp_path):
    config, tokenizer = tiny_config(), byte_tokenizer(bos=True)
    tokenizer.chat_template = {"default": "A", "tool_use": "B"}
    write_gguf(tmp_path / "m.gguf", config, quantized_params(config), tokenizer)
    again = read_gguf(tmp_path / "m.gguf")[2]
    assert again.chat_template == tokenizer.chat_template
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"], text


def test_a_sentence_piece_tokenizer_survives(tmp_path):
    raw = write_raw(tmp_path / "t.gguf", "llama", tokenizer=piece_fields())
    tokenizer = tokenizer_from_gguf(GGUFFile(raw))
    config = tiny_config(bos_token_id=1, eos_token_id=2)
    write_gguf(tmp_path / "m.gguf", config, quantized_params(config), tokenizer)
    again = read_gguf(tmp_path / "m.gguf")[2]
    assert fingerprint(again) == fingerprint(tokenizer)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert "tokenizer.ggml.merges" not in fields  # the scores say the same
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[:4] == [2, 3, 3, 6] and types[259] == 1
    for text in ("the other theater", " a  cat. é😀 ", ""):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_merges_that_scores_cannot_say_are_written_beside_them(tmp_path):
    raw = write_raw(tmp_path / "t.gguf", "llama", tokenizer=piece_fields(merges=["h e", "t he"]))
    tokenizer = tokenizer_from_gguf(GGUFFile(raw))
    assert tokenizer.tokenize("the cat") == ["▁", "the", "▁", "c", "a", "t"]
    config = tiny_config(bos_token_id=1, eos_token_id=2)
    write_gguf(tmp_path / "m.gguf", config, quantized_params(config), tokenizer)
    assert fingerprint(read_gguf(tmp_path / "m.gguf")[2]) == fingerprint(tokenizer)


def test_two_layers_of_a_real_model_are_written_and_read_back(smollm2_path, tmp_path):
    config, params, tokenizer = read_gguf(smollm2_path)
    config = dataclasses.replace(config, num_layers=2)
    params["layers"] = jax.tree.map(lambda x: x[:2], params["layers"])
    node = params["layers"]["mlp"]["up_proj"]
    scale = np.abs(node.pop("kernel")).max(axis=1, keepdims=True) / 7
    rng = np.random.default_rng(0)
    node["kernel_q"] = rng.integers(-8, 8, (2, 576, 1536)).astype(ml_dtypes.int4)
    node["kernel_scale"] = scale.astype(np.float16)
    write_gguf(tmp_path / "m.gguf", config, params, tokenizer)
    got, weights, again = read_gguf(tmp_path / "m.gguf")
    assert got == config
    assert fingerprint(again) == fingerprint(tokenizer)
    assert again.chat_template == tokenizer.chat_template
    assert_same(weights, dequantized(params))


# ---------------------------------------------------------------- what is refused

UP = "layers/mlp/up_proj"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{UP}/kernel_q", np.zeros((2, 64, 96), np.int16), "mlp/up_proj/kernel_q' has type int16"),
        (
            f"{UP}/kernel_q",
            np.zeros((2, 64, 96), ml_dtypes.uint4),
            "up_proj/kernel_q' has type uint4; accepted in GGUF: int4",
        ),
        (f"{UP}/kernel_q", np.zeros((2, 96, 64), np.int8), r"accepted: \(2, 64, 96\)"),
        (f"{UP}/kernel_scale", np.ones((2, 4, 96), np.float16), "groups of 16 inputs do not fit"),
        (f"{UP}/kernel_scale", np.ones((2, 3, 96), np.float16), "groups of 21 inputs do not fit"),
        (f"{UP}/kernel_scale", np.ones((2, 96), np.float16), r"accepted: \(2, 1, 96\)"),
        (f"{UP}/kernel_scale", np.full((2, 2, 96), 0.1, np.float32), "are not float16 values"),
        (f"{UP}/kernel_scale", None, "kernel_scale' is missing beside its integers"),
        (f"{UP}/kernel_q", None, "up_proj/kernel' is in its training form"),
        (f"{UP}/kernel_zero", np.zeros(3), "up_proj/kernel_zero' has no place in a GGUF"),
        (f"{UP}/lora_a", np.zeros(3), "up_proj/lora_a' has no place in a GGUF llama file"),
        ("norm/weight", None, "parameter 'norm/weight' is missing"),
        ("norm/weight", np.ones(64, np.int32), "'norm/weight' has type int32; accepted: float32"),
        ("lm_head", None, "parameter 'lm_head/kernel' is missing"),
        ("embed_tokens/embedding_scale", np.ones((320, 4), np.float16), "groups of 16 inputs"),
    ],
)
def test_parameters_that_do_not_fit_are_named(path, value, message, tmp_path):
    config = tiny_config()
    params = changed(quantized_params(config), path, value)
    with pytest.raises(UserError, match=message) as e:
        write_gguf(tmp_path / "m.gguf", config, params, byte_tokenizer())
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_inputs_that_do_not_divide_into_blocks_are_named(tmp_path):
    config = tiny_config(intermediate_size=80)
    params = quantized_params(config, group=None)
    with pytest.raises(UserError, match="down_proj/kernel_scale.*80 inputs do not divide"):
        write_gguf(tmp_path / "m.gguf", config, params, byte_tokenizer())


def test_tokenizers_that_do_not_fit_are_named(tmp_path):
    config = tiny_config()
    params = quantized_params(config)
    with pytest.raises(UserError, match="needs a tokenizer"):
        write_gguf(tmp_path / "m.gguf", config, params, None)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"extra {i}" for i in range(100)])
    with pytest.raises(UserError, match="ids reach 374 but the model has 320 embedding rows"):
        write_gguf(tmp_path / "m.gguf", config, params, tokenizer)
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = None
    with pytest.raises(UserError, match="cannot be written to GGUF"):
        write_gguf(tmp_path / "m.gguf", config, params, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    config = tiny_config()
    path = tmp_path / "m.gguf"
    write_gguf(path, config, quantized_params(config), byte_tokenizer())
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter, "q8_0_blocks", full)
    with pytest.raises(UserError, match="cannot write .*No space left"):
        write_gguf(path, config, quantized_params(config, seed=1), byte_tokenizer())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(exporter, "q8_0_blocks", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_gguf(path, config, quantized_params(config, seed=1), byte_tokenizer())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_paths_that_cannot_be_written_are_named(tmp_path):
    config = tiny_config()
    params, tokenizer = quantized_params(config), byte_tokenizer()
    with pytest.raises(UserError, match="is a directory; give the path of a .gguf file"):
        write_gguf(tmp_path, config, params, tokenizer)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_gguf(tmp_path / "file" / "m.gguf", config, params, tokenizer)
    write_gguf(tmp_path / "new" / "folder" / "m.gguf", config, params, tokenizer)
    assert (tmp_path / "new" / "folder" / "m.gguf").is_file()
