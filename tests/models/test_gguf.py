"""Tests the GGUF reader on files written with the `gguf` package alone, and on damaged ones."""

import struct

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from jaxdistill.errors import UserError
from jaxdistill.models.config import RopeScaling
from jaxdistill.models.gguf import read_gguf
from jaxdistill.models.gguf_layout import llama3_factors, permute_rows, unpermute_rows
from jaxdistill.models.rope import rope_frequencies
from tests.gguf_files import (
    byte_fields,
    float_params,
    interleaved,
    raw_fields,
    raw_tensors,
    tiny_config,
    write_raw,
)

CONFIGS = {
    "llama": tiny_config(),
    "tied": tiny_config(tie_embeddings=True),
    "biases": tiny_config(qkv_bias=True, o_bias=True, mlp_bias=True),
    "wide heads": tiny_config(head_dim=32),
    "mistral": tiny_config("mistral", sliding_window=48),
    "qwen2": tiny_config("qwen2", tie_embeddings=True),
    "qwen3": tiny_config("qwen3", rms_norm_eps=1e-6),
}


def assert_same(got, want):
    """Two trees of arrays are equal bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, path
        assert np.array_equal(a, b), path


def write_model(path, config, params, kind=None, tensors=(), tokenizer=None, **fields):
    arch = "llama" if config.model_type == "mistral" else config.model_type
    window = {"attention.sliding_window": config.sliding_window} if config.sliding_window else {}
    return write_raw(
        path,
        arch,
        {k: v for k, v in (raw_fields(config) | window | fields).items() if v is not None},
        {k: v for k, v in (raw_tensors(config, params) | dict(tensors)).items() if v is not None},
        byte_fields() if tokenizer is None else tokenizer,
        kind,
    )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_float_models_of_every_architecture(config, tmp_path):
    params = float_params(config)
    got, weights, tokenizer = read_gguf(write_model(tmp_path / "m.gguf", config, params))
    assert got == config
    assert_same(weights, params)
    assert tokenizer("hello")["input_ids"]
    assert all(x.flags["C_CONTIGUOUS"] and x.flags["OWNDATA"] for x in jax.tree.leaves(weights))


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_every_type_is_dequantized_to_float32(name, tmp_path):
    config, kind = tiny_config(), GGMLQuantizationType[name]
    params = float_params(config)
    _, got, _ = read_gguf(write_model(tmp_path / "m.gguf", config, params, kind))

    def rounded(x):  # [rows, in]
        return gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)

    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    for module in ("self_attn", "mlp"):
        for name, node in params["layers"][module].items():
            for i, kernel in enumerate(node["kernel"]):
                rows = np.ascontiguousarray(kernel.T)
                want = rounded(rows)
                if name in heads:  # the same, row for row, in any order of the rows
                    assert np.array_equal(
                        interleaved(want, heads[name]), rounded(interleaved(rows, heads[name]))
                    )
                assert np.array_equal(got["layers"][module][name]["kernel"][i], want.T)
    table = params["embed_tokens"]["embedding"]
    assert np.array_equal(got["embed_tokens"]["embedding"], rounded(table))
    assert got["embed_tokens"]["embedding"].dtype == np.float32
    assert_same(got["norm"], params["norm"])


def test_the_order_of_rows_is_undone():
    x = np.arange(24 * 3).reshape(24, 3)
    assert np.array_equal(permute_rows(x, 2), interleaved(x, 2))
    assert np.array_equal(unpermute_rows(permute_rows(x, 2), 2), x)
    assert np.array_equal(unpermute_rows(interleaved(x[:, 0], 3), 3), x[:, 0])


# ---------------------------------------------------------------- rotary scaling


def llama3(low=1.0, high=4.0, context=8192, factor=8.0):
    return RopeScaling(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=context,
    )


@pytest.mark.parametrize(
    ("scaling", "head_dim", "theta"),
    [
        (llama3(), 128, 500000.0),
        (llama3(factor=32.0), 64, 500000.0),
        (llama3(high=8.0, context=4096, factor=16.0), 128, 500000.0),
        (llama3(high=3.0, context=1000, factor=4.0), 64, 10000.0),
    ],
)
def test_llama3_scaling_is_recovered_from_its_factors(scaling, head_dim, theta, tmp_path):
    config = tiny_config(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling, num_layers=1)
    plain = tiny_config(head_dim=head_dim, rope_theta=theta, num_layers=1)
    factors = np.asarray(rope_frequencies(plain)) / np.asarray(rope_frequencies(config))
    np.testing.assert_allclose(llama3_factors(head_dim, theta, scaling), factors, rtol=1e-5)
    path = write_model(
        tmp_path / "m.gguf",
        config,
        float_params(config),
        tensors={"rope_freqs.weight": llama3_factors(head_dim, theta, scaling)},
    )
    assert read_gguf(path)[0] == config


def test_llama3_scaling_that_differs_in_name_only_gives_the_same_frequencies(tmp_path):
    config = tiny_config(
        head_dim=128, rope_theta=500000.0, rope_scaling=llama3(2.0, 7.0, 4096), num_layers=1
    )
    factors = llama3_factors(128, 500000.0, config.rope_scaling)
    extra = {"rope_freqs.weight": factors}
    path = write_model(tmp_path / "m.gguf", config, float_params(config), tensors=extra)
    got = read_gguf(path)[0]
    want = np.asarray(rope_frequencies(config))
    np.testing.assert_allclose(np.asarray(rope_frequencies(got)), want, rtol=1e-5)


def test_factors_of_one_are_no_scaling(tmp_path):
    config = tiny_config()
    extra = {"rope_freqs.weight": np.ones(8, np.float32)}
    path = write_model(tmp_path / "m.gguf", config, float_params(config), tensors=extra)
    assert read_gguf(path)[0] == config


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (np.linspace(1, 4, 8), "cannot be recovered"),
        ([1, 1, 1, 1, 1, 0.5, 1, 1], "cannot be recovered"),
        ([1, 1, 1, 1, 1, 1, 1, np.nan], "cannot be recovered"),
        (np.ones(9), "does not fit"),
    ],
)
def test_factors_of_another_scaling_are_refused(factors, message, tmp_path):
    config = tiny_config()
    extra = {"rope_freqs.weight": np.asarray(factors, np.float32)}
    path = write_model(tmp_path / "m.gguf", config, float_params(config), tensors=extra)
    with pytest.raises(UserError, match=message):
        read_gguf(path)


@pytest.mark.parametrize(
    "fields",
    [{"rope.scaling.type": "linear", "rope.scaling.factor": 2.5}, {"rope.scale_linear": 2.5}],
)
def test_linear_scaling_comes_from_the_metadata(fields, tmp_path):
    config = tiny_config(rope_scaling=RopeScaling(rope_type="linear", factor=2.5))
    path = write_model(tmp_path / "m.gguf", config, float_params(config), **fields)
    assert read_gguf(path)[0] == config


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": {"blk.1.ffn_up.weight": None}}, "lacks the tensor 'blk.1.ffn_up.weight'"),
        ({"tensors": {"token_embd.weight": None}}, "lacks the tensor 'token_embd.weight'"),
        ({"tensors": {"output_norm.weight": None}}, "lacks the tensor 'output_norm.weight'"),
        (
            {"tensors": {"blk.0.attn_q.weight": np.zeros((3, 64), np.float32)}},
            r"'blk.0.attn_q.weight' has shape \(3, 64\); accepted: \(64, 64\)",
        ),
        (
            {"tensors": {"blk.0.post_attention_norm.weight": np.zeros(64, np.float32)}},
            "'blk.0.post_attention_norm.weight' is not part of a llama model",
        ),
        (
            {"tensors": {"norm.ints": np.zeros(64, np.int32)}},
            "'norm.ints' is not part of a llama model",
        ),
        ({"tensors": {"output_norm.weight": np.zeros(64, np.int32)}}, "has type I32"),
        ({"block_count": 3}, "lacks the tensor 'blk.2.attn_q.weight'"),
        ({"block_count": 10**9}, "num_layers is 1000000000; accepted: a whole number from 1 to"),
        ({"embedding_length": 10**9}, "has shape .* accepted"),
        ({"block_count": None}, "llama.block_count is None; accepted: a positive integer"),
        ({"attention.head_count": 0}, "llama.attention.head_count is 0"),
        ({"attention.head_count": "many"}, "'llama.attention.head_count' is damaged"),
        ({"attention.head_count_kv": 3}, "do not divide"),
        ({"expert_count": 8}, "mixture-of-experts"),
        ({"rope.dimension_count": 8}, "head sizes are not supported"),
        ({"rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported"),
        ({"split.count": 3}, "one part of a split GGUF"),
        ({"tokenizer": {}}, "holds no tokenizer"),
        ({"tokenizer": byte_fields(model="bert")}, "tokenizer model 'bert' is not supported"),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_read_is_named_in_one_line(changes, message, tmp_path):
    config = tiny_config()
    path = write_model(tmp_path / "m.gguf", config, float_params(config), **changes)
    with pytest.raises(UserError, match=message) as e:
        read_gguf(path)
    assert "\n" not in str(e.value)


def test_an_unsupported_architecture_is_named(tmp_path):
    path = write_raw(tmp_path / "m.gguf", "mamba", {"block_count": 1})
    with pytest.raises(UserError, match="architecture 'mamba' is not supported; accepted: llama"):
        read_gguf(path)


def test_a_missing_file_and_other_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no GGUF file at"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(UserError, match="no GGUF file at"):
        read_gguf(tmp_path)
    for content in (b"", b"GGUF", b"PK\x03\x04" + bytes(100)):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(UserError, match="is not a GGUF file"):
            read_gguf(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(100))
    with pytest.raises(UserError, match="little-endian GGUF file of version 2 or 3"):
        read_gguf(tmp_path / "x.gguf")


def test_a_file_cut_off_anywhere_is_named(tmp_path):
    config = tiny_config(num_layers=1)
    whole = write_model(tmp_path / "m.gguf", config, float_params(config)).read_bytes()
    header = whole.index(b"token_embd.weight")
    cuts = [24, 40, 200, header // 2, header, header + 300, header + 2000, len(whole) - 1]
    for end in [*cuts, *range(1000, len(whole), len(whole) // 7)]:
        (tmp_path / "cut.gguf").write_bytes(whole[:end])
        with pytest.raises(UserError, match="is cut off or damaged") as e:
            read_gguf(tmp_path / "cut.gguf")
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<QQ", 2**60, 0),  # tensors
        struct.pack("<QQ", 0, 2**60),  # metadata fields
        struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2**63) + b"key",  # a key's length
        struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<I", 99),  # a value's type
        struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 0, 2**40),  # an array
        struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**40),  # of strings
        struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 2**40),  # of arrays
        struct.pack("<QQQ", 1, 0, 1) + b"t" + struct.pack("<I", 2**31),  # dimensions
        struct.pack("<QQQ", 1, 0, 1) + b"t" + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 2**63),
    ],
)
def test_a_header_that_lies_about_a_count_is_refused_at_once(body, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + body + bytes(64))
    with pytest.raises(UserError, match="is cut off or damaged"):
        read_gguf(path)


@pytest.mark.parametrize("at", [5, 40, 333])
def test_flipped_bytes_never_raise_anything_but_a_user_error(at, tmp_path):
    config = tiny_config(num_layers=1)
    whole = write_model(tmp_path / "m.gguf", config, float_params(config)).read_bytes()
    end = whole.index(b"rope.freq_base") + 50
    for i in range(at, end, 37):
        (tmp_path / "x.gguf").write_bytes(whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :])
        try:
            read_gguf(tmp_path / "x.gguf")
        except UserError as e:
            assert "\n" not in str(e)


def test_the_real_model(smollm2_path):
    config, params, tokenizer = read_gguf(smollm2_path)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert (config.rope_theta, config.rms_norm_eps) == (100000.0, 1e-05)
    assert config.tie_embeddings and "lm_head" not in params
    assert (config.vocab_size, config.head_dim) == (len(tokenizer), 64)
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    tensors = {t.name: t for t in gguf.GGUFReader(smollm2_path).tensors}

    def dense(name):
        return gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)

    layers = params["layers"]
    q, k = layers["self_attn"]["q_proj"]["kernel"], layers["self_attn"]["k_proj"]["kernel"]
    assert np.array_equal(interleaved(q[29].T, 9), dense("blk.29.attn_q.weight"))
    assert np.array_equal(interleaved(k[3].T, 3), dense("blk.3.attn_k.weight"))
    assert np.array_equal(layers["mlp"]["down_proj"]["kernel"][7].T, dense("blk.7.ffn_down.weight"))
    assert np.array_equal(params["embed_tokens"]["embedding"], dense("token_embd.weight"))
    assert all(np.isfinite(x).all() and x.dtype == np.float32 for x in jax.tree.leaves(params))
